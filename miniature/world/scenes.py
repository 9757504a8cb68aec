"""Scenes: what is in a picture, as data; everything else is a pure function of it."""

import dataclasses
import json
import random

from miniature.world import vocabulary as vocab

_CELL_QUARTERS = vocab.IMAGE_SIZE * 4 // vocab.GRID  # 85: a cell's side in quarter pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Object:
    """One thing in a scene.

    Attributes:
        shape: one of `vocabulary.SHAPES`.
        colour: one of `vocabulary.COLOURS`.
        size: 'small' or 'large'.
        texture: one of `vocabulary.TEXTURES`.
        cell: 0..8 in reading order.
        centre: (x, y) in quarter pixels, the jitter within the cell included.
        diameter: in quarter pixels.
        rgb: the colour as painted, jitter included.
    """

    shape: str
    colour: str
    size: str
    texture: str
    cell: int
    centre: tuple[int, int]
    diameter: int
    rgb: tuple[int, int, int]

    @property
    def row(self) -> int:
        """0 is the top row."""
        return self.cell // vocab.GRID

    @property
    def column(self) -> int:
        """0 is the left column."""
        return self.cell % vocab.GRID

    @property
    def key(self) -> tuple[str, str]:
        """(colour, shape): unique within a scene, so 'the red circle' is never ambiguous."""
        return self.colour, self.shape

    @property
    def triple(self) -> tuple[str, str, str]:
        """(shape, colour, size): what object_f1 compares."""
        return self.shape, self.colour, self.size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Background:
    """What is behind the objects; plain where both names are equal, else it fades downwards.

    Attributes:
        top: name of the colour at the upper edge.
        bottom: name of the colour at the lower edge.
        top_rgb: as painted.
        bottom_rgb: as painted.
    """

    top: str
    bottom: str
    top_rgb: tuple[int, int, int]
    bottom_rgb: tuple[int, int, int]

    @property
    def is_plain(self) -> bool:
        """Whether there is a single colour."""
        return self.top == self.bottom


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """A picture's content. `id` is unique over splits and seeds; objects come in reading order."""

    id: str
    objects: tuple[Object, ...]
    background: Background

    def to_json(self) -> str:
        """One line of JSON from which `from_json` builds an equal scene."""
        return json.dumps(dataclasses.asdict(self), separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes) -> "Scene":
        """The inverse of `to_json`.

        Raises:
            ValueError: if a field is missing or unknown.
        """
        try:
            data = json.loads(text)
            objects = tuple(_from_fields(Object, fields) for fields in data["objects"])
            background = _from_fields(Background, data["background"])
            return cls(id=data["id"], objects=objects, background=background)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a scene written by Scene.to_json: {text[:80]!r}") from error


def _from_fields(cls, fields: dict):
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def sample_scene(seed: int, index: int, split: str) -> Scene:
    """Draws scene number `index` of a split; equal arguments give equal scenes.

    'train' and 'validation' scenes are made of seen triples only; every 'heldout' scene has at
    least one object whose (shape, colour, size) no training scene ever shows, the others are drawn
    from all triples. Splits have no random numbers in common.

    Args:
        seed: chooses the world.
        index: 0 or more, without an upper bound.
        split: one of `vocabulary.SPLITS`.

    Raises:
        ValueError: for an unknown split or a negative index.
    """
    if split not in vocab.SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(vocab.SPLITS)}")
    if index < 0:
        raise ValueError(f"index must be 0 or more, not {index}")
    rng = random.Random(f"{split}/{seed}/{index}")
    count = rng.randint(vocab.MIN_OBJECTS, vocab.MAX_OBJECTS)
    triples = _draw_triples(rng, count, split)
    cells = rng.sample(range(vocab.GRID**2), count)
    objects = [_draw_object(rng, triple, cell) for triple, cell in zip(triples, cells, strict=True)]
    return Scene(
        id=f"{split}-{seed}-{index:07d}",
        objects=tuple(sorted(objects, key=lambda o: o.cell)),
        background=_draw_background(rng),
    )


def sample_crowd(seed: int, index: int) -> Scene:
    """Draws a scene with an object in every cell, of seen triples only; it is in no split.

    A picture of nine objects teaches a tower three times as much as one of three. No author
    describes it: a (colour, shape) may come twice.

    Args:
        seed: chooses the world.
        index: 0 or more, without an upper bound.
    """
    rng = random.Random(f"crowd/{seed}/{index}")
    return Scene(
        id=f"crowd-{seed}-{index:07d}",
        objects=tuple(
            _draw_object(rng, rng.choice(vocab.SEEN_TRIPLES), cell) for cell in range(vocab.GRID**2)
        ),
        background=_draw_background(rng),
    )


def _draw_triples(rng: random.Random, count: int, split: str) -> list[tuple[str, str, str]]:
    triples: list[tuple[str, str, str]] = []
    pool = vocab.SEEN_TRIPLES
    if split == "heldout":
        triples.append(rng.choice(sorted(vocab.HELD_OUT_TRIPLES)))
        pool = vocab.ALL_TRIPLES
    while len(triples) < count:
        new = rng.choice(pool)
        if all(new[:2] != old[:2] for old in triples):
            triples.append(new)
    return triples


def _draw_object(rng: random.Random, triple: tuple[str, str, str], cell: int) -> Object:
    shape, colour, size = triple
    diameter = rng.randint(*vocab.DIAMETERS[size])
    slack = (_CELL_QUARTERS - diameter) // 2 - 2  # the object stays inside its cell
    jitter = (rng.randint(-slack, slack), rng.randint(-slack, slack))
    row, column = divmod(cell, vocab.GRID)
    middle = [i * _CELL_QUARTERS + _CELL_QUARTERS // 2 for i in (column, row)]
    # Half of the objects are plain, so that a texture is worth mentioning.
    texture = rng.choice(("plain", "plain", "striped", "dotted"))
    return Object(
        shape=shape,
        colour=colour,
        size=size,
        texture=texture,
        cell=cell,
        centre=(middle[0] + jitter[0], middle[1] + jitter[1]),
        diameter=diameter,
        rgb=_jitter_colour(rng, vocab.COLOURS[colour], 10),
    )


def _draw_background(rng: random.Random) -> Background:
    names = tuple(vocab.BACKGROUNDS)
    top = rng.choice(names)
    bottom = top if rng.random() < 0.5 else rng.choice([n for n in names if n != top])
    top_rgb = _jitter_colour(rng, vocab.BACKGROUNDS[top], 6)
    bottom_rgb = top_rgb if top == bottom else _jitter_colour(rng, vocab.BACKGROUNDS[bottom], 6)
    return Background(top=top, bottom=bottom, top_rgb=top_rgb, bottom_rgb=bottom_rgb)


def _jitter_colour(rng: random.Random, rgb, amount: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, c + rng.randint(-amount, amount))) for c in rgb)
    return red, green, blue
