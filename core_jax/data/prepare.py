"""From raw images to training data: filtered, without duplicates, in ArrayRecord shards.

    python -m core_jax.data.prepare --from ~/laion-tars --out ~/datasets --name laion
    python -m core_jax.data.prepare --from TARS --out OUT --runner FlinkRunner -- --parallelism=64

An Apache Beam pipeline: the same on one machine and on a cluster; what stands after `--` are Beam's
own arguments. Running the same command again goes on where it stopped. docs/data.md has the rules.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from core_jax.data.arguments import add_source_arguments, spec_from_arguments
from core_jax.data.convert import dataset_features, existing_splits, write_metadata
from core_jax.data.images import ImageLimits
from core_jax.data.prepare_job import (
    Job,
    PrepareError,
    Unit,
    save_exclusion,
    source_parts,
    units_of,
    write_into,
)  # fmt: skip
from core_jax.data.prepare_options import (
    Options,
    finished_summary,
    read_exclusion,
    stamp_of,
)  # fmt: skip
from core_jax.data.prepare_rules import Rules, account
from core_jax.data.sources import SourceSpec


def prepare(
    spec: SourceSpec,
    out: str | os.PathLike,
    *,
    name: str = "prepared",
    split: str = "train",
    version: str = "1.0.0",
    options: Options | None = None,
    runner: str = "DirectRunner",
    workers: int = 1,
    threads: int = 2,
    beam_arguments: list[str] | None = None,
) -> tuple[Path, dict[str, Any], bool]:
    """Prepares one split.

    Args:
        spec: The source.
        out: The data_dir; the dataset goes to out/name/version.
        name: Of the dataset, in snake_case.
        split: Of the dataset.
        version: Of the dataset.
        options: What is kept.
        runner: Of Beam.
        workers: Processes of the local runner.
        threads: Threads in each worker process.
        beam_arguments: More arguments of Beam's.

    Returns:
        The version folder; the summary, as it is in prepare-<split>.json; whether there was
        anything to do.

    Raises:
        PrepareError: A bad name, an output of other options, unreadable files, nothing kept.
        SourceError: The source is not there.
        ImportError: Apache Beam is not installed.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or not re.fullmatch(r"\w+", split):
        raise PrepareError(f"name {name!r} and split {split!r} must be in snake_case")
    options = options or Options()
    path = Path(out).absolute() / name / version
    job = Job(
        parts=source_parts(_absolute(spec)), path=path, name=name, split=split,
        rules=options.rules, limits=ImageLimits(), threads=threads,
    )  # fmt: skip
    what = stamp_of(job.parts, options)
    finished = finished_summary(job, what)
    if finished is not None:
        return path, finished, False
    from core_jax.data import prepare_pipeline as pipeline

    beam_options = pipeline.pipeline_options(runner, workers, beam_arguments or [])
    _begin(job, what, options)
    lengths, unreadable = _count(job, options, pipeline, beam_options)
    units, starts = units_of(lengths, options.examples_per_unit)
    with _progress(job.work / "looks", len(units), "units looked at"):
        todo = [unit for unit in units if not job.look_file(unit).exists()]
        pipeline.run_each(todo, job.look, beam_options)
    shards = _shards(job, units, options)
    with _progress(job.work / "shards", shards, "shards written"):
        if not all(job.is_written(shard, shards) for shard in range(shards)):
            pipeline.write_shards(job, units, starts, shards, beam_options)
    return path, _finish(job, shards, sum(lengths), unreadable, what), True


def _absolute(spec: SourceSpec) -> SourceSpec:
    """Workers may run in another folder."""
    paths = {
        field: os.path.abspath(value)
        for field in ("path", "manifest", "images", "cache_dir")
        if (value := getattr(spec, field)) is not None
    }
    return dataclasses.replace(spec, **paths)


def _begin(job: Job, what: dict[str, Any], options: Options) -> None:
    """Makes the folder of work, and in it the stamp and what is excluded."""
    job.work.mkdir(parents=True, exist_ok=True)
    halves = [
        *job.path.glob(f".{job.name}-{job.split}.*.tmp"),
        *job.path.glob(f".prepare-{job.split}.json.*.tmp"),
        *job.dropped_folder.glob(".*.tmp"),
        *job.work.glob("**/.*.tmp"),
    ]
    for temporary in halves:
        temporary.unlink(missing_ok=True)  # of a killed run
    if not (job.work / "what.json").exists():
        save_exclusion(job.work, read_exclusion(options))
        write_into(job.work / "what.json", json.dumps(what).encode())


def _count(
    job: Job, options: Options, pipeline: Any, beam_options: Any
) -> tuple[list[int], list[str]]:
    """Examples of every part; the parts that cannot be read."""
    todo = [part for part in range(len(job.parts)) if not job.count_file(part).exists()]
    with _progress(job.work / "parts", len(job.parts), "files counted"):
        pipeline.run_each(todo, job.count, beam_options)
    counts = [json.loads(job.count_file(part).read_text()) for part in range(len(job.parts))]
    problems = [count["problem"] for count in counts if "problem" in count]
    if problems and not (options.skip_unreadable and len(job.parts) > 1):
        shutil.rmtree(job.work)  # so that other options are welcome
        shown = "\n".join(problems[:20])
        raise PrepareError(
            f"{len(problems)} of {len(job.parts)} files cannot be read:\n{shown}\nMend them, move "
            "them away, or leave them out by --skip-unreadable"
        )
    lengths = [count.get("length", 0) for count in counts]
    if not sum(lengths):
        raise PrepareError("the source is empty")
    unreadable = [
        Path(str(part.path)).name
        for part, count in zip(job.parts, counts, strict=True) if "problem" in count
    ]  # fmt: skip
    return lengths, unreadable


def _shards(job: Job, units: list[Unit], options: Options) -> int:
    """How many shards; a function of what the single looks let through."""
    reasons: Counter[str] = Counter()
    for unit in units:
        reasons.update(job.reasons(unit))
    if not reasons[""]:
        hint = ""
        if reasons["no_watermark_score"]:
            hint = (
                f"; there is no score under {job.rules.watermark_key!r}: --watermark-key names it, "
                "--missing-watermark=keep keeps such examples"
            )
        shutil.rmtree(job.work)  # so that other options are welcome
        raise PrepareError(f"nothing is kept; dropped: {dict(reasons.most_common())}{hint}")
    return -(-reasons[""] // options.examples_per_shard)


def _finish(
    job: Job, shards: int, total: int, unreadable: list[str], what: dict[str, Any]
) -> dict[str, Any]:
    """Adds up, writes TFDS's metadata and the summary, and removes what was only needed before."""
    reports = [json.loads(job.report_file(shard).read_text()) for shard in range(shards)]
    kept = sum(report["kept"] for report in reports)
    dropped = sum((Counter(report["dropped"]) for report in reports), Counter())
    account(total, kept, dropped)
    previous = [info for info in existing_splits(job.path) if info.name != job.split]
    num_bytes = sum(report["bytes"] for report in reports)
    write_metadata(
        job.path, job.name, job.split, [report["kept"] for report in reports], num_bytes, previous,
        dataset_features(), "Images with captions, written by core_jax.data.prepare.",
    )  # fmt: skip
    summary = {
        "input": total,
        "kept": kept,
        "dropped": dict(sorted(dropped.items())),
        "kept_without_watermark_score": sum(
            report["kept_without_watermark_score"] for report in reports
        ),
        "shards": shards,
        "bytes": num_bytes,
        "unreadable_files": unreadable,
        "what": what,
    }
    write_into(
        job.path / f"prepare-{job.split}.json", (json.dumps(summary, indent=1) + "\n").encode()
    )
    shutil.rmtree(job.work)
    return summary


@contextlib.contextmanager
def _progress(folder: Path, total: int, what: str, every: float = 20.0) -> Iterator[None]:
    """Says how many of the files are there, whichever worker makes them."""
    began, cpu, stop = time.perf_counter(), time.process_time(), threading.Event()

    def count() -> int:
        return (
            len([name for name in os.listdir(folder) if name[0] != "."]) if folder.exists() else 0
        )

    before = count()

    def say() -> None:
        while not stop.wait(every):
            done, seconds = count(), time.perf_counter() - began
            left = ""
            if done > before:
                left = f", {(total - done) * seconds / (done - before):.0f} s left"
            print(f"{done} of {total} {what}, {seconds:.0f} s{left}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    text = f"{count()} of {total} {what}, {seconds:.1f} s, {cpu:.1f} s of CPU in this process"
    print(text, file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    rules, options = Rules(), Options()
    parser = argparse.ArgumentParser(
        prog="python -m core_jax.data.prepare", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add_source_arguments(parser, prefix="from-")
    add("--out", required=True, help="data_dir of the dataset")
    add("--name", default="prepared", help="name of the dataset")
    add("--split", default="train", help="split to write")
    add("--version", default="1.0.0", help="version to write")
    add("--side-above", type=int, default=rules.side_above, help="pixels of the shorter side")
    add("--min-aspect", type=float, default=rules.min_aspect, help="width over height")
    add("--max-aspect", type=float, default=rules.max_aspect, help="width over height")
    add("--watermark-below", type=_number_or_none, default=rules.watermark_below,
        help="largest score, exclusive; 'none' asks for no score")  # fmt: skip
    add("--watermark-key", default=rules.watermark_key, help="key of the score in the extras")
    add("--missing-watermark", choices=("drop", "keep"), default=rules.missing_watermark,
        help="what happens to an example without a score")  # fmt: skip
    add("--require-caption", action="store_true", help="drop examples without a caption")
    add("--near-distance", type=_number_or_none, default=rules.near_distance,
        help="bits in which near duplicates differ at most, 0..7, or 'none'")  # fmt: skip
    add("--near-colour", type=float, default=rules.near_colour,
        help="mean difference of their colours at most, in levels of 0..255")  # fmt: skip
    add("--exclude-ids", help="file, an id a line")
    add("--exclude-sha256", help="file, a hexadecimal sha256 of an encoded image a line")
    add("--exclude-images", help="a source whose images must not be in the data, nor their likes")
    add("--skip-unreadable", action="store_true", help="leave out files that cannot be read")
    add("--examples-per-shard", type=int, default=options.examples_per_shard)
    add("--examples-per-unit", type=int, default=options.examples_per_unit,
        help="examples that a worker looks at before it saves what it found")  # fmt: skip
    add("--runner", default="DirectRunner", help="of Beam; its own arguments follow after --")
    add("--workers", type=int, default=1, help="processes of the local runner")
    add("--threads", type=int, default=2, help="threads in each worker process")
    return parser


def _number_or_none(text: str) -> float | int | None:
    if text == "none":
        return None
    return int(text) if text.isdigit() else float(text)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = _parser().parse_args(argv[:cut])
    given = vars(arguments)
    try:
        rules = Rules(**{f.name: given[f.name] for f in dataclasses.fields(Rules)})
        chosen = {f.name: given[f.name] for f in dataclasses.fields(Options) if f.name != "rules"}
        path, summary, worked = prepare(
            spec_from_arguments(arguments), arguments.out, name=arguments.name,
            split=arguments.split, version=arguments.version,
            options=Options(rules=rules, **chosen), runner=arguments.runner,
            workers=arguments.workers, threads=arguments.threads, beam_arguments=argv[cut + 1 :],
        )  # fmt: skip
    except (ValueError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not worked:
        print(f"{path}: split {arguments.split!r} is done already, nothing to do")
    print(f"{path}: {summary['kept']} of {summary['input']} examples in {summary['shards']} shards")
    for reason, number in sorted(summary["dropped"].items(), key=lambda item: -item[1]):
        print(f"  dropped {number}: {reason}")
    for file in summary["unreadable_files"]:
        print(f"  left out whole, not counted: {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
