"""What a caption claims: objects, places, relations and background, from any author's wording.

The parser never raises: whatever it cannot read it leaves out. Model output that breaks off,
repeats itself or mixes styles gives the claims that a reader would take from it.
"""

import dataclasses
import re

from miniature.world import vocabulary as vocab

_SIZES = {
    **dict.fromkeys(("small", "little", "tiny"), "small"),
    **dict.fromkeys(("large", "big", "huge"), "large"),
}
_TEXTURES = {
    **dict.fromkeys(("striped", "banded", "stripy"), "striped"),
    **dict.fromkeys(("dotted", "spotted", "dotty"), "dotted"),
    "plain": "plain",
}
_ROWS = {
    **dict.fromkeys(("top", "upper", "high"), "top"),
    **dict.fromkeys(("bottom", "lower", "low"), "bottom"),
}
_MIDDLES = {"centre", "center", "middle", "mid"}
_SIDES = {"left", "right"}
_RELATIONS = {
    **dict.fromkeys(("above", "over"), "above"),
    **dict.fromkeys(("below", "under", "beneath"), "below"),
}
_COMPARED = {"higher": "above", "lower": "below"}  # followed by 'than'
_STOPS = {".", ";", ":", "!", "?"}
_CONJUNCTIONS = {",", "and"}
_VERBS = {"is", "are", "sits", "lies"}
_INTRODUCING = {"a", "an", "another", "one"}
_CELL_INDEX = {name: i for i, name in enumerate(vocab.CELLS)}

Key = tuple[str | None, str | None]  # (colour, shape)
Fact = tuple  # ('at', key, cell) | ('left', key, key) | ('above', key, key)


@dataclasses.dataclass(frozen=True)
class ParsedObject:
    """An object as introduced by a caption; None for what it does not say.

    Attributes:
        shape: one of `vocabulary.SHAPES`.
        colour: one of `vocabulary.COLOURS` or None.
        size: 'small', 'large' or None.
        texture: one of `vocabulary.TEXTURES`; 'plain' where none is mentioned.
        cell: 0..8 or None.
    """

    shape: str
    colour: str | None
    size: str | None
    texture: str
    cell: int | None


@dataclasses.dataclass(frozen=True)
class ParsedScene:
    """A caption's claims.

    Attributes:
        objects: in the order of introduction; one that is introduced twice is there twice.
        facts: normalised places and relations: ('at', key, cell), ('left', a, b) for a left of b,
            ('above', a, b); 'right of' and 'below' are turned around. Keys are (colour, shape).
        background: (top, bottom), equal where plain; None where not mentioned.
    """

    objects: tuple[ParsedObject, ...]
    facts: frozenset[Fact]
    background: tuple[str, str] | None


@dataclasses.dataclass(eq=False)  # two mentions are never the same one
class _Mention:
    shape: str
    colour: str | None = None
    size: str | None = None
    texture: str = "plain"
    introduced: bool = False
    cell: int | None = None


def parse(caption: str) -> ParsedScene:
    """Reads a caption.

    Args:
        caption: any text in any of the styles; upper and lower case do not matter.

    Returns:
        What it claims; empty for text that is about nothing known.
    """
    words = re.findall(r"[a-z]+|[.,;:!?]", caption.lower())
    mentions: list[_Mention] = []
    relations: list[tuple[_Mention, str, _Mention]] = []
    sentence: list = []
    for item in [*_items(words), "."]:
        if item in _STOPS:
            _read_sentence(sentence, mentions, relations)
            sentence = []
        else:
            sentence.append(item)
    objects = tuple(
        ParsedObject(m.shape, m.colour, m.size, m.texture, m.cell) for m in mentions if m.introduced
    )
    return ParsedScene(objects, _facts(mentions, relations), _background(words))


# ---------------------------------------------------------------- words to items


def _items(words: list[str]) -> list:
    """Turns words into mentions, ('at', cell), ('rel', name) and the few words that steer."""
    items: list = []
    at = 0
    while at < len(words):
        for read in (_read_mention, _read_relation, _read_place):
            item, length = read(words, at)
            if length:
                items.append(item)
                at += length
                break
        else:
            word = words[at]
            if word in _STOPS or word in _CONJUNCTIONS:
                items.append(word)
            elif word in _VERBS:
                items.append("is")
            at += 1
    return items


def _read_mention(words: list[str], at: int) -> tuple[_Mention | None, int]:
    """An article, adjectives in any order, a shape."""
    start = at
    introduced = words[at] in _INTRODUCING
    if introduced or words[at] == "the":
        at += 1
    mention = _Mention(shape="")
    while at < len(words):
        word = words[at]
        at += 1
        if word in vocab.SHAPES:
            mention.shape = word
            mention.introduced = introduced or mention.size is not None
            return mention, at - start
        if word in vocab.COLOURS:
            mention.colour = word
        elif word in _SIZES:
            mention.size = _SIZES[word]
        elif word in _TEXTURES:
            mention.texture = _TEXTURES[word]
        else:
            break
    return None, 0


def _read_relation(words: list[str], at: int) -> tuple[tuple | None, int]:
    word, after = words[at], words[at + 1] if at + 1 < len(words) else ""
    if word in _SIDES and after == "of":
        return ("rel", word), 2
    if word in _COMPARED and after == "than":
        return ("rel", _COMPARED[word]), 2
    if word in _RELATIONS:
        return ("rel", _RELATIONS[word]), 1
    return None, 0


def _read_place(words: list[str], at: int) -> tuple[tuple | None, int]:
    word, after = words[at], words[at + 1] if at + 1 < len(words) else ""
    if word in _ROWS:
        # 'lower right of the square' is a place only if no relation starts at its second word.
        is_corner = after in _SIDES and words[at + 2 : at + 3] != ["of"]
        name = f"{_ROWS[word]} {after}" if is_corner else _ROWS[word]
        return ("at", _CELL_INDEX[name]), 2 if is_corner else 1
    if word in _SIDES:
        return ("at", _CELL_INDEX[word]), 1
    if word in _MIDDLES:
        return ("at", _CELL_INDEX["centre"]), 1
    return None, 0


# ---------------------------------------------------------------- items to claims


def _read_sentence(items: list, mentions: list, relations: list) -> None:
    """Gives every place and relation of one sentence to the object it is said of.

    A place belongs to the object before it, or, where a verb follows ('at the top is a ...'), to
    the one after. A relation belongs to the object before it, after a comma or 'and' to the subject
    of the sentence's last relation ('A is above B and left of C').
    """
    last: _Mention | None = None
    subject: _Mention | None = None  # of the last relation
    fronted: int | None = None  # a place whose object is still to come
    waiting: str | None = None  # a relation whose second object is still to come
    previous = None
    for i, item in enumerate(items):
        if isinstance(item, _Mention):
            mentions.append(item)
            if fronted is not None:
                item.cell, fronted = fronted, None
            if waiting is not None and subject is not None:
                relations.append((subject, waiting, item))
            waiting, last = None, item
        elif item[0] == "at":
            if items[i + 1 : i + 2] == ["is"]:
                if last is not None and previous is last:
                    last.cell = item[1] if last.cell is None else last.cell
                else:
                    fronted = item[1]
            elif last is not None and last.cell is None:
                last.cell = item[1]
        elif item[0] == "rel":
            if subject is None or previous not in _CONJUNCTIONS:
                subject = last
            waiting = item[1]
        previous = item


def _facts(mentions: list[_Mention], relations: list) -> frozenset[Fact]:
    introduced = [m for m in mentions if m.introduced]

    def key(mention: _Mention) -> Key:
        if mention.colour is None:  # 'the circle': the only one, if there is only one
            colours = {m.colour for m in introduced if m.shape == mention.shape}
            return (colours.pop() if len(colours) == 1 else None), mention.shape
        return mention.colour, mention.shape

    facts: set[Fact] = {("at", key(m), m.cell) for m in mentions if m.cell is not None}
    for a, name, b in relations:
        if name in ("right", "below"):
            a, b = b, a
        facts.add(("left" if name in ("left", "right") else "above", key(a), key(b)))
    return frozenset(facts)


def _background(words: list[str]) -> tuple[str, str] | None:
    """The first background colour, and the second where the words lead from one to the other."""
    for i, word in enumerate(words):
        if word in vocab.BACKGROUNDS:
            fades = words[i + 1 : i + 3]
            for j, link in enumerate(fades):
                end = words[i + 2 + j] if i + 2 + j < len(words) else ""
                if link in ("to", "into") and end in vocab.BACKGROUNDS:
                    return word, end
            return word, word
    return None
