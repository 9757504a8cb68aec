r"""LLaVA-format instruction files, with what is odd about the released ones.

A file is a JSON list (or JSONL) of `{"id", "image", "conversations": [{"from": "human", "value":
"<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]}`. Released files have samples without
an image, `<image>` before or after the question, conversations that begin with an answer, that end
with a question or repeat a speaker, empty answers, and paths to images that are not there.
`parse_dialogue` has one defined fate for each; docs/massv.md has the table.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from core_jax.data.images import ImageLimits, decode_image
from core_jax.data.sources import (
    Example,
    SourceError,
    checked_relative,
    clean_text,
    read_json,
    read_jsonl,
    unique_ids,
)

PLACE = "<image>"
ImagePlace = Literal["first", "kept"]
_QUESTIONS, _ANSWERS = ("human", "user"), ("gpt", "assistant", "model")


class Fault(enum.StrEnum):
    """What was odd about a conversation, and mended: the whole vocabulary."""

    LEADING_ANSWER = "leading_answer"  # an answer before any question: left out
    REPEATED_QUESTION = "repeated_question"  # joined with the one before
    REPEATED_ANSWER = "repeated_answer"  # the conversation ends before it
    UNANSWERED = "unanswered"  # the last question has no answer: left out
    EMPTY_QUESTION = "empty_question"  # neither text nor image: the conversation ends before it
    EMPTY_ANSWER = "empty_answer"  # the conversation ends before it
    UNKNOWN_SPEAKER = "unknown_speaker"  # the conversation ends before it
    NO_PLACE = "no_place"  # images without `<image>`: put before the first question
    NO_IMAGE = "no_image"  # `<image>` without an image: it stays as text
    MORE_PLACES = "more_places"  # `<image>` more often than images: the rest is left out


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question and its answer.

    Attributes:
      question: texts, and None for each image, in order.
      answer: the data set's.
    """

    question: tuple[str | None, ...]
    answer: str

    def message(self) -> dict[str, Any]:
        """The question as chat templates take it."""
        content = [
            {"type": "image"} if part is None else {"type": "text", "text": part}
            for part in self.question
        ]
        return {"role": "user", "content": content}


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """A conversation after mending.

    Attributes:
      turns: questions with answers, maybe none.
      system: a system message, or None.
      faults: what was mended.
    """

    turns: tuple[Turn, ...]
    system: str | None = None
    faults: tuple[Fault, ...] = ()


def parse_dialogue(
    conversations: Sequence[Mapping[str, Any]],
    num_images: int,
    *,
    image_place: ImagePlace = "first",
) -> Dialogue:
    """Reads a conversation; see `Fault` for what is mended.

    Args:
      conversations: {"from", "value"} (or {"role", "content"}) of each message.
      num_images: how many images the sample has.
      image_place: "first" puts a question's images before its text, as LLaVA's training code
        does; "kept" leaves them where `<image>` stands.
    """
    faults: list[Fault] = []
    system, pairs = _pairs(conversations, faults)
    pairs = _without_empty(pairs, num_images, faults)
    questions = _place_images([q for q, _ in pairs], num_images, faults)
    turns = tuple(
        Turn(_tidy(parts, image_place), answer)
        for parts, (_, answer) in zip(questions, pairs, strict=True)
    )
    return Dialogue(turns, system, tuple(dict.fromkeys(faults)))


def _pairs(
    conversations: Sequence[Mapping[str, Any]], faults: list[Fault]
) -> tuple[str | None, list[tuple[str, str]]]:
    """(system message, [(question, answer)])."""
    system: str | None = None
    question: str | None = None
    pairs: list[tuple[str, str]] = []
    for message in conversations:
        speaker = str(message.get("from", message.get("role", ""))).lower()
        value = message.get("value", message.get("content"))
        text = value.strip() if isinstance(value, str) else ""
        if speaker == "system" and not pairs and question is None:
            system = text or None
        elif speaker in _QUESTIONS:
            if question is not None:
                faults.append(Fault.REPEATED_QUESTION)
                text = f"{question}\n{text}"
            question = text
        elif speaker not in _ANSWERS:
            faults.append(Fault.UNKNOWN_SPEAKER)
            return system, pairs
        elif question is None:
            if pairs:
                faults.append(Fault.REPEATED_ANSWER)
                return system, pairs
            faults.append(Fault.LEADING_ANSWER)
        elif not text:
            faults.append(Fault.EMPTY_ANSWER)
            return system, pairs
        else:
            pairs.append((question, text))
            question = None
    if question is not None:
        faults.append(Fault.UNANSWERED)
    return system, pairs


def _without_empty(
    pairs: list[tuple[str, str]], num_images: int, faults: list[Fault]
) -> list[tuple[str, str]]:
    """The pairs before the first question with neither text nor image."""
    # Images without a place go to the first question.
    shown_first = sum(question.count(PLACE) for question, _ in pairs) < num_images
    for number, (question, _) in enumerate(pairs):
        if not question.strip() and not (number == 0 and shown_first):
            faults.append(Fault.EMPTY_QUESTION)
            return pairs[:number]
    return pairs


def _place_images(
    questions: list[str], num_images: int, faults: list[Fault]
) -> list[list[str | None]]:
    """Texts and images (None) of each question."""
    if not questions:
        return []
    if num_images == 0:
        if any(PLACE in q for q in questions):
            faults.append(Fault.NO_IMAGE)
        return [[q] for q in questions]
    left, placed = num_images, []
    for question in questions:
        first, *rest = question.split(PLACE)
        parts: list[str | None] = [first]
        for text in rest:
            if left:
                parts.append(None)
                left -= 1
            else:
                faults.append(Fault.MORE_PLACES)
            parts.append(text)
        placed.append(parts)
    if left:
        faults.append(Fault.NO_PLACE)
        placed[0] = [*[None] * left, *placed[0]]
    return placed


def _tidy(parts: list[str | None], image_place: ImagePlace) -> tuple[str | None, ...]:
    """Without the line breaks around `<image>` and without empty texts."""
    several = len(parts) > 1
    stripped = [p if p is None else p.strip() if several else p for p in parts]
    kept = [p for p in stripped if p is None or p]
    if image_place == "first":
        texts = [p for p in kept if p is not None]
        kept = [None] * (len(kept) - len(texts)) + (["\n".join(texts)] if texts else [])
    return tuple(kept)


def image_names(record: Mapping[str, Any]) -> list[str]:
    """The images that a record names: none, one, or a list of them.

    Raises:
        SourceError: It names them by something else.
    """
    one, several = record.get("image"), record.get("images")
    found = several if one is None or one == "" else one
    if found is None or found == "":
        return []
    if isinstance(found, str):
        return [found]
    if not isinstance(found, list):
        raise SourceError(f"an image is a path or a list of paths, not {found!r:.60}")
    return found


class LlavaSource:
    """A LLaVA-format file; `extras` has `conversations` and `image_names`.

    `image` of an example is its first image's path (None for text), so that broken paths are
    refused and counted as any other source's; see `open_images` for all of them.

    Args:
        path: The .json list or .jsonl file.
        images: Folder that image paths are relative to; the file's own where None.
        follow_symlinks: Accept links that lead out of the folder.

    Raises:
        SourceError: Not such a file, or records without conversations or with paths that lead out
            of the folder (the first of them are listed).
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        images: str | os.PathLike | None = None,
        follow_symlinks: bool = False,
    ):
        path = Path(path)
        self.root = Path(images) if images is not None else path.parent
        self._check_links = not follow_symlinks
        self._records = _read_records(path)
        self._names: list[list[str]] = []
        problems = []
        for number, record in enumerate(self._records):
            try:
                self._names.append(_checked(record, self.root, f"{path}: record {number}"))
            except SourceError as error:
                problems.append(str(error))
        if problems:
            more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise SourceError("; ".join(problems[:5]) + more)
        if not self._records:
            raise SourceError(f"{path}: no record")
        declared = (str(r.get("id", number)) for number, r in enumerate(self._records))
        self._ids = unique_ids(map(clean_text, declared))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        record, names = self._records[index], self._names[index]
        answers = [
            m.get("value", m.get("content")) for m in record["conversations"] if _is_answer(m)
        ]
        caption = answers[0] if answers and isinstance(answers[0], str) else None
        extras = {
            **{k: v for k, v in record.items() if k not in ("id", "image", "images")},
            "image_names": names,
            "image_root": str(self.root),
        }
        root = self.root if self._check_links else None
        image = self.root / names[0] if names else None
        return Example(self._ids[index], image, caption, extras, root)

    def image_names(self, index: int) -> Sequence[str]:
        """The images of an example, without reading anything."""
        return self._names[index]


def open_images(example: Example, limits: ImageLimits | None = None) -> list[Image.Image]:
    """All images of an example, decoded; none of one that names none.

    Raises:
        BadImage: one of them is missing or cannot be used.
    """
    if example.image is None:
        return []
    opened = [decode_image(example.encoded_image(limits), limits)]
    for name in example.extras.get("image_names", ())[1:]:
        if not isinstance(example.image, Path):
            raise ValueError(f"{example.id}: several images need a source of files")
        other = dataclasses.replace(example, image=Path(example.extras["image_root"]) / name)
        opened.append(decode_image(other.encoded_image(limits), limits))
    return opened


def _is_answer(message: Mapping[str, Any]) -> bool:
    return str(message.get("from", message.get("role", ""))).lower() in _ANSWERS


def _read_records(path: Path) -> list[Mapping[str, Any]]:
    if path.suffix.lower() == ".jsonl":
        return [record for _, record in read_jsonl(path)]
    content = read_json(path)
    if not isinstance(content, list):
        kind = type(content).__name__
        raise SourceError(f"{path}: a LLaVA file is a list of records, not {kind}")
    return content


def _checked(record: Any, root: Path, where: str) -> list[str]:
    if not isinstance(record, Mapping):
        raise SourceError(f"{where} is an object, not {record!r:.60}")
    spoken = record.get("conversations")
    if not isinstance(spoken, Iterable) or isinstance(spoken, str | bytes):
        raise SourceError(f"{where} has no `conversations` (a list of from and value)")
    if not all(isinstance(m, Mapping) for m in spoken):
        raise SourceError(f"{where}: a message is an object with `from` and `value`")
    try:
        names = image_names(record)
    except SourceError as error:
        raise SourceError(f"{where}: {error}") from None
    return [checked_relative(name, root, where) for name in names]
