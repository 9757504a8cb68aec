"""Does the drafter look? Its acceptance with the true image, a blank one, another one, and none.

The target sees the true image throughout, so its answers stay the same; only what the drafter is
shown changes. Blank and other images have the true one's size, so that prompts stay the same, too.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from PIL import Image

from core_jax.decode.target import Target, TargetInputs
from core_jax.gathering import in_turns, own_share
from core_jax.sharding import mesh_of
from massv_jax.evaluation.acceptance import Measured
from massv_jax.evaluation.prompts import Question
from massv_jax.experiment import DecodingConfig
from massv_jax.speculative.decoder import SpeculativeDecoder
from massv_jax.speculative.drafting import NetworkProposer

Shown = Literal["true", "blank", "other", "none"]
SHOWN: tuple[Shown, ...] = ("true", "blank", "other", "none")
GREY = (128, 128, 128)


@dataclasses.dataclass(frozen=True)
class _OwnEyes:
    """A proposer that is shown other images than the target; its prompt has their states."""

    inner: NetworkProposer

    @property
    def vocab_size(self) -> int:
        return self.inner.vocab_size

    def begin(self, params: Any, prompt: Any, vision: Any, **room: int) -> Any:
        del vision
        own, seen = prompt
        return self.inner.begin(params, own, seen, **room)

    def propose(self, *args: Any) -> Any:
        return self.inner.propose(*args)

    def rewind(self, *args: Any) -> Any:
        return self.inner.rewind(*args)


@dataclasses.dataclass(frozen=True)
class _ShownDrafter:
    """A drafter of one batch, with what it is shown in place of the target's inputs."""

    inner: Any
    inputs: TargetInputs
    vision: Any

    params = property(lambda self: self.inner.params)
    tokenizer = None  # compared once, when the inner one was made

    @property
    def proposer(self) -> _OwnEyes:
        return _OwnEyes(self.inner.proposer)

    def prepare(self, inputs: TargetInputs, target: Target, lengths: Any) -> Any:
        del inputs
        return self.inner.prepare(self.inputs, target, lengths), self.vision


def can_look(decoder: SpeculativeDecoder) -> bool:
    """Whether the drafter reads images at all."""
    drafter = decoder.drafter
    return (
        drafter is not None
        and isinstance(drafter.proposer, NetworkProposer)
        and drafter.proposer.sees_images
    )


def measure_shown(
    decoder: SpeculativeDecoder,
    questions: Sequence[Question],
    decoding: DecodingConfig,
    *,
    shown: Shown,
    temperature: float,
    gamma: int,
    batch_size: int,
) -> Measured:
    """Acceptance of a drafter that is shown something.

    Args:
      decoder: whose drafter can look.
      questions: with an image each.
      decoding: limits and seed.
      shown: "other" is the next question's image.
      temperature: 0 is greedy.
      gamma: drafts of a window.
      batch_size: rows at a time.

    Raises:
      ValueError: the target takes no prompt without an image ("none").
    """

    def answer(first: int) -> Measured:
        at = np.minimum(np.arange(first, first + batch_size), len(questions) - 1)
        rows = [questions[i] for i in at]
        seen = [_shown_to(questions, int(i), shown) for i in at]
        drafter = _shown_drafter(decoder, seen, decoding)
        session = dataclasses.replace(decoder, drafter=drafter, batch_size=None).begin(
            [list(q.images) for q in rows], [q.prompt for q in rows],
            max_new_tokens=decoding.max_new_tokens, temperature=temperature,
            top_k=decoding.top_k, top_p=decoding.top_p, max_gamma=gamma, seed=decoding.seed,
            row_seeds=at.tolist(),
        )  # fmt: skip
        session.advance(gamma)
        tokens, lengths = session.tokens()
        count = min(batch_size, len(questions) - first)
        return Measured(tokens, lengths, session.statistics()).rows(range(count))

    starts = range(0, len(questions), batch_size)
    return Measured.concatenate(in_turns(own_share(starts), len(starts), answer))


def _shown_to(questions: Sequence[Question], i: int, shown: Shown) -> Question:
    """The question as the drafter is asked it."""
    question = questions[i]
    if shown == "true":
        return question
    if shown == "none":
        return dataclasses.replace(question, images=(), prompt=_without_images(question.prompt))
    if shown == "blank":
        images = tuple(Image.new("RGB", image.size, GREY) for image in question.images)
        return dataclasses.replace(question, images=images)
    others = _next_with_images(questions, i).images
    images = tuple(
        others[n % len(others)].convert("RGB").resize(image.size, Image.Resampling.BICUBIC)
        for n, image in enumerate(question.images)
    )
    return dataclasses.replace(question, images=images)


def _next_with_images(questions: Sequence[Question], i: int) -> Question:
    for step in range(1, len(questions)):
        other = questions[(i + step) % len(questions)]
        if other.images and _pixels(other) != _pixels(questions[i]):
            return other
    raise ValueError("all questions show the same image; there is no other one to swap in")


def _pixels(question: Question) -> bytes:
    return b"".join(image.tobytes() for image in question.images)


def _without_images(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    return [
        {**message, "content": [p for p in message["content"] if p.get("type") != "image"]}
        for message in prompt
    ]


def _shown_drafter(
    decoder: SpeculativeDecoder, seen: Sequence[Question], decoding: DecodingConfig
) -> _ShownDrafter:
    target = decoder.target
    lengths = decoder.allowed_lengths(decoding.max_new_tokens)
    # Another question's image may take more tokens than the true one.
    lengths.append(max(*lengths, target.max_positions - decoding.max_new_tokens))
    texts = [target.frontend.render(q.prompt, len(q.images)) for q in seen]
    inputs = target.frontend.prepare(texts, [list(q.images) for q in seen], lengths=lengths)
    vision = None
    if inputs.images is not None:
        with mesh_of(target.params):
            vision = _encode(target.decoder, target.params, inputs.images)
    return _ShownDrafter(decoder.drafter, inputs, vision)


@functools.partial(jax.jit, static_argnames=("decoder",))
def _encode(decoder: Any, params: Any, images: Any) -> Any:
    return decoder.encode_images(params, images)


def look(
    decoder: SpeculativeDecoder,
    questions: Sequence[Question],
    decoding: DecodingConfig,
    **options: Any,
) -> Mapping[Shown, Measured]:
    """`measure_shown` of everything that can be shown; questions without an image are left out."""
    with_images = [q for q in questions if q.images]
    found: dict[Shown, Measured] = {}
    for shown in SHOWN:
        try:
            found[shown] = measure_shown(decoder, with_images, decoding, shown=shown, **options)
        except ValueError:
            if shown != "none":
                raise
    return found
