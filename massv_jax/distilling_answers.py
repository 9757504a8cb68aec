"""A chunk of instructions, answered.

Greedy instructions are answered in batches of their own, since their program is another one. In a
batch each instruction has a fixed slot. One that cannot be answered, or whose conversation has
ended, leaves its slot to a copy of another, whose answer is thrown away, so that every batch of a
run has the same shape.
"""

import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from core_jax.data.images import BadImage, ImageLimits
from core_jax.data.llava import open_images
from core_jax.data.sources import Example, Source
from core_jax.sharding import mesh_of
from massv_jax.answers import AnsweredTurn, AnswerRecord
from massv_jax.distilling_files import Chunk, Problem
from massv_jax.distilling_instructions import (
    Instruction,
    NothingToAsk,
    draw_seed,
    make_instruction,
    sampling_of,
)
from massv_jax.distilling_scores import top_logprobs
from massv_jax.experiment import DistillConfig
from massv_jax.speculative.accept import StopReason
from massv_jax.speculative.decoder import Session, SpeculativeDecoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answerer:
    """Who answers, and how.

    Attributes:
      decoder: its `batch_size` is the number of slots. A drafter changes nothing but the time:
        with accept="coupled" sampled answers are plain sampling's, too.
      config: see `DistillConfig`.
      target: hash of the target's weights.
      image_place: see `parse_dialogue`.
      images_only: see `make_instruction`.
      limits: what an acceptable image is.
      num_threads: of image decoding.
      gamma: drafts of a window, where there is a drafter.
    """

    decoder: SpeculativeDecoder
    config: DistillConfig
    target: str
    image_place: Any = "first"
    images_only: bool = False
    limits: ImageLimits = ImageLimits()
    num_threads: int = 8
    gamma: int = 5


@dataclasses.dataclass
class _Slot:
    """An instruction on its way: its images, its answers so far, what went wrong."""

    instruction: Instruction
    example: Example
    images: list[Image.Image] = dataclasses.field(default_factory=list)
    turns: list[AnsweredTurn] = dataclasses.field(default_factory=list)
    problem: str = ""

    def asks(self, turn: int) -> bool:
        """Whether there is such a turn; after an answer that was cut off none is asked."""
        ended = bool(self.turns) and self.turns[-1].truncated
        return not self.problem and not ended and turn < len(self.instruction.questions)


def answer_chunk(
    answerer: Answerer,
    source: Source,
    number: int,
    indices: Sequence[int],
    *,
    at: Callable[[str], None] = lambda place: None,
) -> Chunk:
    """Answers the instructions at these places of a source.

    `at` is told which batch it is at (`Watchdog.at`).
    """
    slots, skipped, ids = [], [], []
    for index in indices:
        example = source[index]
        ids.append(example.id)
        try:
            instruction = make_instruction(
                example, index, answerer.config, image_place=answerer.image_place,
                images_only=answerer.images_only,
            )  # fmt: skip
        except NothingToAsk as nothing:
            skipped.append(Problem(id=example.id, index=index, reason=str(nothing)))
        else:
            slots.append(_Slot(instruction, example))
    batches = _batches(slots, answerer.decoder.batch_size or len(slots) or 1)
    with concurrent.futures.ThreadPoolExecutor(answerer.num_threads) as pool:
        waiting = [pool.map(_opener(answerer), batch) for batch in batches[:1]]
        for i, batch in enumerate(batches):
            at(f"batch {i} of chunk {number}")
            _set_images(batch, waiting.pop())
            if i + 1 < len(batches):  # the next images are decoded meanwhile
                waiting.append(pool.map(_opener(answerer), batches[i + 1]))
            _answer_batch(answerer, batch)
            for slot in batch:
                slot.images = []
    answered = [slot for slot in slots if slot.turns]
    failed = [
        Problem(id=s.instruction.id, index=s.instruction.index, reason=s.problem)
        for s in slots
        if not s.turns
    ]
    return Chunk(
        number=number, ids=tuple(ids),
        lines=tuple(_record(answerer, slot).to_json() for slot in answered),
        failed=tuple(failed), skipped=tuple(skipped), counts=_counts(answered),
    )  # fmt: skip


def _batches(slots: Sequence[_Slot], size: int) -> list[list[_Slot]]:
    """Greedy and sampled ones apart, and text apart from images as far as it goes."""
    found = []
    for greedy in (True, False):
        some = [s for s in slots if s.instruction.greedy == greedy]
        some.sort(key=lambda s: not s.instruction.images)
        found += [some[i : i + size] for i in range(0, len(some), size)]
    return found


def _opener(answerer: Answerer) -> Any:
    def opened(slot: _Slot) -> list[Image.Image] | str:
        try:
            return open_images(slot.example, answerer.limits)
        except BadImage as error:
            return f"image_{error.reason}"

    return opened


def _set_images(batch: Sequence[_Slot], found: Any) -> None:
    for slot, images in zip(batch, found, strict=True):
        if isinstance(images, str):
            slot.problem = images
        else:
            slot.images = images


def _answer_batch(answerer: Answerer, batch: Sequence[_Slot]) -> None:
    """Asks turn by turn; answers and problems go into the slots."""
    for turn in range(max(len(s.instruction.questions) for s in batch)):
        session = _begin(answerer, batch, turn)
        if session is None:
            return
        session.advance(session.program.options.max_gamma)
        _read(answerer, batch, turn, session)


def _begin(answerer: Answerer, batch: Sequence[_Slot], turn: int) -> Session | None:
    """The batch at a turn; None if nobody has a question left."""
    try:
        return _try(answerer, batch, turn)
    except _prompt_errors():  # of one row or more; it is found before anything is computed
        wrong = False
        for slot in batch:
            if slot.asks(turn) and (reason := _refusal(answerer, slot, turn)):
                slot.problem, wrong = reason, True
        if not wrong:
            raise
    return _try(answerer, batch, turn)


def _try(answerer: Answerer, batch: Sequence[_Slot], turn: int) -> Session | None:
    asking = [slot for slot in batch if slot.asks(turn)]
    if not asking:
        return None
    rows = [slot if slot.asks(turn) else asking[0] for slot in batch]
    config = answerer.config
    sampling = sampling_of(config, rows[0].instruction.greedy)
    return answerer.decoder.begin(
        [_images(slot, turn) for slot in rows],
        [_prompt(answerer, slot, turn) for slot in rows],
        max_new_tokens=sampling.max_new_tokens, temperature=sampling.temperature,
        top_k=sampling.top_k, top_p=sampling.top_p, max_gamma=answerer.gamma, seed=config.seed,
        row_seeds=[draw_seed(config.seed, turn, slot.instruction.id) for slot in rows],
    )  # fmt: skip


def _images(slot: _Slot, turn: int) -> list[Image.Image]:
    return slot.images[: slot.instruction.num_images(turn)]


def _prompt(answerer: Answerer, slot: _Slot, turn: int) -> Any:
    if answerer.images_only:
        return ""
    return slot.instruction.messages(turn, [t.text for t in slot.turns])


def _refusal(answerer: Answerer, slot: _Slot, turn: int) -> str:
    """Why a prompt cannot be asked; "" if it can."""
    options = {"max_new_tokens": answerer.config.max_new_tokens}
    try:
        prompt = _prompt(answerer, slot, turn)
        answerer.decoder.check([_images(slot, turn)], [prompt], options)
    except _prompt_errors() as error:
        return f"prompt: {error}"
    return ""


def _prompt_errors() -> tuple[type[Exception], ...]:
    import jinja2

    return ValueError, jinja2.TemplateError


def _read(answerer: Answerer, batch: Sequence[_Slot], turn: int, session: Session) -> None:
    """Puts a session's answers into the slots that asked."""
    tokens, lengths = session.tokens()
    ended = np.asarray(session.state.reason)[: len(batch)] == StopReason.END_TOKEN
    tops = None
    if k := answerer.config.store_top_k:
        with mesh_of(session.params):
            tops = top_logprobs(
                session.program.decoder, session.params.target, session.request.prompt,
                session.request.images, session.state.tokens, k=k,
            )  # fmt: skip
        tops = tuple(np.asarray(x)[: len(batch)] for x in tops)
    tokenizer = answerer.decoder.target.tokenizer
    for i, slot in enumerate(batch):
        if not slot.asks(turn):
            continue
        ids = tokens[i, : lengths[i]].tolist()
        top_ids: tuple = ()
        top_logs: tuple = ()
        if tops is not None:
            top_ids = tuple(map(tuple, tops[0][i, : len(ids)].tolist()))
            rounded = np.round(tops[1][i, : len(ids)].astype(np.float64), 5)
            top_logs = tuple(map(tuple, rounded.tolist()))
        slot.turns.append(
            AnsweredTurn(
                question=slot.instruction.questions[turn],
                answer_ids=tuple(ids),
                finish_reason="stop" if ended[i] else "length",
                text=tokenizer.decode(ids, skip_special_tokens=True).strip(),
                dropped_suffix=slot.instruction.dropped[turn],
                top_ids=top_ids,
                top_logprobs=top_logs,
            )
        )


def _record(answerer: Answerer, slot: _Slot) -> AnswerRecord:
    instruction, config = slot.instruction, answerer.config
    return AnswerRecord(
        id=instruction.id,
        images=instruction.images,
        turns=tuple(slot.turns),
        sampling=sampling_of(config, instruction.greedy),
        seed=draw_seed(config.seed, 0, instruction.id),
        target=answerer.target,
        system=instruction.system,
        index=instruction.index,
        on_policy=config.on_policy,
    )


def _counts(slots: Sequence[_Slot]) -> Mapping[str, int]:
    counts: collections.Counter[str] = collections.Counter()
    for slot in slots:
        turns = slot.turns
        counts["greedy"] += slot.instruction.greedy
        counts["sampled"] += not slot.instruction.greedy
        counts["turns"] += len(turns)
        counts["turns_not_asked"] += len(slot.instruction.questions) - len(turns)
        counts["truncated"] += sum(t.truncated for t in turns)
        counts["suffixes_dropped"] += sum(bool(t.dropped_suffix) for t in turns)
        counts["tokens"] += sum(len(t.answer_ids) for t in turns)
    return {name: int(n) for name, n in sorted(counts.items())}
