"""The target answers an instruction file, chunk by chunk, on any number of processes.

    source -- without evaluation images, the first max_samples --> kept
    kept   -- chunk_size each, in order --> chunks; process i takes every n-th
    chunk  -- answer_chunk --> committed (massv_jax.distilling_files), or not at all
    all committed -- merge_chunks --> answers.jsonl, manifest.json

What a chunk becomes depends on its instructions and the settings alone.
"""

import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from core_jax.config import ConfigError
from core_jax.data.llava_exclude import read_exclusions, without_images
from core_jax.data.sources import Source, open_source
from core_jax.decode.frontends import TextFrontend
from core_jax.decode.target import Target, load_target
from core_jax.stopping import stop_between
from core_jax.train.run_record import versions
from core_jax.watchdog import HEARTBEATS, Watchdog
from massv_jax.binding import bind, hash_params
from massv_jax.distilling_answers import Answerer, answer_chunk
from massv_jax.distilling_files import ChunkFolder, DistillError, merge_chunks
from massv_jax.experiment import Experiment
from massv_jax.generating import open_drafter_named
from massv_jax.loading import target_tokenizer
from massv_jax.pixels import limit_pixels, pixel_limits
from massv_jax.placing import data_parallel, local_mesh, target_options
from massv_jax.speculative.decoder import SpeculativeDecoder


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be answered.

    Attributes:
      source: all instructions.
      kept: places of those that are answered, in order.
      left_out: reason -> how many are not.
      chunk_size: instructions of a chunk.
    """

    source: Source
    kept: Sequence[int]
    left_out: Mapping[str, int]
    chunk_size: int

    @property
    def num_chunks(self) -> int:
        """Of the whole run."""
        return -(-len(self.kept) // self.chunk_size)

    def chunk(self, number: int) -> Sequence[int]:
        """Places of a chunk's instructions."""
        return self.kept[number * self.chunk_size : (number + 1) * self.chunk_size]


def make_plan(source: Source, experiment: Experiment) -> Plan:
    """Leaves evaluation images out, by id, and what is beyond `distill.max_samples`.

    Raises:
      SourceError: nothing is left.
    """
    config, kept = experiment.distill, list(range(len(source)))
    left_out = {}
    if experiment.data.exclude:
        subset, excluded = without_images(source, read_exclusions(experiment.data.exclude))
        kept, left_out["excluded_image"] = list(subset.indices), excluded
    if config.max_samples and len(kept) > config.max_samples:
        left_out["beyond_max_samples"] = len(kept) - config.max_samples
        kept = kept[: config.max_samples]
    return Plan(source=source, kept=kept, left_out=left_out, chunk_size=config.chunk_size)


def make_answerer(experiment: Experiment) -> Answerer:
    """Loads the target, and the drafter that `model.drafter` names, if any.

    Raises:
      DistillError: answers are to be the drafter's, and there is none.
    """
    model, config, data = experiment.model, experiment.distill, experiment.data
    if config.on_policy and not model.drafter:
        raise DistillError(
            "distill.on_policy lets a drafter write; name it with --config.model.drafter=DIR"
        )
    mesh = local_mesh(experiment)
    target = load_limited_target(experiment, mesh=mesh)
    drafter = open_drafter_named(
        model.drafter, target_dir=model.target, language_model=model.language_model,
        dtype=model.frozen_dtype, execution=model.execution, mesh=mesh, loaded=target,
    )  # fmt: skip
    decoder = SpeculativeDecoder(
        target, drafter, accept="on_policy" if config.on_policy else "coupled",
        batch_size=config.batch_size * data_parallel(mesh),
        prompt_lengths=config.prompt_lengths,
    )  # fmt: skip
    frontend = target.frontend
    return Answerer(
        decoder=decoder, config=config,
        target=bind(pathlib.Path(model.target), target_tokenizer(model_path(experiment))).weights,
        image_place=data.image_place,
        images_only=not frontend.image_ids and not isinstance(frontend, TextFrontend),
        limits=data.limits, num_threads=data.num_threads, gamma=experiment.decoding.gamma,
    )  # fmt: skip


def model_path(experiment: Experiment) -> pathlib.Path:
    """The target's directory."""
    return pathlib.Path(experiment.model.target)


def load_limited_target(experiment: Experiment, *, mesh: Any = None) -> Target:
    """The target, its images within the data config's pixel limits."""
    model, data = experiment.model, experiment.data
    target = load_target(
        model.target, dtype=model.frozen_dtype, execution=model.execution,
        **target_options(model.target, mesh),
    )  # fmt: skip
    return limit_pixels(target, pixel_limits(data))


def make_settings(answerer: Answerer, plan: Plan, experiment: Experiment) -> dict[str, Any]:
    """What all processes of a run, and all its continuations, must agree on."""
    data, model, decoder = experiment.data, experiment.model, answerer.decoder
    found, drafter, mesh = versions(), decoder.drafter, local_mesh(experiment)
    return {
        "distill": dataclasses.asdict(answerer.config),
        "target": answerer.target,
        # What a name stands for moves: the newest checkpoint of a working directory.
        "drafter": model.drafter or "none",
        "drafter_weights": "" if drafter is None else hash_params(drafter.params),
        "gamma": 0 if drafter is None else answerer.gamma,
        # Another layout rounds otherwise, and near-ties may flip.
        "mesh": {} if mesh is None else dict(mesh.shape),
        "attention": model.execution.attention,
        "dtype": model.frozen_dtype,
        "rows": decoder.batch_size,
        "images": {
            "min_pixels": data.min_pixels, "max_pixels": data.max_pixels,
            "image_place": data.image_place, "limits": dataclasses.asdict(data.limits),
        },
        "instructions": {
            "input": len(plan.source), "kept": len(plan.kept), "left_out": dict(plan.left_out),
            "sha256": hash_instructions(plan),
        },
        "versions": {k: v for k, v in found.items() if k in ("jax", "jaxlib", "transformers")},
    }  # fmt: skip


def hash_instructions(plan: Plan) -> str:
    """SHA-256 of the kept records without their images.

    Of a source whose records cannot be read without their images it is what the source says of
    itself (`fingerprint`), "" where it says nothing.
    """
    source, hashed = plan.source, hashlib.sha256()
    if own := getattr(source, "fingerprint", ""):
        hashed.update(f"{own}\0{list(plan.kept)}".encode())
        return hashed.hexdigest()
    if not hasattr(source, "image_names"):
        return ""
    for index in plan.kept:
        example = source[index]
        extras = {k: v for k, v in example.extras.items() if k != "image_root"}
        record = [example.id, example.caption, extras]
        hashed.update(json.dumps(record, sort_keys=True, default=str).encode() + b"\0")
    return hashed.hexdigest()


def distill(
    answerer: Answerer,
    plan: Plan,
    out: pathlib.Path,
    settings: Mapping[str, Any],
    *,
    process_index: int = 0,
    process_count: int = 1,
    at: Callable[[str], None] = lambda place: None,
) -> dict[str, Any] | None:
    """Answers this process's chunks, and merges all of them if they are there.

    Args:
      answerer: who answers.
      plan: what.
      out: the run's folder, the same for all processes.
      settings: from `make_settings`.
      process_index: of this process.
      process_count: how many share the chunks; it may change between continuations.
      at: told where the job is (`Watchdog.at`).

    Returns:
      The merged manifest; None while other processes' chunks are missing.

    Raises:
      DistillError: the folder holds a run with other settings, or is damaged.
    """
    folder = ChunkFolder(out)
    folder.agree(settings)
    own = range(process_index, plan.num_chunks, process_count)
    todo = [number for number in own if not folder.is_committed(number)]
    there = f", {len(own) - len(todo)} of them are there" if len(todo) < len(own) else ""
    print(f"{len(plan.kept)} instructions; {len(own)} chunks here{there}", flush=True)
    began = time.perf_counter()
    for done, number in enumerate(todo, start=1):
        chunk = answer_chunk(answerer, plan.source, number, plan.chunk(number), at=at)
        folder.commit(chunk)
        seconds = time.perf_counter() - began
        print(
            f"chunk {number}: {len(chunk.lines)} answered, {len(chunk.failed)} failed, "
            f"{len(chunk.skipped)} skipped; {chunk.counts.get('tokens', 0)} tokens; "
            f"{seconds / done * (len(todo) - done):.0f} s left",
            flush=True,
        )
    missing = sum(not folder.is_committed(n) for n in range(plan.num_chunks))
    if missing:
        print(f"{missing} chunks of other processes are missing; the last to end merges all")
        return None
    return merge_chunks(
        folder, plan.num_chunks, num_instructions=len(plan.source), left_out=plan.left_out,
        settings=settings,
    )  # fmt: skip


def run(
    experiment: Experiment, out: pathlib.Path, *, process_index: int = 0, process_count: int = 1
) -> dict[str, Any] | None:
    """The whole command; see `distill`.

    Raises:
      ConfigError: the config is for another command.
    """
    if experiment.task != "distill":
        raise ConfigError(f"a config of the task {experiment.task!r}; use configs/massv_distill.py")
    if not 0 <= process_index < process_count:
        raise DistillError(f"process {process_index} of {process_count}: they count from 0")
    seconds = experiment.run.hang_seconds
    with Watchdog(out / HEARTBEATS, seconds=seconds, index=process_index) as watchdog:
        at = stop_between(watchdog.at)
        plan = make_plan(open_source(experiment.data.source), experiment)
        answerer = make_answerer(experiment)
        at("the first chunk")
        settings = make_settings(answerer, plan, experiment)
        manifest = distill(
            answerer, plan, out, settings, process_index=process_index,
            process_count=process_count, at=at,
        )  # fmt: skip
    if manifest is not None:
        print(summary(manifest), flush=True)
    return manifest


def summary(manifest: Mapping[str, Any]) -> str:
    """What became of all instructions, for people."""
    m, counts = manifest, manifest["counts"]
    reasons = [*m["failed_by_reason"].items(), *m["skipped_by_reason"].items()]
    why = ", ".join(f"{reason[:100]} {n}" for reason, n in reasons[:20])
    tokens, turns = counts.get("tokens", 0), counts.get("turns", 0)
    return (
        f"{m['succeeded']} succeeded + {m['failed']} failed + {m['skipped']} skipped = "
        f"{m['input']} instructions{f' ({why})' if why else ''}\n"
        f"{turns} answers of {tokens / max(1, turns):.1f} tokens, {counts.get('truncated', 0)} of "
        f"them cut off; {counts.get('greedy', 0)} conversations greedy, "
        f"{counts.get('sampled', 0)} sampled"
    )
