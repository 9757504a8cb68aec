"""What a round costs and brings: plain and speculative decoding by batch size and window.

    python -m benchmarks.windows --size=larger [--batches 1 4 16] [--gammas 1 3 5 7]
    python -m benchmarks.windows --size=mini --target=DIR --drafter=DIR

Pairs are those of benchmarks.speculative, and so is a call: pictures and a question to tokens on
the host. There is no peer. The profile at the end (batch 1) times the same vision, prefill, draft
and verify functions one at a time, and what the loop adds to their sum.
"""

import argparse
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.alternate import Arguments, Benchmark, UnavailableError, main
from benchmarks.speculative import (
    QUESTION,
    add_pair_arguments,
    new_tokens,
    open_pair,
    prepare,
)
from benchmarks.timing import Measured


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_pair_arguments(parser)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--gammas", type=int, nargs="+", default=[1, 2, 3, 5, 7, 10])
    parser.add_argument("--gamma", type=int, default=5, help="of the profile")
    parser.set_defaults(prompts=16)


def _ours(arguments: Arguments, folder: pathlib.Path) -> Measured:
    from massv_jax import SpeculativeDecoder
    from massv_jax.speculative.profile import profile

    tiny = arguments.size == "tiny"
    target, drafter = open_pair(arguments, folder)
    plain, drafted = (SpeculativeDecoder(target, d) for d in (None, drafter))
    batches, gammas = ([2], [2]) if tiny else (arguments.batches, arguments.gammas)
    new, measured = new_tokens(arguments), Measured()
    seen = np.load(folder / "pictures.npy")
    for batch in batches:
        rows = np.resize(seen, (batch, *seen.shape[1:]))
        for decoder, gamma in [(plain, 0), *((drafted, gamma) for gamma in gammas)]:
            name = f"batch {batch}, " + (f"gamma {gamma}" if gamma else "plain")
            sessions: list[Any] = []
            call = _call(decoder, rows, new, gamma, sessions)
            tokens = measured.time(name, call, repeats=arguments.repeats)
            rate = tokens / float(np.median(measured.seconds[name]))
            measured.facts[f"{name}: tokens/s"] = rate
            if gamma:
                total = sessions[-1].statistics().total
                measured.facts[f"{name}: tokens a round"] = float(total.emitted_length[0])
    options = {"rounds": 2, "repeats": 1} if tiny else {}
    found = profile(drafted, [seen[0]], [QUESTION], gamma=2 if tiny else arguments.gamma, **options)
    summary = {k: float(v) for k, v in found.summary().items()}
    measured.facts |= {f"profile: {k}": v for k, v in summary.items()}
    return measured


def _call(
    decoder: Any, pictures: np.ndarray, new: int, gamma: int, sessions: list[Any]
) -> Callable[[], int]:
    """Answers a batch; returns how many tokens they have, and leaves the session."""

    def call() -> int:
        session = decoder.begin(
            list(pictures), [QUESTION] * len(pictures), max_new_tokens=new, max_gamma=max(gamma, 1)
        )
        session.advance(gamma)
        sessions[:] = [session]
        return int(session.tokens()[1].sum())

    return call


def _theirs(arguments: Arguments, folder: pathlib.Path) -> Measured:
    del arguments, folder
    raise UnavailableError("there is none; benchmarks.speculative has one")


BENCHMARK = Benchmark(
    module="benchmarks.windows",
    peer="none",
    add_arguments=_add_arguments,
    name=lambda a: f"windows-{a.size}",
    prepare=prepare,
    ours=_ours,
    theirs=_theirs,
    rounds=2,
    repeats=5,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
