"""Questions about a scene that a full caption answers, with answers of one or two words."""

import dataclasses
import random

from miniature.world import vocabulary as vocab
from miniature.world.captions import true_relations
from miniature.world.scenes import Object, Scene

KINDS = (
    "existence",
    "colour",
    "shape",
    "size",
    "texture",
    "count",
    "where",
    "which",
    "relation",
    "background",
)
_NUMBERS = ("zero", "one", "two", "three", "four")
_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_FURTHER = {"left": "further left", "right": "further right", "above": "higher", "below": "lower"}
_PHRASE = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


@dataclasses.dataclass(frozen=True)
class QA:
    """A question.

    Attributes:
        question: one sentence that ends in a question mark.
        answer: one or two words in lower case, the only right ones.
        kind: one of `KINDS`.
    """

    question: str
    answer: str
    kind: str


def questions(scene: Scene, seed: int = 0) -> list[QA]:
    """Asks about a scene: one question of every kind that it allows, in a fixed order of kinds.

    Yes and no are equally likely where they are the answers. A 'colour' or 'shape' question needs
    an attribute that only one object has; scenes without any such lack that question.

    Args:
        scene: what the questions are about.
        seed: another seed, other questions; equal arguments give equal questions.

    Returns:
        Eight to ten questions.
    """
    rng = random.Random(f"{scene.id}/{seed}/qa")
    asked = [ask(rng, scene) for ask in _ASK.values()]
    return [QA(*qa, kind) for qa, kind in zip(asked, _ASK, strict=True) if qa is not None]


def _name(obj: Object) -> str:
    return f"{obj.colour} {obj.shape}"


def _article(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def _existence(rng: random.Random, scene: Scene):
    present = [o.key for o in scene.objects]
    if rng.random() < 0.5:
        key, answer = rng.choice(present), "yes"
    else:
        # Half wrong only: a colour or a shape that is in the scene, but not together.
        colour, shape = rng.choice(present)
        near = [(colour, s) for s in vocab.SHAPES] + [(c, shape) for c in vocab.COLOURS]
        key, answer = rng.choice([k for k in near if k not in present]), "no"
    return f"Is there {_article(key[0])} {key[1]}?", answer


def _unique(scene: Scene, attribute: str) -> list[Object]:
    values = [getattr(o, attribute) for o in scene.objects]
    return [o for o in scene.objects if values.count(getattr(o, attribute)) == 1]


def _colour(rng: random.Random, scene: Scene):
    unique = _unique(scene, "shape")
    if not unique:
        return None
    obj = rng.choice(unique)
    return f"What colour is the {obj.shape}?", obj.colour


def _shape(rng: random.Random, scene: Scene):
    unique = _unique(scene, "colour")
    if not unique:
        return None
    obj = rng.choice(unique)
    return f"What shape is the {obj.colour} object?", obj.shape


def _size(rng: random.Random, scene: Scene):
    obj = rng.choice(scene.objects)
    return f"What size is the {_name(obj)}?", obj.size


def _texture(rng: random.Random, scene: Scene):
    obj = rng.choice(scene.objects)
    return f"Is the {_name(obj)} plain, striped or dotted?", obj.texture


def _count(rng: random.Random, scene: Scene):
    asked = rng.choice(("objects", "shape", "size"))
    if asked == "objects":
        return "How many objects are there?", _NUMBERS[len(scene.objects)]
    if asked == "size":
        size = rng.choice(vocab.SIZES)
        number = sum(o.size == size for o in scene.objects)
        return f"How many {size} objects are there?", _NUMBERS[number]
    shape = rng.choice(scene.objects).shape
    number = sum(o.shape == shape for o in scene.objects)
    plural = f"{shape}es" if shape == "cross" else f"{shape}s"
    return f"How many {plural} are there?", _NUMBERS[number]


def _where(rng: random.Random, scene: Scene):
    obj = rng.choice(scene.objects)
    return f"Where is the {_name(obj)}?", vocab.CELLS[obj.cell]


def _which(rng: random.Random, scene: Scene):
    a, b = rng.sample(scene.objects, 2)
    relation = rng.choice(true_relations(a, b))
    first, second = (a, b) if rng.random() < 0.5 else (b, a)
    question = f"Which is {_FURTHER[relation]}, the {_name(first)} or the {_name(second)}?"
    return question, _name(a)


def _relation(rng: random.Random, scene: Scene):
    a, b = rng.sample(scene.objects, 2)
    relation = rng.choice(true_relations(a, b))
    answer = "yes"
    if rng.random() < 0.5:
        relation, answer = _OPPOSITE[relation], "no"
    return f"Is the {_name(a)} {_PHRASE[relation]} the {_name(b)}?", answer


def _background(rng: random.Random, scene: Scene):
    background = scene.background
    if rng.random() < 0.3:
        return "Is the background plain?", "yes" if background.is_plain else "no"
    if background.is_plain:
        return "What colour is the background?", background.top
    if rng.random() < 0.5:
        return "What colour is the background at the top?", background.top
    return "What colour is the background at the bottom?", background.bottom


_ASK = dict(
    zip(
        KINDS,
        (
            _existence,
            _colour,
            _shape,
            _size,
            _texture,
            _count,
            _where,
            _which,
            _relation,
            _background,
        ),
        strict=True,
    )
)
