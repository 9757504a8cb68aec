"""What the miniature world is made of: the values every attribute can take.

Colours of objects and of backgrounds are disjoint, so a colour word alone says which it is about.
The grid is 3x3; a cell is an index 0..8 in reading order, row `cell // 3`, column `cell % 3`.
"""

IMAGE_SIZE = 64  # pixels
GRID = 3

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")

COLOURS = {
    "red": (218, 38, 38),
    "orange": (244, 134, 26),
    "yellow": (246, 222, 52),
    "green": (36, 158, 62),
    "cyan": (64, 208, 216),
    "blue": (40, 84, 226),
    "purple": (132, 50, 186),
    "pink": (246, 142, 192),
}

SIZES = ("small", "large")
# Diameter in quarter pixels: the renderer draws at four times the resolution.
DIAMETERS = {"small": (44, 49), "large": (72, 78)}

TEXTURES = ("plain", "striped", "dotted")

BACKGROUNDS = {
    "white": (244, 244, 244),
    "grey": (142, 142, 142),
    "black": (24, 24, 24),
    "sand": (212, 192, 152),
    "navy": (24, 34, 88),
}

CELLS = (
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)

MIN_OBJECTS, MAX_OBJECTS = 2, 4


def _held_out() -> frozenset[tuple[str, str, str]]:
    """Twelve of the 96 triples, two a shape.

    Every value of every attribute, and every (shape, colour) pair at the other size, stays in the
    training scenes: what is new is the combination only.
    """
    colours = tuple(COLOURS)
    triples = set()
    for i, shape in enumerate(SHAPES):
        triples.add((shape, colours[i], SIZES[i % 2]))
        triples.add((shape, colours[(i + 4) % len(colours)], SIZES[(i + 1) % 2]))
    return frozenset(triples)


ALL_TRIPLES = tuple((s, c, z) for s in SHAPES for c in COLOURS for z in SIZES)
HELD_OUT_TRIPLES = _held_out()
SEEN_TRIPLES = tuple(t for t in ALL_TRIPLES if t not in HELD_OUT_TRIPLES)
SPLITS = ("train", "validation", "heldout")
