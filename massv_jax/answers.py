"""What a target answered, on disk: what `massv_jax.distill` writes and phase 2 reads.

A folder of `answers*.jsonl` files, one record a line, keys sorted, and `manifest.json`. Answers are
token ids, the very ones that the target chose; the text beside them is for people. docs/massv.md
lists the fields.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from core_jax.data.llava import Turn
from core_jax.data.llava_tokens import Answer
from core_jax.data.sources import (
    Example,
    SourceError,
    checked_relative,
    clean_text,
    list_files,
)

FORMAT = 1
MANIFEST = "manifest.json"
FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingRecord:
    """How an answer was drawn.

    Attributes:
      temperature: 0 is greedy.
      top_k: 0 is no limit.
      top_p: 1 is no limit.
      max_new_tokens: where answers are cut off.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnsweredTurn:
    """One question and the target's answer.

    Attributes:
      question: texts, and null for each image, in order, as the target was asked.
      answer_ids: tokens of the answer, the end token included where there is one.
      finish_reason: "stop" where the last token is an end token, "length" where it was cut off.
      text: the answer, for people.
      dropped_suffix: what was left out of the question's end ("Answer the question using a single
        word or phrase."); "" for nothing.
      top_ids, top_logprobs: for each token of the answer the target's k most likely tokens and
        their log probabilities (unwarped), where they were asked for; else empty.
    """

    question: tuple[str | None, ...]
    answer_ids: tuple[int, ...]
    finish_reason: FinishReason
    text: str = ""
    dropped_suffix: str = ""
    top_ids: tuple[tuple[int, ...], ...] = ()
    top_logprobs: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self):
        if not self.answer_ids:
            raise ValueError("an answer has at least one token")
        lengths = {len(self.top_ids), len(self.top_logprobs)} - {0}
        if lengths and lengths != {len(self.answer_ids)}:
            raise ValueError(f"top tokens for {lengths} of {len(self.answer_ids)} answer tokens")

    @property
    def truncated(self) -> bool:
        """Whether the answer has no end."""
        return self.finish_reason == "length"

    def answer(self) -> Answer:
        """As it is learned: an end only where the target gave one."""
        if self.truncated:
            return Answer(self.answer_ids, None)
        return Answer(self.answer_ids[:-1], self.answer_ids[-1])

    def turn(self) -> Turn:
        """The question, for a chat template."""
        return Turn(self.question, self.text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """A conversation with a target.

    Attributes:
      id: of the instruction it answers, unique in the set.
      images: names of its images, relative to the set's folder of images.
      turns: in order; each was asked with the target's own earlier answers before it.
      sampling: see `SamplingRecord`.
      seed: of this record's draws, from the run's seed and the id.
      target: hash of the target's weights (massv_jax.binding).
      system: a system message, or None.
      index: position in the instruction file.
      on_policy: the tokens are a drafter's, with one of the target's after each window.
    """

    id: str
    images: tuple[str, ...]
    turns: tuple[AnsweredTurn, ...]
    sampling: SamplingRecord
    seed: int
    target: str
    system: str | None = None
    index: int = 0
    on_policy: bool = False
    format: int = FORMAT

    def to_json(self) -> str:
        r"""One line of valid Unicode, byte for byte the same for the same record.

        What is no Unicode in an image's name gets JSON's own escapes (`\udce9`), so that the name
        is read back as it was.
        """
        return clean_text(
            json.dumps(
                dataclasses.asdict(self), sort_keys=True, ensure_ascii=False, separators=(",", ":")
            )
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "AnswerRecord":
        """Reads a line's content.

        Raises:
          ValueError: a field is unknown, missing, or not what it should be.
        """
        turns = tuple(_from(AnsweredTurn, turn) for turn in content.get("turns", ()))
        sampling = _from(SamplingRecord, content.get("sampling", {}))
        return _from(cls, {**content, "turns": turns, "sampling": sampling})


def _from(cls: Any, content: Mapping[str, Any]) -> Any:
    """A dataclass of a JSON object, lists as tuples (there are millions: no type by type check)."""
    try:
        return cls(**{k: _tuples(v) for k, v in content.items()})
    except TypeError as error:
        raise ValueError(f"{cls.__name__}: {error}") from error


def _tuples(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return tuple(map(_tuples, value)) if value and isinstance(value[0], list) else tuple(value)


class AnswerSource:
    """The records of a folder, as examples whose `extras["record"]` is an `AnswerRecord`.

    Only places and image names are held in memory; a record is read when it is asked for.

    Args:
      path: the folder, or one file.
      images: folder that image names are relative to.
      target: the target's hash that every record must have; None takes any.
      labels: whether the answers' tokens are learned as they are.

    Raises:
      SourceError: no record, one of another format or target, a path that leads out of `images`,
        or tokens of a drafter that are to be learned as labels.
    """

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        images: str,
        target: str | None = None,
        labels: bool = False,
    ):
        self.root = pathlib.Path(images)
        self._files = list_files(pathlib.Path(path), ".jsonl")
        self._places: list[tuple[int, int]] = []  # file, byte
        self._names: list[tuple[str, ...]] = []
        for number, file in enumerate(self._files):
            start = 0
            with file.open("rb") as lines:
                for line_number, line in enumerate(lines, 1):
                    if line.strip():
                        where = f"{file}:{line_number}"
                        self._places.append((number, start))
                        self._names.append(_checked_names(line, where, self.root, target, labels))
                    start += len(line)
        if not self._places:
            raise SourceError(f"{path} has no answers; run python -m massv_jax.distill first")

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, start = self._places[index]
        with self._files[number].open("rb") as lines:
            lines.seek(start)
            content = json.loads(lines.readline())
        try:
            record = AnswerRecord.from_json(content)
        except ValueError as error:
            raise SourceError(f"{self._files[number]}, byte {start}: {error}") from error
        image = self.root / record.images[0] if record.images else None
        extras = {
            "record": record, "image_names": list(record.images), "image_root": str(self.root),
        }  # fmt: skip
        return Example(record.id, image, record.turns[0].text, extras, self.root)

    def image_names(self, index: int) -> Sequence[str]:
        """The images of a record."""
        return self._names[index]


def _checked_names(
    line: bytes, where: str, root: pathlib.Path, target: str | None, labels: bool
) -> tuple[str, ...]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise SourceError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise SourceError(f"{where}: format {found!r:.20}, this version reads {FORMAT}")
    if not content.get("turns"):
        raise SourceError(f"{where}: a record has at least one turn")
    if target is not None and content.get("target") != target:
        raise SourceError(
            f"{where}: answered by the target {str(content.get('target'))[:12]}..., and the "
            f"drafter is made for {target[:12]}...; distil again with this target"
        )
    if labels and content.get("on_policy"):
        raise SourceError(
            f"{where}: written by a drafter (distill.on_policy), so its tokens are no labels; set "
            "loss.ce=0 and, with loss.teacher='target', loss.tv, loss.kl or loss.log_acceptance"
        )
    return tuple(checked_relative(name, root, where) for name in content.get("images", ()))
