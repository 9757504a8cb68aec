"""A certificate that drafters leave a target's output as it is, on a user's own networks."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from core_jax.decode.sampling import SamplingRule
from core_jax.evaluation.provenance import command_facts, from_here
from core_jax.files import write_whole
from core_jax.train.run_record import versions
from massv_jax.binding import bind, hash_params
from massv_jax.evaluation.acceptance import Measured, measure
from massv_jax.evaluation.forced import compare_on_answers, read_distributions
from massv_jax.evaluation.kernel import check_kernel
from massv_jax.evaluation.prompts import Question, open_questions
from massv_jax.evaluation.run import Subject
from massv_jax.evaluation.windows import WindowLogits, compare_windows
from massv_jax.loading import target_tokenizer
from massv_jax.speculative.decoder import SpeculativeDecoder

CERTIFICATE = "certificate.json"
# Rounding of float32 logits in a window and in a step, as a share of the largest logit.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def certify(subject: Subject, out: pathlib.Path, *, say: Callable[[str], None] = print) -> bool:
    """Runs all checks, writes certificate.json, and returns whether all passed.

    Args:
      subject: the target and its drafters.
      out: the folder.
      say: gets a line for each check.
    """
    experiment = subject.experiment
    decoding, settings = experiment.decoding, experiment.evaluation
    questions, left_out = open_questions(
        experiment, images_only=subject.images_only, decoder=subject.plain
    )
    plain = measure(subject.plain, questions, decoding, temperature=0.0, gamma=0)
    gamma = max(settings.gammas)
    windows = compare_windows(subject.plain, questions, plain, decoding, gamma=gamma)
    checks: dict[str, Any] = {
        "window_logits": check_windows(windows, TOLERANCE[experiment.model.frozen_dtype])
    }
    for arm, decoder in subject.arms.items():
        for g in settings.gammas:
            drafted = measure(decoder, questions, decoding, temperature=0.0, gamma=g)
            checks[f"greedy.{arm}.gamma{g}"] = check_greedy(questions, plain, drafted, windows)
        contexts = record_contexts(subject, decoder, questions)
        if contexts is not None:
            checks[f"accept_rule.{arm}"] = check_kernel(
                contexts, accept=decoder.accept, keys=settings.kernel_keys, seed=settings.seed
            )
    for name, check in checks.items():
        say(f"{name}: {'passed' if check['passed'] else 'FAILED'}; {_short(check)}")
    passed = all(check["passed"] for check in checks.values())
    content = {
        "passed": passed, "checks": checks, "questions": len(questions),
        "left_out": left_out, **_facts(subject),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_whole(out / CERTIFICATE, text.encode())
    say(f"{'passed' if passed else 'FAILED'}; wrote {out / CERTIFICATE}")
    return passed


def check_windows(windows: WindowLogits, tolerance: float) -> dict[str, Any]:
    """A window's logits equal plain steps' up to rounding.

    Args:
      windows: the comparison.
      tolerance: of the difference, as a share of the largest logit there.
    """
    at = windows.counted
    relative = windows.difference[at] / np.maximum(windows.scale[at], 1e-6)
    return {
        "passed": bool(np.isfinite(relative).all() and relative.max() <= tolerance),
        "places": int(at.sum()), "largest_difference": windows.largest,
        "largest_relative": float(relative.max()), "tolerance": tolerance,
        "flipped": int(windows.flipped[at].sum()),
    }  # fmt: skip


def check_greedy(
    questions: Sequence[Question], plain: Measured, drafted: Measured, windows: WindowLogits
) -> dict[str, Any]:
    """Drafted greedy answers are plain decoding's, near-ties told apart from errors.

    Where an answer departs from plain decoding's, the token that it took is compared with plain
    decoding's in the plain step's logits. If they are closer than twice what rounding was seen to
    do in that very place, rounding decided (a near-tie); else it is an error.
    """
    near_ties, errors = [], []
    for row in np.flatnonzero(~drafted.same_as(plain)).tolist():
        place = _departure(plain, drafted, row)
        token = int(drafted.tokens[row, place]) if place < drafted.lengths[row] else -1
        inside = place < plain.lengths[row]
        gap = windows.gap(row, place, token) if inside else np.inf
        room = 2 * float(windows.difference[row, place]) if inside else 0.0
        found = {
            "id": questions[row].id, "place": place, "near_tie_below": room,
            "gap": gap if np.isfinite(gap) else None,
        }  # fmt: skip
        (near_ties if gap <= room else errors).append(found)
    total = drafted.statistics.total
    return {
        "passed": not errors, "answers": len(questions),
        "same": len(questions) - len(near_ties) - len(errors), "near_ties": near_ties,
        "errors": errors,
        "tokens": int(drafted.lengths.sum()), "passes": int(total.rounds[0]),
    }  # fmt: skip


def _departure(plain: Measured, drafted: Measured, row: int) -> int:
    """The first place in which two answers differ, or the end of the shorter one."""
    n = int(min(plain.lengths[row], drafted.lengths[row]))
    differ = np.flatnonzero(plain.tokens[row, :n] != drafted.tokens[row, :n])
    return int(differ[0]) if len(differ) else n


def record_contexts(
    subject: Subject, decoder: SpeculativeDecoder, questions: Sequence[Question]
) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """(p, q) in places of sampled answers where the two differ most usefully.

    Where they are the same, or have nothing in common, a wrong rule would go unnoticed; so places
    are taken whose distance is nearest to a half. They are of the config's temperature, of 1 where
    that is greedy.

    Returns:
      None for drafters without distributions; empty where no answer has a place to record.
    """
    decoding, settings = subject.experiment.decoding, subject.experiment.evaluation
    temperature = decoding.temperature or 1.0
    answers = measure(subject.plain, questions, decoding, temperature=temperature, gamma=0)
    forced = compare_on_answers(
        decoder, questions, answers, decoding, temperature=temperature,
        batch_size=decoding.batch_size,
    )  # fmt: skip
    if forced is None:
        return None
    far = np.where(forced.counted, np.abs(forced.overlap - 0.5), np.inf)
    order = np.argsort(far, axis=None, kind="stable")[: settings.contexts]
    places: dict[int, list[int]] = {}
    for row, place in zip(*np.unravel_index(order, far.shape), strict=True):
        if np.isfinite(far[row, place]):
            places.setdefault(int(row), []).append(int(place))
    rule = SamplingRule(temperature=temperature, top_k=decoding.top_k, top_p=decoding.top_p)
    found = []
    for row, at in places.items():
        p, q = read_distributions(decoder, questions[row], answers.tokens[row], rule)
        found += [(p[i], q[i]) for i in at]
    return found


def _facts(subject: Subject) -> dict[str, Any]:
    experiment = subject.experiment
    path = pathlib.Path(experiment.model.target)
    hashes: dict[str, Any] = {
        arm: hash_params(decoder.drafter.params) for arm, decoder in subject.arms.items()
    }
    target = {}
    if path.is_dir():
        target = dataclasses.asdict(bind(path, target_tokenizer(path)))
    return from_here({
        **command_facts(), "versions": versions(), "target": target, "drafters": hashes,
        "devices": sorted({d.device_kind for d in jax.local_devices()}),
        "matmul_precision": str(jax.config.values["jax_default_matmul_precision"]),
        "config": json.loads(json.dumps(dataclasses.asdict(experiment))),
    })  # fmt: skip


def _short(check: dict[str, Any]) -> str:
    if "reason" in check:
        return check["reason"]
    if "rules" in check:
        rules = check["rules"].items()
        return ", ".join(f"{name} p = {r['p_value']:.2g} (must {r['must']})" for name, r in rules)
    if "same" in check:
        return (
            f"{check['same']} of {check['answers']} answers the same, "
            f"{len(check['near_ties'])} near-ties, {len(check['errors'])} errors"
        )
    return f"largest relative difference {check['largest_relative']:.2g}"
