"""What a round costs, part by part: the loop's own functions, timed one at a time.

Vision and prefill are calls of their own. Drafting, verification and whole rounds are timed inside
compiled loops of many, as they run in a decoder: their caches stay where they are, and no call is
paid for. Every number is the median of a few repetitions after a first one that compiles.
"""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from core_jax.decode.target import Prompt
from core_jax.sharding import mesh_of
from massv_jax.speculative.decoder import RequestError, SpeculativeDecoder
from massv_jax.speculative.loop import (
    LoopState,
    Params,
    Program,
    Request,
    judge,
    make_drafts,
    run_round,
)


@dataclasses.dataclass(frozen=True)
class Profile:
    """Seconds.

    Attributes:
      gamma: drafts of a window.
      vision: the target's tower, for the whole batch; 0 without images.
      target_prefill, drafter_prefill: the prompts, up to the first token's logits.
      draft: a window of drafts.
      verify: the target's pass over it, and the verdict.
      round: both in the loop, with all that belongs to it.
      step: a step of plain decoding, in the same loop.
    """

    gamma: int
    vision: float
    target_prefill: float
    drafter_prefill: float
    draft: float
    verify: float
    round: float
    step: float

    @property
    def overhead(self) -> float:
        """What the loop adds to drafting and verifying, as a share of them."""
        return self.round / (self.draft + self.verify) - 1

    def predicted_speedup(self, emitted_length: float) -> float:
        """Over plain decoding, prefill left out, at so many tokens a round (tau).

        tau / (gamma c + v), with c a draft step's cost in plain steps and v a verification's.
        """
        return emitted_length * self.step / (self.draft + self.verify)

    def summary(self) -> dict[str, float]:
        """For JSON: milliseconds, and costs in plain steps."""
        fields = {f"{k}_ms": 1e3 * v for k, v in dataclasses.asdict(self).items() if k != "gamma"}
        return {
            "gamma": self.gamma, **fields, "draft_in_steps": self.draft / self.step,
            "verify_in_steps": self.verify / self.step, "overhead": self.overhead,
        }  # fmt: skip


def profile(
    decoder: SpeculativeDecoder,
    images: Sequence[Any] | None,
    prompts: Sequence[Prompt],
    *,
    gamma: int = 5,
    rounds: int = 32,
    repeats: int = 5,
    temperature: float = 0.0,
    max_new_tokens: int = 0,
) -> Profile:
    """Times a decoder with a drafter on one batch.

    Args:
      decoder: with a drafter.
      images: see `SpeculativeDecoder.generate`.
      prompts: see there.
      gamma: drafts of a window.
      rounds: of a timed loop. Every round stands at the answer's first token, so costs are those of
        a cache that holds prompt and answer, whose other slots are masked.
      repeats: of each measurement.
      temperature: 0 or not changes what is compiled.
      max_new_tokens: that caches have room for, where it is more than the timed rounds need.

    Raises:
      RequestError: the decoder has no drafter.
    """
    if decoder.drafter is None:
        raise RequestError("a profile needs a drafter: it times drafting and verifying")
    endless = dataclasses.replace(decoder.target, eos_ids=())  # a row that ends costs less
    decoder = dataclasses.replace(decoder, target=endless)
    room = max(rounds + gamma + 2, max_new_tokens)
    options: dict[str, Any] = {"max_new_tokens": room, "temperature": temperature}
    session = decoder.begin(images, prompts, max_gamma=gamma, **options)
    plain = dataclasses.replace(decoder, drafter=None).begin(images, prompts, **options)
    program, params = session.program, session.params
    request = session.request
    with mesh_of(params):
        time_call = functools.partial(_median, repeats)
        vision, seen = time_call(_vision, program, params, request)
        prefill, _ = time_call(_prefill, program, params, request, seen)
        drafter_prefill, _ = time_call(_drafter_prefill, program, params, request, seen)

        def loop(part: str, what: Program, weights: Params, state: LoopState, g: int) -> float:
            spent, _ = time_call(_repeat, what, weights, state, part, g, jnp.int32(rounds))
            nothing, _ = time_call(_repeat, what, weights, state, part, g, jnp.int32(0))
            return max(spent - nothing, 1e-9) / rounds

        return Profile(
            gamma=gamma,
            vision=vision if request.images is not None else 0.0,
            target_prefill=prefill,
            drafter_prefill=drafter_prefill,
            draft=loop("draft", program, params, session.state, gamma),
            verify=loop("verify", program, params, session.state, gamma),
            round=loop("round", program, params, session.state, gamma),
            step=loop("round", plain.program, plain.params, plain.state, 0),
        )


@functools.partial(jax.jit, static_argnames=("program",))
def _vision(program: Program, params: Params, request: Request) -> Any:
    if request.images is None:
        return None
    return program.decoder.encode_images(params.target, request.images)


@functools.partial(jax.jit, static_argnames=("program",))
def _prefill(program: Program, params: Params, request: Request, vision: Any) -> Any:
    o = program.options
    return program.decoder.begin(
        params.target, request.prompt, vision, max_new_tokens=o.max_new_tokens, window=o.max_gamma
    )


@functools.partial(jax.jit, static_argnames=("program",))
def _drafter_prefill(program: Program, params: Params, request: Request, vision: Any) -> Any:
    o, proposer = program.options, program.proposer
    assert proposer is not None
    return proposer.begin(
        params.drafter, request.draft_prompt, vision, max_new_tokens=o.max_new_tokens,
        window=o.max_gamma,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnames=("program", "part", "gamma"))
def _repeat(
    program: Program, params: Params, state: LoopState, part: str, gamma: int,
    times: Int[Array, ""],
) -> Array:  # fmt: skip
    """Runs one part so often; rows neither advance nor end, whatever the tokens are."""
    none = jnp.zeros_like(state.lengths)

    def draft(state: LoopState) -> LoopState:
        assert program.proposer is not None
        proposal, after = make_drafts(program, params, state, gamma)
        # The next window starts from a draft, so that none can be computed once for all.
        drafter = program.proposer.rewind(state.drafter, after, none)
        return state.replace(drafter=drafter, last=proposal.drafts[:, -1])  # type: ignore[attr-defined]

    def verify(state: LoopState) -> LoopState:
        window = jnp.tile(state.last[:, None], (1, gamma + 1))
        logits, target = program.decoder.extend(params.target, state.target, window)
        proposal, _ = jax.eval_shape(lambda: make_drafts(program, params, state, gamma))
        fake = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), proposal)
        verdict = judge(program.options, fake, logits, none, state.keys, state.lengths)
        target = program.decoder.rewind(target, program.decoder.ends(state.target))
        return state.replace(target=target, last=verdict.token)  # type: ignore[attr-defined]

    def whole(state: LoopState) -> LoopState:
        after = run_round(program, params, state, gamma)
        if not program.options.max_gamma:
            return after.replace(  # type: ignore[attr-defined]
                lengths=state.lengths, reason=state.reason
            )
        ends = program.decoder.ends
        assert program.proposer is not None
        return after.replace(  # type: ignore[attr-defined]
            target=program.decoder.rewind(after.target, ends(state.target)),
            drafter=program.proposer.rewind(state.drafter, after.drafter, none),
            lengths=state.lengths, reason=state.reason,
        )  # fmt: skip

    body: Callable[[LoopState], LoopState] = {"draft": draft, "verify": verify, "round": whole}[
        part
    ]
    state = jax.lax.fori_loop(0, times, lambda _, s: body(s), state)
    return state.last


def _median(repeats: int, function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    """Seconds of a call, and what it returns."""
    out = jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        out = jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), out
