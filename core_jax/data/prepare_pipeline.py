"""The Apache Beam half of core_jax.data.prepare: which units go to which worker.

Beam is an extra of this distribution and is imported here only. Pictures never travel between
workers: what is shuffled is some 200 bytes an example, and each shard reads its pictures where they
lie. So every worker must see the source and the output under the same paths (one machine, a shared
disk, or a mounted bucket), as everywhere in this project.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

try:
    import apache_beam as beam  # pyright: ignore[reportMissingImports]
    from apache_beam.options.pipeline_options import (  # pyright: ignore[reportMissingImports]
        PipelineOptions,
    )
except ImportError as error:
    raise ImportError(
        "core_jax.data.prepare needs Apache Beam, which is not installed: pip install '.[beam]'"
    ) from error

from core_jax.data.prepare_job import Drop, Job, Record, Unit
from core_jax.data.prepare_rules import Dropped, bands, exact_duplicates, shard_of

LOCAL = "DirectRunner"


def pipeline_options(runner: str, workers: int, extra: list[str]) -> PipelineOptions:
    """Beam's options.

    Args:
        runner: A name that Beam knows, or the full path of a runner's class.
        workers: Processes of the local runner.
        extra: More of Beam's own arguments ("--project=..."), which win.
    """
    arguments = [f"--runner={runner}"]
    if runner == LOCAL:
        # Beam's name for it first tries to download another local runner. This is the one that it
        # would fall back to.
        arguments = ["--runner=apache_beam.runners.portability.fn_api_runner.FnApiRunner"]
        mode = "multi_processing" if workers > 1 else "in_memory"
        arguments += [f"--direct_num_workers={workers}", f"--direct_running_mode={mode}"]
    return PipelineOptions([*arguments, *extra])


def run_each(items: Iterable[Any], work: Callable[[Any], None], options: PipelineOptions) -> None:
    """Calls `work` on every item, spread over the workers."""
    items = list(items)
    if not items:
        return
    with beam.Pipeline(options=options) as pipeline:
        # Create is one bundle; the shuffle cuts it up among the workers.
        _ = pipeline | beam.Create(items) | beam.Reshuffle() | beam.ParDo(_Each(work))


class _Each(beam.DoFn):
    def __init__(self, work: Callable[[Any], None]):
        self._work = work

    def process(self, element: Any) -> Iterator[Any]:
        self._work(element)
        return iter(())


def write_shards(
    job: Job, units: list[Unit], starts: list[int], shards: int, options: PipelineOptions
) -> None:
    """Finds duplicates among all units' records and writes the shards that are not there yet."""

    def by_shard(record: Record) -> tuple[int, Record]:
        return shard_of(record[1], shards), record

    with beam.Pipeline(options=options) as pipeline:
        records = (
            pipeline
            | "Units" >> beam.Create(units)
            | beam.Reshuffle()
            | "Records" >> beam.FlatMap(job.records)
        )
        candidates = records | "Candidates" >> beam.Filter(lambda record: not record[2])
        drops = _exact(candidates)
        if job.rules.near_distance is not None:
            drops = (drops, _near(job, candidates)) | beam.Flatten()
        drops = drops | "DropsByShard" >> beam.MapTuple(
            lambda own_id, drop: (shard_of(own_id, shards), drop)
        )
        grouped = {
            # A shard without examples must be written too.
            "shards": pipeline | "Shards" >> beam.Create([(i, None) for i in range(shards)]),
            "records": records | "ByShard" >> beam.Map(by_shard),
            "drops": drops,
        } | beam.CoGroupByKey()
        _ = grouped | "Write" >> beam.ParDo(_WriteShard(job, shards, starts))


def _exact(candidates: Any) -> Any:
    """(id, drop) of every example whose bytes an earlier one has."""

    def drops(group: tuple[bytes, Iterable[tuple[str, int]]]) -> Iterator[tuple[str, Drop]]:
        members = list(group[1])
        ids = {position: own for own, position in members}
        for position, kept in exact_duplicates(members):
            yield ids[position], (position, Dropped.DUPLICATE_BYTES.value, kept)

    return (
        candidates
        | "ByBytes" >> beam.Map(lambda record: (record[4], (record[1], record[0])))
        | "SameBytes" >> beam.GroupByKey()
        | "BytesDrops" >> beam.FlatMap(drops)
    )


def _near(job: Job, candidates: Any) -> Any:
    """(id, drop) of every example that is near an earlier one; some are found in several bands."""
    distance = job.rules.near_distance or 0

    def spread(record: Record) -> Iterator[tuple[int, tuple[str, int, int, bytes]]]:
        for key in bands(record[5], distance):
            yield key, (record[1], record[0], record[5], record[6])

    def drops(group: tuple[int, Iterable[Any]]) -> Iterator[tuple[str, Drop]]:
        members = list(group[1])
        ids = {position: own for own, position, _, _ in members}
        for drop in job.near_duplicates(members):
            yield ids[drop[0]], drop

    return (
        candidates
        | "Bands" >> beam.FlatMap(spread)
        | "SameBand" >> beam.GroupByKey()
        | "NearDrops" >> beam.FlatMap(drops)
    )


class _WriteShard(beam.DoFn):
    def __init__(self, job: Job, shards: int, starts: list[int]):
        self._job, self._shards, self._starts = job, shards, starts

    def process(self, element: tuple[int, dict[str, Any]]) -> Iterator[Any]:
        shard, groups = element
        self._job.write_shard(shard, self._shards, self._starts, groups["records"], groups["drops"])
        return iter(())
