"""What a target is asked, from a record of an instruction file, and with which choices.

Every choice (greedy or sampled, suffix kept or dropped) and every draw follows from the run's seed
and the record's id, so it does not depend on order, neighbours or processes.
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from core_jax.data.llava import parse_dialogue
from core_jax.data.sources import Example
from massv_jax.answers import SamplingRecord
from massv_jax.experiment import DistillConfig

Question = tuple[str | None, ...]
_ASKS = ("human", "user")
_UNUSED = "-"  # in the place of an answer that the file lacks; nobody sees it


class NothingToAsk(ValueError):
    """A record has no question; it is skipped and counted."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Instruction:
    """A conversation's questions.

    Attributes:
      id: of the record.
      index: of the record in its source.
      images: names of its images, relative to the source's folder.
      questions: as the target is asked; None for each image.
      dropped: the suffix that each question lost, "" for none.
      system: a system message, or None.
      greedy: whether it is answered greedily.
    """

    id: str
    index: int
    images: tuple[str, ...]
    questions: tuple[Question, ...]
    dropped: tuple[str, ...]
    system: str | None
    greedy: bool

    def num_images(self, turn: int) -> int:
        """Images in the questions up to and including a turn."""
        return sum(part is None for q in self.questions[: turn + 1] for part in q)

    def messages(self, turn: int, answers: Sequence[str]) -> list[dict[str, Any]]:
        """What a chat template takes for a turn, after the target's own answers to those before.

        Args:
          turn: from 0.
          answers: of the turns before, as text: what a server is sent.
        """
        system = [] if self.system is None else [_message("system", [self.system])]
        spoken = []
        for question, answer in zip(self.questions[:turn], answers, strict=True):
            spoken += [_message("user", question), _message("assistant", [answer])]
        return [*system, *spoken, _message("user", self.questions[turn])]


def make_instruction(
    example: Example,
    index: int,
    config: DistillConfig,
    *,
    image_place: Literal["first", "kept"] = "first",
    images_only: bool = False,
) -> Instruction:
    """Reads a record.

    Args:
      example: with `conversations`; answers in them are not looked at and may be missing.
      index: of the record in its source.
      config: see `DistillConfig`.
      image_place: see `parse_dialogue`.
      images_only: the target takes no question (VLV's captioner): the image is all it is asked.

    Raises:
      NothingToAsk: there is no question.
    """
    names = image_names(example)
    greedy = share(config.seed, "greedy", example.id) < config.greedy_fraction
    system: str | None = None
    if images_only:
        if len(names) != 1:
            raise NothingToAsk("no_single_image")
        questions: tuple[Question, ...] = ((None,),)
    else:
        spoken = example.extras.get("conversations") or ()
        dialogue = parse_dialogue(_answered(spoken), len(names), image_place=image_place)
        system, questions = dialogue.system, tuple(t.question for t in dialogue.turns)
    if config.turns == "first":
        questions = questions[:1]
    if not any(part is None or part.strip() for q in questions[:1] for part in q):
        raise NothingToAsk("no_question")
    asked, dropped = [], []
    for turn, question in enumerate(questions):
        kept, suffix = _without_suffix(question, config, f"{turn}/{example.id}")
        asked.append(kept)
        dropped.append(suffix)
    return Instruction(
        id=example.id, index=index, images=names, questions=tuple(asked), dropped=tuple(dropped),
        system=system, greedy=greedy,
    )  # fmt: skip


def image_names(example: Example) -> tuple[str, ...]:
    """Names of a record's images, relative to the source's folder."""
    names = example.extras.get("image_names")
    if names is not None:
        return tuple(names)
    if example.image is None:
        return ()
    if isinstance(example.image, Path):
        root = example.root or example.image.parent
        return (Path(os.path.relpath(example.image, root)).as_posix(),)
    return (example.id,)


def share(seed: int, what: str, key: str) -> float:
    """A number in [0, 1) that follows from seed, choice and id."""
    return int.from_bytes(_digest(seed, what, key)[:8], "big") / 2**64


def draw_seed(seed: int, turn: int, record_id: str) -> int:
    """The row seed of a turn's draws, 32 bits; the position in the answer does the rest."""
    return int.from_bytes(_digest(seed, f"draw{turn}", record_id)[:4], "big")


def sampling_of(config: DistillConfig, greedy: bool) -> SamplingRecord:
    """How such an answer is drawn."""
    if greedy:
        return SamplingRecord(max_new_tokens=config.max_new_tokens)
    return SamplingRecord(
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        max_new_tokens=config.max_new_tokens,
    )  # fmt: skip


def _digest(seed: int, what: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{what}\0{key}".encode()).digest()


def _without_suffix(question: Question, config: DistillConfig, key: str) -> tuple[Question, str]:
    """(question, what it lost); a question that is nothing but a suffix keeps it."""
    last = max((i for i, part in enumerate(question) if part is not None), default=None)
    if last is None:
        return question, ""
    text = str(question[last]).rstrip()
    for suffix in config.suffixes:
        left = text.removesuffix(suffix).rstrip()
        if left == text or not left:
            continue
        if share(config.seed, "suffix", key) >= config.drop_suffix_fraction:
            return question, ""
        return (*question[:last], left, *question[last + 1 :]), suffix
    return question, ""


def _answered(spoken: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The conversation with something in the place of answers that are empty or missing."""
    filled: list[Mapping[str, Any]] = []
    for message in spoken:
        value = message.get("value", message.get("content"))
        empty = not isinstance(value, str) or not value.strip()
        filled.append({**message, "value": _UNUSED} if empty and not _asks(message) else message)
    if filled and _asks(filled[-1]):
        filled.append({"from": "gpt", "value": _UNUSED})
    return filled


def _asks(message: Mapping[str, Any]) -> bool:
    return str(message.get("from", message.get("role", ""))).lower() in _ASKS


def _message(role: str, parts: Sequence[str | None]) -> dict[str, Any]:
    content = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
    return {"role": role, "content": content}
