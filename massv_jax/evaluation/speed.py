"""Wall-clock of whole answers at batch 1: plain decoding and every arm, one after the other.

A question is answered by all before the next one is, in another order each time, so that whatever
else the machine does falls on all of them alike. The first time is not counted: it compiles.
"""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from core_jax.evaluation.bootstrap import Estimate, bootstrap_quotient, bootstrap_ratio
from core_jax.evaluation.report_text import number_text
from massv_jax.evaluation.prompts import Question
from massv_jax.evaluation.reporting import BASELINE, Place, shown, tag
from massv_jax.experiment import DecodingConfig
from massv_jax.speculative.decoder import SpeculativeDecoder
from massv_jax.speculative.profile import Profile, profile

PLAIN = "plain"
Entry = tuple[str, int]  # arm, gamma; ("plain", 0)


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of one entry on all questions, medians over repeats.

    Attributes:
      begin: preprocessing, the tower and the prompt; [n].
      rounds: the rest; [n].
      tokens: of the answers; [n].
      passes: of the target after the prompt's; [n].
    """

    begin: np.ndarray
    rounds: np.ndarray
    tokens: np.ndarray
    passes: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        """Seconds from question to answer, [n]."""
        return self.begin + self.rounds


def time_answers(
    entries: Mapping[Entry, SpeculativeDecoder],
    questions: Sequence[Question],
    decoding: DecodingConfig,
    *,
    temperature: float,
    repeats: int = 3,
) -> dict[Entry, Timed]:
    """Answers every question with every entry.

    Args:
      entries: decoders, each with its gamma.
      questions: see `Question`.
      decoding: limits and seed.
      temperature: 0 is greedy.
      repeats: timed answers of each; one more comes first.
    """
    names = list(entries)
    seconds = np.zeros((len(names), len(questions), repeats + 1, 2))
    tokens = np.zeros((len(names), len(questions)), int)
    passes = np.zeros_like(tokens)
    for repeat in range(repeats + 1):
        for i, question in enumerate(questions):
            for n in np.roll(np.arange(len(names)), i + repeat):
                decoder = dataclasses.replace(entries[names[n]], batch_size=1)
                *seconds[n, i, repeat], tokens[n, i], passes[n, i] = _answer(
                    decoder, question, decoding, temperature, names[n][1], i
                )
    begin, rounds = np.moveaxis(np.median(seconds[:, :, 1:], axis=2), 2, 0)
    return {name: Timed(begin[n], rounds[n], tokens[n], passes[n]) for n, name in enumerate(names)}


def profile_entries(
    entries: Mapping[Entry, SpeculativeDecoder],
    question: Question,
    decoding: DecodingConfig,
    temperature: float,
) -> dict[Entry, Profile]:
    """What a round of each entry with a drafter costs, at batch 1 on one question."""
    return {
        entry: profile(
            dataclasses.replace(decoder, batch_size=1), [list(question.images)], [question.prompt],
            gamma=entry[1], temperature=temperature, max_new_tokens=decoding.max_new_tokens,
        )
        for entry, decoder in entries.items() if decoder.drafter is not None
    }  # fmt: skip


def _answer(
    decoder: SpeculativeDecoder,
    question: Question,
    decoding: DecodingConfig,
    temperature: float,
    gamma: int,
    row_seed: int,
) -> tuple[float, float, int, int]:
    began = time.perf_counter()
    session = decoder.begin(
        [list(question.images)], [question.prompt], max_new_tokens=decoding.max_new_tokens,
        temperature=temperature, top_k=decoding.top_k, top_p=decoding.top_p,
        max_gamma=max(gamma, 1), seed=decoding.seed, row_seeds=[row_seed],
    )  # fmt: skip
    jax.block_until_ready(session.state)
    ready = time.perf_counter()
    session.advance(gamma)
    _, lengths = session.tokens()
    passed = time.perf_counter() - ready
    return ready - began, passed, int(lengths[0]), int(session.statistics().rounds[0])


def predict(ours: Timed, plain: Timed, costs: Profile, *, whole: bool) -> float:
    """How many times as fast as plain decoding passes and their costs say (docs/massv.md).

    Args:
      ours: of an arm and a gamma.
      plain: of plain decoding.
      costs: of the same gamma, in seconds.
      whole: with preprocessing, tower and prompt as they were measured; else the rounds alone.
    """
    spent = ours.passes.sum() * (costs.draft + costs.verify)
    base = plain.passes.sum() * costs.step
    if whole:
        spent, base = spent + ours.begin.sum(), base + plain.begin.sum()
    return float(base / spent * ours.tokens.sum() / plain.tokens.sum())


def _times(ours: Timed, base: Timed, *, whole: bool, **options: Any) -> Estimate:
    """How many times as fast: the quotient of tokens a second."""
    rows = (
        np.stack([timed.tokens, timed.whole if whole else timed.rounds], axis=1)
        for timed in (ours, base)
    )
    return bootstrap_quotient(*rows, **options)


def report_speed(
    place: Place,
    task: str,
    temperature: float,
    found: Mapping[Entry, Timed],
    costs: Mapping[Entry, Profile],
) -> None:
    """Tokens a second, and how many times those of plain and of text-only decoding.

    Args:
      place: where it goes.
      task: its name.
      temperature: of the answers.
      found: from `time_answers`, with an entry for plain decoding.
      costs: of every other entry, from `profile`.
    """
    plain, rows = found[PLAIN, 0], []
    for (arm, gamma), timed in found.items():
        name = f"speed.{task}.{tag(temperature)}.gamma{gamma}.{arm}"
        rate = bootstrap_ratio(timed.tokens, timed.whole, **place.options)
        place.add(f"{name}.tokens_per_second", rate)
        cells = [""] * 5
        if arm != PLAIN:
            whole = _times(timed, plain, whole=True, **place.options)
            rounds = _times(timed, plain, whole=False, **place.options)
            place.add(f"{name}.times_plain_end_to_end", whole)
            place.add(f"{name}.times_plain_decode", rounds)
            cells[:2] = [shown(whole), shown(rounds)]
            cells[3:] = _add_costs(place, name, timed, plain, costs[arm, gamma])
        base = found.get((BASELINE, gamma))
        if base is not None and arm != BASELINE:
            times = _times(timed, base, whole=True, **place.options)
            place.add(f"{name}.times_{BASELINE}_end_to_end", times)
            cells[2] = shown(times)
        milliseconds = f"{1e3 * timed.begin.mean():.1f} + {1e3 * timed.rounds.mean():.1f}"
        rows.append([arm, gamma, shown(rate), milliseconds, *cells])
    columns = [
        "arm", "gamma", "tokens/s, end to end", "ms an answer: begin + rounds",
        "times plain, end to end", "times plain, rounds alone", f"times {BASELINE}, end to end",
        "predicted: end to end, rounds", "ms: draft, verify, plain step; loop adds",
    ]  # fmt: skip
    title = f"Wall-clock at batch 1: {task}, temperature {temperature:g}"
    place.report.add_table(place.section, title, columns, rows)


def _add_costs(place: Place, name: str, timed: Timed, plain: Timed, costs: Profile) -> list[str]:
    """What the parts of a round cost, and what follows from that; two cells of the table."""
    predicted = [predict(timed, plain, costs, whole=whole) for whole in (True, False)]
    for what, value in zip(("end_to_end", "decode"), predicted, strict=True):
        place.add(f"{name}.predicted_times_plain_{what}", value, n=len(timed.passes))
    for what, value in costs.summary().items():
        if what != "gamma":
            place.add(f"{name}.costs.{what}", value, n=1)
    parts = ", ".join(f"{1e3 * x:.2f}" for x in (costs.draft, costs.verify, costs.step))
    return [", ".join(map(number_text, predicted)), f"{parts}; {costs.overhead:.0%}"]
