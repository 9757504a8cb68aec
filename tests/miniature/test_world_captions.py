"""Captions say all there is; the parser and the scorer find exactly that, in every style."""

import itertools
import random

import pytest

from miniature.world import (
    STYLES,
    ParsedScene,
    aggregate,
    describe,
    parse,
    questions,
    sample_scene,
    score,
    scorer,
)
from miniature.world import vocabulary as vocab
from miniature.world.captions import MAX_WORDS, MIN_WORDS, count_words, pairwise_count
from miniature.world.qa import KINDS
from miniature.world.scoring import METRICS

SCENES = [sample_scene(0, i, "heldout") for i in range(250)] + [
    sample_scene(0, i, "train") for i in range(250)
]


@pytest.mark.parametrize("style", STYLES)
def test_true_captions_score_one_and_shuffled_ones_nothing(style):
    captions = [describe(scene, 3, style) for scene in SCENES]
    result = aggregate(scorer(SCENES, captions))
    assert set(result.values()) == {1.0}
    for example in scorer([s.to_json() for s in SCENES], captions):
        assert all(example[f"{m}.tp_pred"] == example[f"{m}.pred"] for m in METRICS)
        assert all(example[f"{m}.tp_ref"] == example[f"{m}.ref"] for m in METRICS)
    random.Random(0).shuffle(captions)
    shuffled = aggregate(scorer(SCENES, captions))
    assert shuffled["object_f1"] < 0.1
    assert shuffled["relation_f1"] < 0.1


@pytest.mark.parametrize("style", STYLES)
def test_captions_are_one_line_of_the_right_length(style):
    lengths = []
    for i in range(2000):
        caption = describe(sample_scene(1, i, "train"), 0, style)
        assert caption.endswith(".")
        assert caption.isascii()
        assert "\n" not in caption
        lengths.append(count_words(caption))
    assert max(lengths) <= MAX_WORDS
    assert min(lengths) >= (MIN_WORDS if style == "default" else 20)


def test_wording_varies_with_the_seed_and_is_deterministic():
    scene = sample_scene(0, 5, "heldout")
    captions = {describe(scene, seed) for seed in range(40)}
    assert len(captions) > 30
    assert captions == {describe(scene, seed) for seed in range(40)}
    assert describe(scene) == (
        "Against a plain white background there are a large dotted blue square at the top right, a "
        "large green star at the left and a small yellow triangle at the bottom left. The green "
        "star is to the left of the blue square and above the yellow triangle."
    )
    with pytest.raises(ValueError, match="unknown style 'poet'; there are default, terse, chatty"):
        describe(scene, style="poet")


def test_styles_have_different_words():
    words = {}
    for style in STYLES:
        text = " ".join(describe(s, 0, style) for s in SCENES).lower()
        words[style] = {w.strip(".,;()") for w in text.split()}
    for style in STYLES[1:]:
        assert len(words["default"] - words[style]) > 10
        assert len(words[style] - words["default"]) > 8


WORLD = "A small red circle at the top left is above a large blue square in the centre."


def test_parse_reads_claims():
    parsed = parse(WORLD + " The background fades from white to navy.")
    assert [(o.size, o.colour, o.shape, o.cell) for o in parsed.objects] == [
        ("small", "red", "circle", 0),
        ("large", "blue", "square", 4),
    ]
    circle, square = ("red", "circle"), ("blue", "square")
    assert parsed.facts == {("at", circle, 0), ("at", square, 4), ("above", circle, square)}
    assert parsed.background == ("white", "navy")


@pytest.mark.parametrize(
    ("sentence", "facts"),
    [
        ("The red circle is right of the blue square.", {("left", "square", "circle")}),
        (
            "The red circle is left of the blue square and below the pink star.",
            {("left", "circle", "square"), ("above", "star", "circle")},
        ),
        (
            "The red circle is left of the blue square, which is lower than the pink star.",
            {("left", "circle", "square"), ("above", "star", "square")},
        ),
        ("At the top is a red circle, left of the blue square", {("left", "circle", "square")}),
        ("red circle over blue square; pink star", {("above", "circle", "square")}),
        ("Above the. left of. is and.", set()),
    ],
)
def test_parse_relations(sentence, facts):
    shapes = [(f, a[1], b[1]) for f, a, b in parse(sentence).facts if f != "at"]
    assert set(shapes) == facts


def test_parse_never_raises():
    assert parse("") == ParsedScene((), frozenset(), None)
    rng = random.Random(0)
    words = " ".join(describe(s, 0, style) for s in SCENES[:60] for style in STYLES).split()
    words += ["", "<s>", "ä", "\n", "of", "than", "to", "0", "the the", "�"]
    for _ in range(500):
        text = " ".join(rng.choices(words, k=rng.randint(0, 40)))
        counts = score(SCENES[0], text)
        for metric in METRICS:
            assert 0 <= counts[f"{metric}.tp_pred"] <= counts[f"{metric}.pred"]
            assert 0 <= counts[f"{metric}.tp_ref"] <= counts[f"{metric}.ref"]


def test_every_kind_of_error_costs_what_it_should():
    scene = next(s for s in SCENES if len(s.objects) == 3 and all(
        o.texture == "plain" for o in s.objects))  # fmt: skip
    caption = describe(scene)
    true = score(scene, caption)
    assert true["relation.ref"] == 3 + pairwise_count(scene) == 5
    obj = scene.objects[0]

    def changed(old: str, new: str) -> dict[str, int]:
        assert old in caption
        return score(scene, caption.replace(old, new))

    other = next(c for c in vocab.COLOURS if c not in caption)
    wrong_colour = changed(obj.colour + " " + obj.shape, f"{other} {obj.shape}")
    assert wrong_colour["object.tp_pred"] == 2
    assert wrong_colour["shape.tp_pred"] == 3
    assert wrong_colour["colour.tp_pred"] == 2
    assert wrong_colour["relation.tp_pred"] <= 3
    wrong_size = changed(f"a {obj.size} {obj.colour}", f"a {_other(obj.size)} {obj.colour}")
    assert wrong_size["object.tp_pred"] == 2
    assert wrong_size["size.tp_pred"] == 2
    assert wrong_size["relation.tp_pred"] == true["relation.tp_pred"]
    again = score(scene, caption + f" A {obj.size} {obj.colour} {obj.shape} is there.")
    assert (again["object.tp_pred"], again["object.pred"]) == (3, 4)
    assert score(scene, "")["object.tp_ref"] == 0


def _other(size: str) -> str:
    return "small" if size == "large" else "large"


def test_stating_more_than_is_wanted_does_not_lift_recall():
    scene = next(s for s in SCENES if len(s.objects) == 4)
    a = scene.objects[0]
    b = next(o for o in scene.objects if o.column != a.column)
    side = "left" if a.column < b.column else "right"
    extra = f" The {a.colour} {a.shape} is {side} of the {b.colour} {b.shape}."
    counts = score(scene, describe(scene) + extra)
    assert counts["relation.tp_ref"] == counts["relation.ref"] == 6
    wrong = score(
        scene, describe(scene) + extra.replace(side, "right" if side == "left" else "left")
    )
    assert wrong["relation.pred"] - wrong["relation.tp_pred"] == 1


def test_aggregate_is_a_micro_average():
    pair = next(s for s in SCENES if len(s.objects) == 2)
    four = next(s for s in SCENES if len(s.objects) == 4)
    result = aggregate(scorer([pair, four], [describe(pair), ""]))
    assert result["object_precision"] == 1
    assert result["object_recall"] == pytest.approx(2 / 6)
    assert result["object_f1"] == pytest.approx(0.5)
    assert aggregate([])["object_f1"] == 0
    with pytest.raises(ValueError, match="1 references but 2 captions"):
        scorer([pair], ["", ""])


def test_questions_have_short_true_answers():
    kinds = set()
    for scene in SCENES:
        asked = questions(scene)
        assert asked == questions(scene)
        assert len({qa.kind for qa in asked}) == len(asked) >= 8
        kinds |= {qa.kind for qa in asked}
        by_kind = {qa.kind: qa for qa in asked}
        for qa in asked:
            assert qa.question.endswith("?")
            assert 1 <= len(qa.answer.split()) <= 2
        where = by_kind["where"]
        obj = next(o for o in scene.objects if f"{o.colour} {o.shape}" in where.question)
        assert vocab.CELLS[obj.cell] == where.answer
        exists = by_kind["existence"]
        named = tuple(exists.question.rstrip("?").split()[-2:])
        assert (named in {o.key for o in scene.objects}) == (exists.answer == "yes")
    assert kinds == set(KINDS)
    answers = [qa.answer for s in SCENES for qa in questions(s) if qa.kind == "relation"]
    assert 0.4 < answers.count("yes") / len(answers) < 0.6


def _answer(claims: ParsedScene, question: str, kind: str) -> str:
    """Answers from a parsed caption alone, written without a look at how questions are made."""
    words = question.rstrip("?").replace(",", "").split()
    by_key = {(o.colour, o.shape): o for o in claims.objects}
    named = [by_key.get(k) for k in itertools.pairwise(words) if k in by_key]
    if kind == "existence":
        return "yes" if tuple(words[-2:]) in by_key else "no"
    if kind == "colour":
        return next(o.colour for o in claims.objects if o.shape == words[-1])
    if kind == "shape":
        return next(o.shape for o in claims.objects if o.colour == words[-2])
    if kind == "count":
        asked = words[2]
        number = sum(
            asked == "objects" or o.size == asked or asked in (o.shape + "s", o.shape + "es")
            for o in claims.objects
        )
        return ("zero", "one", "two", "three", "four")[number]
    if kind == "background":
        top, bottom = claims.background
        if words[-1] == "plain":
            return "yes" if top == bottom else "no"
        return bottom if words[-1] == "bottom" else top
    if kind in ("size", "texture"):
        return getattr(named[0], kind)
    if kind == "where":
        return vocab.CELLS[named[0].cell]
    (row, column), (other_row, other_column) = (divmod(o.cell, 3) for o in named)
    if "left" in words or "right" in words:
        first = column < other_column if "left" in words else column > other_column
    else:
        is_up = "above" in words or "higher" in words
        first = row < other_row if is_up else row > other_row
    if kind == "relation":
        return "yes" if first else "no"
    return f"{named[not first].colour} {named[not first].shape}"


def test_questions_are_answered_by_the_caption():
    for scene in SCENES:
        claims = parse(describe(scene, 1))
        for qa in questions(scene, 1):
            assert _answer(claims, qa.question, qa.kind) == qa.answer, qa


def test_relations_are_strict_about_cells():
    """Within a column nothing is left of anything, whatever the jitter; claims of it are wrong."""
    scene = next(
        s
        for s in SCENES
        if s.objects[0].column == s.objects[1].column  # one above the other
    )
    names = [f"the {o.colour} {o.shape}" for o in scene.objects[:2]]
    for first, second in (names, names[::-1]):
        for words in ("left of", "right of"):
            counts = score(scene, f"{first} is {words} {second}.")
            assert (counts["relation.pred"], counts["relation.tp_pred"]) == (1, 0)
    assert score(scene, f"{names[0]} is above {names[1]}.")["pairwise.tp_pred"] == 1
    assert score(scene, f"{names[1]} is above {names[0]}.")["pairwise.tp_pred"] == 0
