"""This project and a peer in separate processes that take turns: A, B, A, B, ...

Two frameworks in one process share threads and caches and spoil each other's times, and a machine
that slows down must slow both. Each process does the same: set up, warm up, time n calls, print
one JSON line. A benchmark is a module with a `Benchmark`; its `main` is the command that people
type, and with --side the process that the driver starts.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.provenance import ROOT, busy_cores, provenance
from benchmarks.timing import Measured, ratio, summarize

PREPARE, OURS, PEER = "prepare", "ours", "peer"
RESULTS = ROOT / "benchmarks" / "results"
QUIET = 0.5

Arguments = argparse.Namespace
Side = Callable[[Arguments, pathlib.Path], Measured]
Launch = Callable[[str], dict[str, Any]]


class UnavailableError(RuntimeError):
    """This side cannot be measured here; the message has the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One comparison.

    Attributes:
      module: the module's name, to start it again.
      peer: what it is compared with, for people.
      add_arguments: adds the benchmark's own options; a `--size` is among them.
      name: options -> name of the result.
      prepare: options, scratch folder: writes what both sides read. Its facts are kept.
      ours, theirs: options, scratch folder -> what was measured. `theirs` imports its framework
        inside and raises UnavailableError without it.
      results: folder under benchmarks/results.
      rounds: processes of each side.
      repeats: timed calls of a process.
      environment: variables of the processes, where the user has not set them.
      rates: measure -> (unit, units in one call), where a rate says more than seconds.
    """

    module: str
    peer: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    name: Callable[[Arguments], str]
    prepare: Callable[[Arguments, pathlib.Path], Mapping[str, Any]]
    ours: Side
    theirs: Side
    results: str = "cpu"
    rounds: int = 3
    repeats: int = 7
    environment: Mapping[str, str] = dataclasses.field(
        default_factory=lambda: {"JAX_PLATFORMS": "cpu"}
    )
    rates: Callable[[Arguments], Mapping[str, tuple[str, float]]] = lambda arguments: {}


def main(benchmark: Benchmark, argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = parse(benchmark, argv)
    if arguments.side:
        if arguments.threads:
            restrict_cpus(arguments.threads)
        print(json.dumps(run_side(benchmark, arguments)), flush=True)
        return 0
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        result = drive(
            benchmark, arguments, pathlib.Path(folder),
            lambda side: _start(benchmark, argv, side, folder), _command(benchmark, argv),
        )  # fmt: skip
    report(result)
    path = write_result(result, arguments.results or RESULTS / benchmark.results)
    print(f"written to {path}")
    return 0


def parse(benchmark: Benchmark, argv: Sequence[str]) -> Arguments:
    """The options that every benchmark has, and its own."""
    doc = sys.modules[benchmark.module].__doc__ if benchmark.module in sys.modules else None
    parser = argparse.ArgumentParser(
        prog=f"python -m {benchmark.module}",
        description=doc or sys.modules["__main__"].__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    benchmark.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=benchmark.rounds, help="processes a side")
    parser.add_argument("--repeats", type=int, default=benchmark.repeats, help="calls a process")
    parser.add_argument(
        "--threads", type=int, default=2 if benchmark.results == "cpu" else 0,
        help="cores that each side may use; 0: all",
    )  # fmt: skip
    parser.add_argument("--no-peer", action="store_true", help="measure this project only")
    parser.add_argument("--results", type=pathlib.Path, help="where the JSON file goes")
    parser.add_argument("--side", choices=(PREPARE, OURS, PEER), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.repeats < 1:
        parser.error("--rounds and --repeats must be at least 1")
    return arguments


def restrict_cpus(count: int) -> None:
    """Both frameworks get the same cores; XLA sizes its thread pool by them."""
    os.environ.setdefault("OMP_NUM_THREADS", str(count))
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, set(allowed[:count]))


def run_side(benchmark: Benchmark, arguments: Arguments) -> dict[str, Any]:
    """What one process does; the result is its JSON line."""
    folder = arguments.folder
    if arguments.side == PREPARE:
        return {"facts": dict(benchmark.prepare(arguments, folder))}
    side = benchmark.ours if arguments.side == OURS else benchmark.theirs
    try:
        measured = side(arguments, folder)
    except UnavailableError as error:
        return {"unavailable": str(error)}
    np.savez(folder / f"{arguments.side}.npz", **measured.outputs)
    return {
        "seconds": measured.seconds,
        "first_call": measured.first_call,
        "facts": measured.facts,
    }


def drive(
    benchmark: Benchmark,
    arguments: Arguments,
    folder: pathlib.Path,
    launch: Launch,
    command: str,
) -> dict[str, Any]:
    """Runs the processes in turn and puts together what is written.

    Args:
      benchmark: what to compare.
      arguments: parsed options.
      folder: scratch, seen by every process.
      launch: side -> the JSON object that its process printed.
      command: for the record.
    """
    facts = dict(launch(PREPARE)["facts"])
    busy = [busy_cores()]
    lines: dict[str, list[dict[str, Any]]] = {OURS: [], PEER: []}
    unavailable = "left out (--no-peer)" if arguments.no_peer else None
    for number in range(arguments.rounds):
        for side in (OURS, PEER):
            if side == PEER and unavailable:
                continue
            _say(f"{side}, process {number + 1} of {arguments.rounds}")
            line = launch(side)
            if "unavailable" in line:
                if side == OURS:
                    raise SystemExit(f"error: {line['unavailable']}")
                unavailable = line["unavailable"]
                continue
            lines[side].append(line)
            busy.append(busy_cores())
    return {
        "name": benchmark.name(arguments),
        "peer": benchmark.peer,
        "peer_unavailable": unavailable,
        "options": _options(arguments),
        "facts": facts | lines[OURS][-1]["facts"],
        "peer_facts": lines[PEER][-1]["facts"] if lines[PEER] else {},
        "measures": _measures(benchmark, arguments, lines),
        "differences": _differences(folder),
        "busy_cores": busy,
        "provenance": provenance(command),
    }


def _measures(benchmark, arguments, lines) -> dict[str, Any]:
    rates = benchmark.rates(arguments)
    measures = {}
    for name in lines[OURS][0]["seconds"]:
        entry: dict[str, Any] = {}
        for side, rounds in lines.items():
            if all(name in line["seconds"] for line in rounds) and rounds:
                entry[side] = summarize([line["seconds"][name] for line in rounds])
                entry[side]["first_call"] = [line["first_call"].get(name) for line in rounds]
        if PEER in entry:
            entry["ratio"] = ratio(entry[OURS], entry[PEER])
        if name in rates:
            unit, amount = rates[name]
            entry["rate"] = {
                "unit": unit,
                **{s: amount / entry[s]["median"] for s in (OURS, PEER) if s in entry},
            }
        measures[name] = entry
    return measures


def _differences(folder: pathlib.Path) -> dict[str, float]:
    """max|a - b| / max|b| of every output that both sides have: the proof of same weights."""
    files = [folder / f"{side}.npz" for side in (OURS, PEER)]
    if not all(f.is_file() for f in files):
        return {}
    with contextlib.ExitStack() as stack:
        ours, peer = (stack.enter_context(np.load(f)) for f in files)
        found = {}
        for name in sorted(set(ours.files) & set(peer.files)):
            a, b = ours[name].astype(np.float64), peer[name].astype(np.float64)
            if a.shape != b.shape:
                raise ValueError(f"{name}: shape {a.shape} here, {b.shape} in the peer")
            found[name] = float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30))
        return found


def _options(arguments: Arguments) -> dict[str, Any]:
    """For the record: paths as seen from the repository, and no others than their names."""
    hidden = ("side", "folder", "results")
    return {k: _plain(v) for k, v in vars(arguments).items() if k not in hidden}


def _plain(value: Any) -> Any:
    if not isinstance(value, pathlib.Path):
        return value
    inside = value.is_absolute() and value.is_relative_to(ROOT)
    return str(value.relative_to(ROOT)) if inside else value.name


def _command(benchmark: Benchmark, argv: Sequence[str]) -> str:
    """As a person types it, without the place of the result, which is theirs."""
    kept, skip = [], False
    for argument in argv:
        if skip or argument.startswith("--results="):
            skip = False
        elif argument == "--results":
            skip = True
        else:
            kept.append(argument)
    return " ".join(["python -m", benchmark.module, *kept])


def _start(benchmark: Benchmark, argv: Sequence[str], side: str, folder: str) -> dict[str, Any]:
    command = [sys.executable, "-m", benchmark.module, *argv, f"--side={side}"]
    environment = {"HF_HUB_OFFLINE": "1", **benchmark.environment, **os.environ}
    done = subprocess.run(
        [*command, f"--folder={folder}"], cwd=ROOT, env=environment, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"error: the process of {side!r} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _say(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)


def report(result: Mapping[str, Any]) -> None:
    """Prints a result for people."""
    print(f"\n{result['name']}")
    for name, entry in result["measures"].items():
        for side in (OURS, PEER):
            if side not in entry:
                continue
            s = entry[side]
            label = "this project" if side == OURS else result["peer"]
            rate = entry.get("rate", {}).get(side)
            tail = f", {rate:.1f} {entry['rate']['unit']}" if rate else ""
            print(
                f"  {name:18} {label:36} min {s['min']:.4f}  median {s['median']:.4f}  max "
                f"{s['max']:.4f} s ({s['calls']} calls){tail}"
            )
        if r := entry.get("ratio"):
            print(
                f"  {name:18} peer time / our time: {r['median']:.2f} "
                f"(processes: {r['min']:.2f} to {r['max']:.2f})"
            )
    for name, value in result["differences"].items():
        print(f"  {name:18} outputs differ by {value:.1e} of their largest value")
    for name, value in result["facts"].items():
        print(f"  {name}: {value:.4g}" if isinstance(value, float) else f"  {name}: {value}")
    if result["peer_unavailable"]:
        print(f"  the peer was not measured: {result['peer_unavailable']}")
    busy = most_busy(result)
    if busy is not None and busy > QUIET:
        print(f"  others kept {busy} cores busy: NOT a quiet machine, don't keep this")


def most_busy(result: Mapping[str, Any]) -> float | None:
    """Cores that others kept busy between the processes, at most; None where that is unknown."""
    return max((x for x in result["busy_cores"] if x is not None), default=None)


def write_result(result: Mapping[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Writes NAME.json and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['name']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path
