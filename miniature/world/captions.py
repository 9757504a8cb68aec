"""Captions in words: several authors, each with varied grammar.

Whatever the author and the grammar, a caption states exactly this (the canonical description
scheme, which `scoring` measures against):

- every object once with size, colour, shape, its texture unless plain, and its cell;
- `pairwise_count(scene)` different true relations between two objects, left of / right of / above /
  below, by cells (a hair's difference within a column is never called 'left');
- the background.

An object is introduced with its size and referred to again without it ('the red circle'), which is
how the parser tells the two apart; (colour, shape) is unique within a scene.
"""

import random
import re

from miniature.world import vocabulary as vocab
from miniature.world.scenes import Object, Scene

MIN_WORDS, MAX_WORDS = 25, 60  # words and punctuation marks, in the default style
STYLES = ("default", "terse", "chatty")

_COUNTS = {2: "two", 3: "three", 4: "four"}
_RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above", "higher than"),
    "below": ("below", "lower than"),
}
Relation = tuple[Object, str, Object]


def describe(scene: Scene, seed: int = 0, style: str = "default") -> str:
    """Writes a caption of a scene.

    Args:
        scene: what to describe.
        seed: another seed, another wording; equal arguments give equal captions.
        style: the author, one of `STYLES`: 'default' writes full sentences, 'terse' notes with
            other words for size, texture and place, 'chatty' talks in the first person.

    Returns:
        One line of at most `MAX_WORDS` words and punctuation marks that ends in a full stop;
        default captions have at least `MIN_WORDS`.

    Raises:
        ValueError: for an unknown style.
    """
    if style not in _AUTHORS:
        raise ValueError(f"unknown style {style!r}; there are {', '.join(STYLES)}")
    rng = random.Random(f"{scene.id}/{seed}/{style}")
    author = _AUTHORS[style]
    for _ in range(24):  # most wordings fit at once
        caption = author(rng, scene)
        if style != "default" or MIN_WORDS <= count_words(caption) <= MAX_WORDS:
            break
    return caption


def count_words(caption: str) -> int:
    """Words and punctuation marks."""
    return len(re.findall(r"\w+|[^\w\s]", caption))


def pairwise_count(scene: Scene) -> int:
    """How many relations between two objects a caption of the scene states: 1, 2, 2 for 2, 3, 4."""
    return min(len(scene.objects) - 1, 2)


def true_relations(a: Object, b: Object) -> list[str]:
    """Which of left, right, above, below hold of a with respect to b, by cells; one or two do."""
    relations = []
    if a.column != b.column:
        relations.append("left" if a.column < b.column else "right")
    if a.row != b.row:
        relations.append("above" if a.row < b.row else "below")
    return relations


# ---------------------------------------------------------------- what the authors share


def _ordered(rng: random.Random, scene: Scene) -> list[Object]:
    """Objects in one of three orders, so that the first object does not tell the rest."""
    order = rng.choice(("rows", "rows", "columns", "size"))
    if order == "rows":
        return sorted(scene.objects, key=lambda o: o.cell)
    if order == "columns":
        return sorted(scene.objects, key=lambda o: (o.column, o.row))
    return sorted(scene.objects, key=lambda o: (o.size != "large", o.cell))


def _star(rng: random.Random, scene: Scene) -> tuple[Object, list[tuple[str, Object]]]:
    """One object and its relations to as many others as a caption has to relate."""
    subject = rng.choice(scene.objects)
    others = [o for o in scene.objects if o is not subject]
    others = rng.sample(others, pairwise_count(scene))
    return subject, [(rng.choice(true_relations(subject, o)), o) for o in others]


def _join(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _reference(obj: Object) -> str:
    return f"the {obj.colour} {obj.shape}"


def _article(adjective: str) -> str:
    return ("an " if adjective[0] in "aeiou" else "a ") + adjective


# ---------------------------------------------------------------- default: full sentences


class _Wording:
    """The words that one default caption keeps to throughout."""

    def __init__(self, rng: random.Random):
        rows = (("top", "bottom"), ("top", "bottom"), ("upper", "lower"))
        self.upper, self.lower = rng.choice(rows)
        self.middle = rng.choice(("centre", "middle"))
        self.side = rng.choice(("on", "at"))
        self.texture_first = rng.random() < 0.5
        self.relations = {name: rng.choice(words) for name, words in _RELATIONS.items()}

    def noun(self, obj: Object) -> str:
        words = [obj.size, obj.colour]
        if obj.texture != "plain":
            words.insert(1 if self.texture_first else 2, obj.texture)
        return f"a {' '.join(words)} {obj.shape}"

    def place(self, obj: Object) -> str:
        name = vocab.CELLS[obj.cell]
        if name == "centre":
            return f"in the {self.middle}"
        if " " in name:
            row, column = name.split()
            return f"at the {self.upper if row == 'top' else self.lower} {column}"
        return f"{self.side if name in ('left', 'right') else 'at'} the {name}"

    def placed(self, obj: Object) -> str:
        return f"{self.noun(obj)} {self.place(obj)}"

    def relation(self, a: Object, relation: str, b: Object) -> str:
        return f"{_reference(a)} is {self.relations[relation]} {_reference(b)}"


def _default_background(scene: Scene) -> str:
    background = scene.background
    if background.is_plain:
        return f"a plain {background.top} background"
    return f"a background fading from {background.top} to {background.bottom}"


def _default_background_sentence(scene: Scene) -> str:
    background = scene.background
    if background.is_plain:
        return f"The background is plain {background.top}."
    return f"The background fades from {background.top} to {background.bottom}."


def _default(rng: random.Random, scene: Scene) -> str:
    wording = _Wording(rng)
    return rng.choice((_listing, _listing, _chain, _fronted))(rng, scene, wording)


def _listing(rng: random.Random, scene: Scene, wording: _Wording) -> str:
    """All objects in one sentence, then how they lie to one another."""
    objects = _ordered(rng, scene)
    items = _join([wording.placed(o) for o in objects])
    backdrop = _default_background(scene)
    subject, others = _star(rng, scene)
    relations = f"{_reference(subject)} is " + " and ".join(
        f"{wording.relations[name]} {_reference(o)}" for name, o in others
    )
    opening = rng.choice(
        (
            f"On {backdrop} there are {_COUNTS[len(objects)]} objects: {items}.",
            f"The image shows {items} on {backdrop}.",
            f"Against {backdrop} there are {items}.",
            f"There are {_COUNTS[len(objects)]} objects, {items}. "
            + _default_background_sentence(scene),
        )
    )
    return f"{opening} {_sentence(relations)}"


def _chain(rng: random.Random, scene: Scene, wording: _Wording) -> str:
    """Objects two by two, related as they are introduced."""
    objects = _ordered(rng, scene)
    first, second = objects[:2]

    def pair(a: Object, b: Object) -> str:
        relation = wording.relations[rng.choice(true_relations(a, b))]
        return f"{wording.placed(a)} is {relation} {wording.placed(b)}"

    sentences = [_sentence(pair(first, second))]
    if len(objects) == 3:
        known = rng.choice((first, second))
        relation = wording.relations[rng.choice(true_relations(objects[2], known))]
        third = f"{wording.placed(objects[2])} is {relation} {_reference(known)}"
        sentences.append(_sentence(third))
    elif len(objects) == 4:
        sentences.append(_sentence(pair(*objects[2:])))
    backdrop = _default_background_sentence(scene)
    sentences.insert(rng.choice((0, len(sentences))), backdrop)
    return " ".join(sentences)


def _fronted(rng: random.Random, scene: Scene, wording: _Wording) -> str:
    """Place by place, later objects related to earlier ones."""
    objects = _ordered(rng, scene)
    related = sorted(rng.sample(range(1, len(objects)), pairwise_count(scene)))
    clauses = []
    for i, obj in enumerate(objects):
        clause = f"{wording.place(obj)} is {wording.noun(obj)}"
        if i in related:
            known = rng.choice(objects[:i])
            relation = wording.relations[rng.choice(true_relations(obj, known))]
            clause += f", {relation} {_reference(known)}"
        clauses.append(clause)
    backdrop = _default_background_sentence(scene)
    if rng.random() < 0.5:
        return " ".join([backdrop] + [_sentence(c) for c in clauses])
    return " ".join([_sentence(c) for c in clauses] + [backdrop])


# ---------------------------------------------------------------- terse: another author's notes

_TERSE_SIZES = {"small": "little", "large": "big"}
_TERSE_TEXTURES = {"striped": "banded", "dotted": "spotted"}


def _terse(rng: random.Random, scene: Scene) -> str:
    in_brackets = rng.random() < 0.5

    def item(obj: Object) -> str:
        words = [_TERSE_SIZES[obj.size], obj.colour, obj.shape]
        if obj.texture != "plain":
            words.insert(0, _TERSE_TEXTURES[obj.texture])
        place = vocab.CELLS[obj.cell].replace("top", "upper").replace("bottom", "lower")
        place = {"upper": "upper edge", "lower": "lower edge", "centre": "mid"}.get(place, place)
        place = f"{place} edge" if place in ("left", "right") else place
        return f"{' '.join(words)} ({place})" if in_brackets else f"{' '.join(words)}, {place}"

    subject, others = _star(rng, scene)
    words = {"left": "left of", "right": "right of", "above": "over", "below": "under"}
    links = ", ".join(f"{words[name]} {o.colour} {o.shape}" for name, o in others)
    background = scene.background
    backdrop = background.top
    if not background.is_plain:
        backdrop += f" into {background.bottom}"
    parts = [item(o) for o in _ordered(rng, scene)]
    parts.append(f"{subject.colour} {subject.shape} {links}")
    parts.insert(rng.choice((0, len(parts))), f"backdrop {backdrop}")
    return "; ".join(parts) + "."


# ---------------------------------------------------------------- chatty: in the first person

_CHATTY_SIZES = {"small": "tiny", "large": "huge"}
_CHATTY_TEXTURES = {"striped": "stripy", "dotted": "dotty"}
_CHATTY_PLACES = (
    "high left",
    "up high",
    "high right",
    "far left",
    "dead centre",
    "far right",
    "low left",
    "down low",
    "low right",
)


def _chatty(rng: random.Random, scene: Scene) -> str:
    def noun(obj: Object) -> str:
        words = [_article(_CHATTY_SIZES[obj.size]), obj.colour, obj.shape]
        if obj.texture != "plain":
            words.insert(1, _CHATTY_TEXTURES[obj.texture])
        return " ".join(words)

    objects = _ordered(rng, scene)
    seen = _join([f"{noun(o)} {_CHATTY_PLACES[o.cell]}" for o in objects])
    subject, others = _star(rng, scene)
    words = {"left": "left of", "right": "right of", "above": "over", "below": "beneath"}
    links = " and ".join(f"{words[name]} {_reference(o)}" for name, o in others)
    background = scene.background
    if background.is_plain:
        backdrop = f"It is all {background.top} behind."
    else:
        backdrop = f"Behind, {background.top} turns into {background.bottom}."
    opening = rng.choice(("I can see", "I see", "Here we have"))
    parts = [f"{opening} {seen}.", _sentence(f"{_reference(subject)} sits {links}")]
    parts.insert(rng.choice((1, 2)), backdrop)
    return " ".join(parts)


_AUTHORS = {"default": _default, "terse": _terse, "chatty": _chatty}
