"""Answers to a JSONL file of prompts, in another one, with stops and restarts in between.

A line of the input is {"id", "prompt" or "messages", "image" or "images"}; images are paths,
relative to the file. A line of the output has the id and either the answer or an "error"; what
failed is tried again by the next run. Each row's draws are keyed by its id, so with a fixed gamma
an answer depends neither on the rows that share its batch nor on where the job was stopped.
"""

import dataclasses
import json
import pathlib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from core_jax.data.images import BadImage
from core_jax.data.sources import clean_text
from core_jax.decode.frontends import open_image
from core_jax.decode.sampling import SamplingRule
from core_jax.decode.target import Target, load_target
from core_jax.files import sync_file
from core_jax.partition import tree_hash
from core_jax.resumed_output import shard_path
from massv_jax.binding import weight_hashes
from massv_jax.experiment import DecodingConfig
from massv_jax.generating_files import (
    GenerateJob,
    JobError,
    Row,
    check_settings,
    read_done,
    read_rows,
)
from massv_jax.pixels import limit_pixels, pixels_of
from massv_jax.placing import target_options
from massv_jax.speculative.adaptive import GammaPolicy
from massv_jax.speculative.counts import Statistics
from massv_jax.speculative.decoder import (
    PROMPT_LENGTHS,
    Answers,
    RequestError,
    SpeculativeDecoder,
)
from massv_jax.speculative.drafters import LookupDrafter
from massv_jax.speculative.options import MAX_GAMMA, DecodeOptions
from massv_jax.windows_log import LoggedWindows, open_log, window_line


def open_drafter_named(
    name: str,
    *,
    target_dir: str,
    language_model: str = "",
    loaded: Target | None = None,
    **options: Any,
) -> Any:
    """What `SpeculativeDecoder` takes as a drafter, of what a user calls it.

    Args:
      name: "" or "none" for plain decoding, "lookup" for prompt lookup, "text" for the language
        model without images; or a directory: a drafter, a working directory of
        massv_jax.train, or any model of the target's family.
      target_dir: the target's directory.
      language_model: what "text" stands for.
      loaded: the target, where it is loaded already; drafters share its arrays.
      **options: of `load_target`.

    Raises:
      JobError: "text" without a language model.
      BindingError: the drafter was made for another target.
    """
    if name in ("", "none"):
        return None
    if name == "lookup":
        return LookupDrafter()
    if name == "text":
        if not language_model:
            raise JobError(
                "drafter 'text' needs model.language_model, a language model's directory"
            )
        return load_target(language_model, **options)
    from massv_jax.workdir import EXPERIMENT_FILE, is_drafter, open_drafter

    path = pathlib.Path(name).expanduser()
    if is_drafter(path) or (path / EXPERIMENT_FILE).is_file():
        return open_drafter(path, target_dir, loaded=loaded, **options)
    return load_target(path, **options)


def generate_answers(
    decoder: SpeculativeDecoder, job: GenerateJob, *, at: Callable[[str], None] = lambda place: None
) -> Statistics | None:
    """Answers every prompt that has no answer yet.

    `at` is told where the job is, after every batch.

    Returns:
      What this call's rounds did; None if there was nothing to do.

    Raises:
      JobError: the input or an existing output is not what it should be.
    """
    decoder = dataclasses.replace(decoder, batch_size=job.batch_size)
    rows = list(read_rows(job))[job.process_index :: job.process_count]
    output = shard_path(job.output, job.process_index, job.process_count)
    output.parent.mkdir(parents=True, exist_ok=True)
    check_settings(job.output, job_settings(decoder, job))
    done = read_done(output)
    todo = [row for row in rows if row.id not in done]
    had = f", {len(rows) - len(todo)} of them are in {output} already" if done else ""
    print(f"{len(rows)} prompts{had}", flush=True)
    parts, began, count, shown = [], time.perf_counter(), 0, 0.0
    windows = output.with_name(output.name + ".windows.jsonl")
    with output.open("a", encoding="utf-8") as out, open_log(windows) as log:
        for batch, options in _batches(todo, job):
            start = time.perf_counter()
            records, answers = _answer(decoder, job, batch, options)
            if answers is not None:
                parts.append(answers.statistics)
                ids = [r["id"] for r in records if "error" not in r]
                # First: no answer without its windows, which are the only way to make it again.
                log.write(window_line(ids, time.perf_counter() - start, answers))
                log.flush()
            out.writelines(clean_text(json.dumps(r, ensure_ascii=False)) + "\n" for r in records)
            out.flush()  # what was computed survives a kill
            count += len(batch)
            at(f"prompt {count} of {len(todo)}")
            now = time.perf_counter() - began
            if now - shown > 10 or count == len(todo):
                shown = now
                left = (len(todo) - count) * now / count
                print(f"{count}/{len(todo)}  {count / now:.2f} prompts/s  {left:.0f} s left",
                      flush=True)  # fmt: skip
    for file in (output, windows):
        sync_file(file)
    return Statistics.concatenate(parts) if parts else None


def _batches(todo: Sequence[Row], job: GenerateJob) -> Iterator[tuple[Sequence[Row], Any]]:
    """Rows of one call, and its options: None where a log of windows has none for them."""
    gamma = job.options.get("gamma")
    if isinstance(gamma, LoggedWindows):
        for batch, replay in gamma.split(todo, job.batch_size):
            yield batch, replay and {**job.options, "gamma": replay}
        return
    for first in range(0, len(todo), job.batch_size):
        yield todo[first : first + job.batch_size], job.options


def job_settings(decoder: SpeculativeDecoder, job: GenerateJob) -> dict[str, Any]:
    """What answers and their counts follow from, beside the prompt; as JSON."""
    target, drafter = decoder.target, decoder.drafter
    directory = target.directory
    weights = tree_hash(target.params) if directory is None else weight_hashes(directory)[0]
    leaves = jax.tree.leaves(target.params)
    drafts = None if drafter is None else f"{type(drafter).__name__} {tree_hash(drafter.params)}"
    gamma = job.options.get("gamma")
    return {
        "target": weights,
        "dtype": str(leaves[0].dtype) if leaves else "",
        "drafter": drafts,
        "accept": decoder.accept,
        "min_confidence": decoder.min_confidence,
        **pixels_of(target),
        **job.options,
        "gamma": _named(gamma),
    }


def _named(gamma: Any) -> int | str:
    if isinstance(gamma, LoggedWindows):
        return f"windows of the log {gamma.digest}"
    return gamma if isinstance(gamma, int) else type(gamma).__name__


def _answer(
    decoder: SpeculativeDecoder, job: GenerateJob, batch: Sequence[Row], options: Any
) -> tuple[list[dict[str, Any]], Answers | None]:
    """Records in the rows' order, and the answers of those that could be answered."""
    errors: dict[str, str] = {}
    images: dict[str, list[Any]] = {}
    for row in batch:
        try:
            images[row.id] = [open_image(image, job.limits) for image in row.images]
        except BadImage as error:
            errors[row.id] = f"image: {error.reason}"

    def generate(rows: Sequence[Row]) -> Answers | None:
        if not rows:
            return None
        if options is None:
            raise JobError(
                f"{[row.id for row in rows]} are not in the log of windows, which is of another "
                "job, or they failed in it: answer them without --replay"
            )
        return decoder.generate(
            [images[row.id] for row in rows], [row.prompt for row in rows],
            row_seeds=[row_seed(row.id) for row in rows], **options,
        )  # fmt: skip

    good = [row for row in batch if row.id not in errors]
    try:
        answers = generate(good)
    except ValueError:  # of one row or more; it is found before anything is computed
        for row in good:
            try:
                decoder.check([images[row.id]], [row.prompt], job.options)
            except ValueError as error:
                errors[row.id] = str(error)
        if all(row.id not in errors for row in good):
            raise
        good = [row for row in good if row.id not in errors]
        answers = generate(good)
    place = {row.id: i for i, row in enumerate(good)}
    return [
        {"id": row.id, "error": errors[row.id]} if row.id in errors
        else {"id": row.id, **_record(answers, place[row.id])}
        for row in batch
    ], answers  # fmt: skip


def _record(answers: Answers | None, i: int) -> dict[str, Any]:
    assert answers is not None
    s = answers.statistics
    return {
        "text": answers.texts[i],
        "num_tokens": int(answers.lengths[i]),
        "finished": bool(answers.finished[i]),
        "rounds": int(s.rounds[i]),
        "accepted": s.accepted[i].tolist(),
        "judged": s.judged[i].tolist(),
    }


def row_seed(row_id: str) -> int:
    """A stable number for an id."""
    return zlib.crc32(row_id.encode())


def change_decoding(decoding: DecodingConfig, **changes: Any) -> DecodingConfig:
    """Other values for some settings, checked before anything is loaded.

    Raises:
      RequestError: one is out of range.
    """
    try:
        made = dataclasses.replace(decoding, **changes)
        rule = SamplingRule(temperature=made.temperature, top_k=made.top_k, top_p=made.top_p)
        DecodeOptions(
            max_new_tokens=made.max_new_tokens, max_gamma=made.gamma, vocab_size=1, rule=rule,
            accept=made.accept, min_confidence=made.min_confidence,
        )  # fmt: skip
    except ValueError as error:
        raise RequestError(str(error)) from error
    if made.gamma < 1:
        raise RequestError(f"gamma is {made.gamma}; it must be from 1 to {MAX_GAMMA}")
    if made.batch_size < 1:
        raise RequestError(f"batch_size is {made.batch_size}; it must be at least 1")
    return made


def make_decoder(
    target_dir: str,
    drafter: str,
    *,
    language_model: str = "",
    accept: Any = "rejection",
    min_confidence: float = 0.0,
    prompt_lengths: Sequence[int] | None = None,
    limits: Mapping[str, int] | None = None,
    mesh: Any = None,
    **options: Any,
) -> SpeculativeDecoder:
    """From directories.

    Args:
      target_dir: the target's.
      drafter: see `open_drafter_named`.
      language_model: see there.
      accept: see `DecodeOptions`.
      min_confidence: see `DecodeOptions`.
      prompt_lengths: see `SpeculativeDecoder`; its own by default.
      limits: of images, in the place of those of the target's processor (massv_jax.pixels).
      mesh: of several devices, for both networks (massv_jax.placing).
      **options: of `load_target`.
    """
    target: Target = load_target(target_dir, **options, **target_options(target_dir, mesh))
    target = limit_pixels(target, limits or {})
    if mesh is not None:
        options = {**options, "mesh": mesh}
    made = open_drafter_named(
        drafter, target_dir=target_dir, language_model=language_model, loaded=target, **options
    )
    return SpeculativeDecoder(
        target, made, accept=accept, min_confidence=min_confidence,
        prompt_lengths=PROMPT_LENGTHS if prompt_lengths is None else tuple(prompt_lengths),
    )  # fmt: skip


def summary_line(statistics: Statistics, policy: int | GammaPolicy | Any) -> str:
    """One line for people."""
    total = statistics.total
    tau = total.emitted_length[0]
    if not total.rounds[0]:
        return "every answer was one token"
    shares = ", ".join("-" if np.isnan(x) else f"{x:.2f}" for x in total.acceptance[0])
    what = f"gamma {policy}" if isinstance(policy, int) else "chosen windows"
    return (
        f"{total.emitted[0]} tokens in {total.rounds[0]} target passes ({what}): {tau:.2f} a pass, "
        f"{total.accepted_length[0]:.2f} of them drafted; accepted by place: {shares or 'none'}"
    )
