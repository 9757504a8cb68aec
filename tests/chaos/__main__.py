"""Fault injection with real processes: `make chaos`, or

    python -m tests.chaos --root DIR --kills 200 --jobs "massv phase 1" --seed 0

Each job is run uninterrupted, and then under faults that a seed draws: killed at any moment and at
any change of a file, ended by SIGTERM, on a full or read-only disk, with damaged checkpoints, with
another config. Restarted by the same command it must come out bitwise the same. The same command
goes on after an interruption; `--seed` with `--only 1` runs one schedule again.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

from core_jax.code_version import code_version
from tests.chaos.cases import Case, Driver
from tests.chaos.jobs import JOBS
from tests.chaos.processes import Server
from tests.chaos.world import open_world


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos")
    parser.add_argument("--root", type=pathlib.Path, default=pathlib.Path("runs/chaos"))
    parser.add_argument("--kills", type=int, default=200, help="until so many processes are killed")
    parser.add_argument("--jobs", nargs="*", default=[job.name for job in JOBS])
    parser.add_argument("--seed", type=int, default=0, help="of the first case of each job")
    parser.add_argument("--only", type=int, help="so many cases of each job, whatever they kill")
    parser.add_argument("--document", type=pathlib.Path, help="where the table goes, as Markdown")
    given = parser.parse_args()
    root = given.root.expanduser().absolute()
    root.mkdir(parents=True, exist_ok=True)
    cases = run(root, given)
    text = document(cases)
    print(text)
    if given.document:
        given.document.write_text(text)
    sys.exit(any(case.wrong for case in cases))


def run(root: pathlib.Path, given: argparse.Namespace) -> list[Case]:
    """Cases in turn, one of each job, until enough processes were killed."""
    code = str(code_version())
    file = root / "cases.jsonl"
    lines = [json.loads(x) for x in file.read_text().splitlines()] if file.is_file() else []
    cases = [Case(**line["case"]) for line in lines if line["code"] == code]
    had = {(case.job, case.seed) for case in cases}
    jobs = [job for job in JOBS if job.name in given.jobs]
    with Server(root / "scratch") as server:
        driver = Driver(root, open_world(root / "world"), server)
        seed = given.seed
        while _goes_on(cases, seed - given.seed, given):
            for job in jobs:
                if (job.name, seed) in had:
                    continue
                case = driver.run(job, seed)
                cases.append(case)
                with file.open("a") as out:
                    line = {"code": code, "case": dataclasses.asdict(case)}
                    out.write(json.dumps(line) + "\n")
                state = "; ".join(case.wrong) or "the same"
                print(
                    f"{case.job}, seed {seed}: {case.kills} kills, {case.terms} SIGTERM, "
                    f"{case.seconds:g} s: {state}\n    " + "\n    ".join(case.faults),
                    flush=True,
                )  # fmt: skip
                if given.only is None and not _goes_on(cases, seed - given.seed, given):
                    break
            seed += 1
    return cases


def _goes_on(cases: list[Case], rounds: int, given: argparse.Namespace) -> bool:
    if given.only is not None:
        return rounds < given.only
    return sum(case.kills for case in cases) < given.kills


def document(cases: list[Case]) -> str:
    """The table, as docs/chaos.md has it."""
    rows = []
    for job in JOBS:
        own = [case for case in cases if case.job == job.name]
        same = sum(not case.wrong for case in own)
        if own:
            rows.append(
                f"| {job.name} | {len(own)} | {sum(c.kills for c in own)} | "
                f"{sum(c.terms for c in own)} | "
                f"{sum('changed' in f or f[0] == 'E' for c in own for f in c.faults)} | "
                f"{same} of {len(own)} |"
            )
    wrong = [f"- {c.job}, seed {c.seed}: {text}" for c in cases for text in c.wrong]
    kills = sum(case.kills for case in cases)
    return "\n".join([
        "# Killed, starved, damaged, and still the same",
        "",
        "`python -m tests.chaos` (`make chaos`) runs every kind of job under faults that a seed",
        "draws, restarts it by the same command, and compares parameters, moments, averages,",
        "metrics and output files bitwise with an uninterrupted run's.",
        "",
        f"Last result: {kills} processes killed by SIGKILL in {len(cases)} cases, "
        f"{sum(c.terms for c in cases)} ended by SIGTERM; code {code_version()}.",
        "",
        "| job | cases | kills | SIGTERM | refused writes, other configs | bitwise the same |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
        *(["What went wrong:", "", *wrong] if wrong else ["Nothing went wrong."]),
        "",
    ])  # fmt: skip


if __name__ == "__main__":
    main()
