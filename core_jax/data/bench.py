"""The input pipeline alone: images per second and core, and what a pod of each size needs.

    python -m core_jax.data.bench --from ~/datasets/laion/1.0.0 --size 768 [--json FILE]
    python -m core_jax.data.bench --from PATH --images-per-chip 2 --step-seconds 1.9
    python -m core_jax.data.bench --from PATH --images-per-second 500

Reads, decodes and crops as training does: `make_batches`, in threads of one process. CPU seconds
are counted, not only the clock's, so that the figure of a core is right on a busy machine too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core_jax.data.arguments import add_source_arguments, spec_from_arguments
from core_jax.data.bad import DataPolicy
from core_jax.data.pipeline import image_transform, make_batches
from core_jax.data.resize import CropSpec
from core_jax.data.sources import Source, open_source


@dataclasses.dataclass(frozen=True)
class Pod:
    """Machines to feed: chips in all, hosts, and vCPUs (hardware threads) of each host."""

    name: str
    chips: int
    hosts: int
    vcpus: int


# vCPUs of a host: ct5lp-hightpu-4t 112, ct5p-hightpu-4t 208, ct6e-standard-4t 180,
# a3-ultragpu-8g 224 (Compute Engine's machine types, as of 2026). The number in v5p's names counts
# cores, two a chip; in the others' it counts chips.
PODS = (
    Pod("v5e-16", 16, 4, 112), Pod("v5e-64", 64, 16, 112), Pod("v5e-256", 256, 64, 112),
    Pod("v5p-8", 4, 1, 208), Pod("v5p-64", 32, 8, 208), Pod("v5p-256", 128, 32, 208),
    Pod("v6e-16", 16, 4, 180), Pod("v6e-64", 64, 16, 180), Pod("v6e-256", 256, 64, 180),
    Pod("8xH200", 8, 1, 224),
)  # fmt: skip


def measure(
    source: Source, crop: CropSpec, *, threads: int, batch_size: int = 32, batches: int = 8
) -> dict[str, Any]:
    """Runs the training pipeline for some batches, after one that is not counted.

    Args:
        source: Where examples come from.
        crop: What becomes of each.
        threads: Threads that read and decode.
        batch_size: Examples a batch.
        batches: Batches that are measured.

    Returns:
        JSON-like: threads, images, seconds, cpu_seconds (of all threads), images_per_second,
        images_per_core_second, cores_used, bad (refused examples that were met).
    """
    batch_size = min(batch_size, len(source))
    policy = DataPolicy(max_bad_fraction=1.0)
    with make_batches(
        source, batch_size=batch_size, seed=0, transform=image_transform(crop), policy=policy,
        num_threads=threads, prefetch_batches=1,
    ) as stream:  # fmt: skip
        next(stream)
        began, cpu = time.perf_counter(), time.process_time()
        for _ in range(batches):
            next(stream)
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        bad = stream.bad.met
    images = batches * batch_size
    return {
        "threads": threads, "images": images, "seconds": seconds, "cpu_seconds": cpu,
        "images_per_second": images / seconds, "images_per_core_second": images / cpu,
        "cores_used": cpu / seconds, "bad": bad,
    }  # fmt: skip


def pod_needs(
    images_per_core_second: float,
    *,
    images_per_second: float | None = None,
    images_per_chip: float | None = None,
    step_seconds: float | None = None,
    pods: Sequence[Pod] = PODS,
) -> list[dict[str, Any]]:
    """What each pod's hosts must do.

    Args:
        images_per_core_second: As measured.
        images_per_second: Of the whole job, the same for each pod; or
        images_per_chip: of the batch, with
        step_seconds: the duration of a step, so that a larger pod takes more images.
        pods: Those to tell about.

    Returns:
        JSON-like rows: pod, chips, hosts, vcpus (of a host), most_images_per_second (all vCPUs of
        all hosts decoding), and, where asked for: images_per_second, cores (of all hosts),
        cores_per_host, share (of the host's vCPUs), fed (whether they suffice).

    Raises:
        ValueError: Both kinds of demand, half of one, or one that is not positive.
    """
    per_step = (images_per_chip, step_seconds)
    if (images_per_chip is None) != (step_seconds is None):
        raise ValueError("images per chip and the seconds of a step go together")
    if images_per_second is not None and images_per_chip is not None:
        raise ValueError("give images per second, or images per chip and step, not both")
    if any(value is not None and not value > 0 for value in (images_per_second, *per_step)):
        raise ValueError("what is asked for must be larger than 0")
    rows = []
    for pod in pods:
        row: dict[str, Any] = dataclasses.asdict(pod)
        row["most_images_per_second"] = images_per_core_second * pod.hosts * pod.vcpus
        rate = images_per_second
        if images_per_chip is not None and step_seconds is not None:
            rate = pod.chips * images_per_chip / step_seconds
        if rate is not None:
            cores = rate / images_per_core_second
            row |= {
                "images_per_second": rate, "cores": cores, "cores_per_host": cores / pod.hosts,
                "share": cores / pod.hosts / pod.vcpus, "fed": cores <= pod.hosts * pod.vcpus,
            }  # fmt: skip
        rows.append(row)
    return rows


def format_report(report: dict[str, Any]) -> str:
    """The report as a page of text."""
    lines = [f"{report['what']}, {report['cpu']}, {report['cpus']} CPUs here", ""]
    lines.append("threads  images/s  images/s a core  cores used  refused")
    lines += [
        f"{row['threads']:7d}  {row['images_per_second']:8.1f}"
        f"  {row['images_per_core_second']:15.1f}  {row['cores_used']:10.2f}  {row['bad']:7d}"
        for row in report["measured"]
    ]
    lines += ["", f"{'':9}chips  hosts  vCPUs a host  feeds at most images/s"]
    asked = "images_per_second" in report["pods"][0]
    if asked:
        lines[-1] += "   needs  cores a host  share"
    for row in report["pods"]:
        line = (
            f"{row['name']:8} {row['chips']:5d}  {row['hosts']:5d}  {row['vcpus']:12d}"
            f"  {row['most_images_per_second']:22.0f}"
        )
        if asked:
            line += (
                f"  {row['images_per_second']:6.0f}  {math.ceil(row['cores_per_host']):12d}"
                f"  {row['share']:5.0%}" + ("" if row["fed"] else "  too few")
            )
        lines.append(line)
    lines += ["", "By the images a second of a core here; a vCPU is a hardware thread, and slower."]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m core_jax.data.bench", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_source_arguments(parser, prefix="from-")
    parser.add_argument("--size", type=int, default=768, help="side of the crop, in pixels")
    parser.add_argument("--crop", default="center", help="kind of the crop (docs/data.md)")
    parser.add_argument("--max-threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=8, help="batches measured, of each row")
    parser.add_argument("--images-per-second", type=float, help="that the whole job must take in")
    parser.add_argument("--images-per-chip", type=float, help="of the batch; with --step-seconds")
    parser.add_argument("--step-seconds", type=float, help="duration of a training step")
    parser.add_argument("--json", help="write the report to this file too")
    given = parser.parse_args(argv)
    demand = {
        name: getattr(given, name)
        for name in ("images_per_second", "images_per_chip", "step_seconds")
    }
    try:
        pod_needs(1.0, **demand)  # before anything is measured
        crop = CropSpec(size=given.size, kind=given.crop)
        source = open_source(spec_from_arguments(given))
        counts = sorted({min(2**i, given.max_threads) for i in range(given.max_threads)})
        if not counts or given.batches < 1 or given.batch_size < 1:
            raise ValueError("threads, batches and the batch size are at least 1")
        measured = [
            measure(
                source, crop, threads=n, batch_size=given.batch_size, batches=given.batches
            )
            for n in counts
        ]  # fmt: skip
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report = {
        "what": f"{len(source)} examples, {given.crop} crop to {given.size}",
        "cpu": _cpu_name(), "cpus": os.cpu_count(), "measured": measured,
        # The row with the most threads: they share one interpreter, and that costs something.
        "pods": pod_needs(measured[-1]["images_per_core_second"], **demand),
    }  # fmt: skip
    print(format_report(report))
    if given.json:
        Path(given.json).write_text(json.dumps(report, indent=1))
    return 0


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


if __name__ == "__main__":
    sys.exit(main())
