"""LLaVA's JSON and its oddities; conversations as tokens; excluded images."""

import json

import numpy as np
import pytest
from PIL import Image

from core_jax.data.images import BadImage, Reason
from core_jax.data.llava import Fault, LlavaSource, Turn, open_images, parse_dialogue
from core_jax.data.llava_exclude import image_key, read_exclusions, without_images
from core_jax.data.llava_tokens import (
    Answer,
    UnusableDialogue,
    chat_tokens,
    cut_tokens,
    plain_tokens,
    show_masked,
    text_answer,
)
from core_jax.data.sources import SourceError, SourceSpec, open_source
from tests.core.data.image_files import noise


def say(*texts):
    """A conversation; odd ones are the model's."""
    return [{"from": ("human", "gpt")[i % 2], "value": t} for i, t in enumerate(texts)]


def gpt(text):
    return {"from": "gpt", "value": text}


def human(text):
    return {"from": "human", "value": text}


@pytest.mark.parametrize(
    ("spoken", "images", "turns", "faults"),
    [
        (say("<image>\nWhat?", "A cat."), 1, [((None, "What?"), "A cat.")], ()),
        (say("What?\n<image>", "A cat."), 1, [((None, "What?"), "A cat.")], ()),
        (say("Hello", "Hi", "And?", "So."), 0, [(("Hello",), "Hi"), (("And?",), "So.")], ()),
        (say("What?", "A cat."), 1, [((None, "What?"), "A cat.")], (Fault.NO_PLACE,)),
        (say("the tag <image>", "Yes."), 0, [(("the tag <image>",), "Yes.")], (Fault.NO_IMAGE,)),
        (say("<image> a <image> b", "c"), 1, [((None, "a\nb"), "c")], (Fault.MORE_PLACES,)),
        (say("<image>\n<image>\nBoth?", "c"), 2, [((None, None, "Both?"), "c")], ()),
        ([gpt("x"), *say("q", "a")], 0, [(("q",), "a")], (Fault.LEADING_ANSWER,)),
        ([human("<image>"), *say("q", "a")], 1, [((None, "q"), "a")], (Fault.REPEATED_QUESTION,)),
        ([*say("q", "a"), gpt("b"), *say("r", "c")], 0, [(("q",), "a")], (Fault.REPEATED_ANSWER,)),
        (say("q", "a", "r"), 0, [(("q",), "a")], (Fault.UNANSWERED,)),
        (say("q", "a", "r", " "), 0, [(("q",), "a")], (Fault.EMPTY_ANSWER,)),
        ([*say("q", "a"), {"from": "tool", "value": "x"}], 0, [(("q",), "a")],
         (Fault.UNKNOWN_SPEAKER,)),
        (say("q", "a", "<image>\nr", "b"), 1, [(("q",), "a"), ((None, "r"), "b")], ()),
        ([], 0, [], ()),
        ([{"from": "human", "value": None}, gpt("a")], 0, [], (Fault.EMPTY_QUESTION,)),
        ([{"from": "human", "value": None}, gpt("a")], 1, [((None,), "a")], (Fault.NO_PLACE,)),
        (say("<image>", "a", "", "b"), 1, [((None,), "a")], (Fault.EMPTY_QUESTION,)),
    ],
)  # fmt: skip
def test_every_oddity_has_its_fate(spoken, images, turns, faults):
    found = parse_dialogue(spoken, images)
    assert [(t.question, t.answer) for t in found.turns] == turns
    assert found.faults == faults


def test_images_may_stay_where_they_stand():
    kept = parse_dialogue(say("first\n<image>\nthen", "a"), 1, image_place="kept")
    assert kept.turns[0].question == ("first", None, "then")
    assert kept.turns[0].message()["content"][1] == {"type": "image"}
    system = parse_dialogue([{"from": "system", "value": "Be brief."}, *say("q", "a")], 0)
    assert system.system == "Be brief."


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "coco").mkdir()
    names = ["coco/000000000009.jpg", "coco/COCO_train2014_000000000025.jpg", "other.png"]
    for seed, name in enumerate(names):
        Image.fromarray(noise(seed, 40, 40)).save(tmp_path / name)
    records = [
        {"id": "a", "image": names[0], "conversations": say("<image>\nWhat?", "A cat.")},
        {"id": "a", "image": names[1], "conversations": say("<image>\nWhy?", "So.")},
        {"id": 7, "conversations": say("No image", "Indeed.")},
        {"image": "missing.jpg", "conversations": say("<image>", "x")},
        {"id": "two", "image": None, "images": [names[2], names[0]],
         "conversations": say("<image><image>", "y")},
    ]  # fmt: skip
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path


def test_source_reads_the_file_and_its_images(folder):
    source = open_source(SourceSpec(kind="llava", path=str(folder / "data.json")))
    assert isinstance(source, LlavaSource)
    assert [source[i].id for i in range(len(source))] == ["a", "a#2", "7", "3", "two"]
    assert source[0].caption == "A cat."
    assert open_images(source[2]) == []
    assert [image.size for image in open_images(source[4])] == [(40, 40), (40, 40)]
    np.testing.assert_array_equal(np.asarray(open_images(source[4])[1]),
                                  np.asarray(open_images(source[0])[0]))  # fmt: skip
    with pytest.raises(BadImage) as caught:
        open_images(source[3])
    assert caught.value.reason == Reason.MISSING_FILE


def test_files_that_are_not_llava_s_are_refused(tmp_path):
    for content, words in (
        ({"a": 1}, "list of records"),
        ([{"id": 1}], "no `conversations`"),
        ([{"image": "../x.jpg", "conversations": say("q", "a")}], "leads out"),
        ([], "no record"),
        ([{"image": 7, "conversations": say("q", "a")}], "record 0: an image is a path .* not 7"),
        ([{"image": {"path": "x"}, "conversations": say("q", "a")}], "list of paths, not {"),
    ):
        file = tmp_path / "data.json"
        file.write_text(json.dumps(content))
        with pytest.raises(SourceError, match=words):
            LlavaSource(file)


def test_evaluation_images_are_left_out_whatever_their_path(folder):
    for name in ("coco/train2017/000000000009.jpg", "COCO_val2014_000000000009.jpg"):
        assert image_key(name) == "coco:9"
    assert image_key("gqa/images/2354786.jpg") == "2354786"
    source = LlavaSource(folder / "data.json")
    names = folder / "exclude.txt"
    names.write_text("COCO_val2014_000000000009.jpg\n\n")
    kept, left_out = without_images(source, read_exclusions(names))
    assert [kept[i].id for i in range(len(kept))] == ["a#2", "7", "3"]
    assert left_out == 2
    (folder / "exclude.json").write_text(json.dumps([{"image": "x/000000000025.jpg"}]))
    assert without_images(source, read_exclusions(folder / "exclude.json"))[1] == 1
    several = {"images": ["000000000025.jpg", "a/other.png"], "conversations": []}
    (folder / "exclude.jsonl").write_text(json.dumps(several) + "\n")
    assert read_exclusions(folder / "exclude.jsonl") == {"coco:25", "other"}
    with pytest.raises(SourceError, match="'' to exclude none"):
        read_exclusions(folder / "none.json")
    names.write_text("\n")
    with pytest.raises(SourceError, match="no image"):
        read_exclusions(names)


class Letters:
    """A tokenizer of single characters; <x> is one token."""

    bos_token = None

    def __call__(self, text, add_special_tokens=True):
        ids, i = [], 0
        while i < len(text):
            stop = text.find(">", i) + 1 if text[i] == "<" else i + 1
            ids.append(1000 + ord(text[i + 1]) if text[i] == "<" else ord(text[i]))
            i = stop
        return {"input_ids": ids}

    def decode(self, ids, skip_special_tokens=False):
        return "".join(f"<{chr(i - 1000)}>" if i >= 1000 else chr(i) for i in ids)


def render(messages, add_generation_prompt):
    assert not add_generation_prompt
    said = []
    for m in messages:
        parts = ["<i>" if c["type"] == "image" else c["text"] for c in m["content"]]
        said.append(f"{m['role'][0].upper()}:{''.join(parts)}<e>\n")
    return "".join(said)


TURNS = (Turn((None, "q"), ""), Turn(("r",), ""))
TOKENIZER = Letters()
END, PLACE = 1000 + ord("e"), 1000 + ord("i")


def chat(*answers, turns=TURNS, **options):
    return chat_tokens(render, TOKENIZER, turns[: len(answers)], answers, **options)


def shown(tokens):
    return show_masked(tokens, TOKENIZER, PLACE)


def test_answers_and_their_ends_are_learned_and_nothing_else():
    text = shown(chat(text_answer(TOKENIZER, "one"), text_answer(TOKENIZER, "two"), system="s"))
    assert text == "S:s<e>\nU:<1 image tokens>q<e>\nA:[[one<e>]]\nU:r<e>\nA:[[two<e>]]"
    expanded = chat(text_answer(TOKENIZER, "one"),
                    expand=lambda t: t.replace("<i>", "<i><i><i>"))  # fmt: skip
    assert shown(expanded) == "U:<3 image tokens>q<e>\nA:[[one<e>]]"


def test_a_cut_answer_has_no_end_to_learn():
    one, two = Answer((111, 110), None), Answer((116, 119), None)
    tokens = chat(one, two)
    assert shown(tokens) == "U:<1 image tokens>q<e>\nA:[[on]]<e>\nU:r<e>\nA:[[tw]]"
    assert tokens.ids[-1] == 119
    # Another end token than the template's: learned at the very end, not inside.
    other = chat(Answer((111,), 1000 + ord("z")), Answer((116,), 1000 + ord("z")))
    assert shown(other) == "U:<1 image tokens>q<e>\nA:[[o]]<e>\nU:r<e>\nA:[[t<z>]]"


def test_stored_tokens_are_learned_as_they_are():
    """Not as the text's tokens would be: [<, e, >] stays three tokens, not the end."""
    ids = tuple(ord(c) for c in "<e>")
    tokens = chat(Answer(ids, END))
    start = int(np.flatnonzero(tokens.supervised)[0])
    assert tokens.ids[start:].tolist() == [*ids, END]
    assert tokens.supervised[start:].all()


def test_plain_captions_have_no_template():
    tokens = plain_tokens(TOKENIZER, "<i><i>", " a cat ", end="\n")
    assert shown(tokens) == "<2 image tokens>[[a cat\n]]"


def test_what_cannot_be_learned_is_refused():
    tokens = chat(text_answer(TOKENIZER, "one"))
    assert shown(cut_tokens(tokens, len(tokens.ids) - 2, PLACE)).endswith("[[on]]")
    with pytest.raises(UnusableDialogue, match="no token to learn"):
        cut_tokens(tokens, 6, PLACE)
    with pytest.raises(UnusableDialogue, match="cut an image"):
        cut_tokens(tokens, 2, PLACE)
    with pytest.raises(UnusableDialogue, match="0 questions"):
        chat()

    def silent(messages, add_generation_prompt):
        return "nothing"

    with pytest.raises(UnusableDialogue, match="each answer once"):
        chat_tokens(silent, TOKENIZER, TURNS[:1], [Answer((1,), None)])
