"""One job, one seed: faults one after another, then a run to the end, then a comparison."""

import dataclasses
import json
import pathlib
import shutil
import time

from core_jax.code_version import code_version
from tests.chaos.faults import Fault, Measured, damage_newest, draw
from tests.chaos.jobs import Job
from tests.chaos.processes import Server
from tests.chaos.world import World

SECONDS = 900  # for one start; a job that takes longer counts as hanging
_COUNT = 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What came of a job and a seed.

    Attributes:
      job, seed: which.
      kills, terms: processes that our signals ended.
      faults: what was done, and how the job ended each time.
      wrong: what differs from the uninterrupted run, or was not said clearly; empty: all is well.
      seconds: it took.
    """

    job: str
    seed: int
    kills: int
    terms: int
    faults: list[str]
    wrong: list[str]
    seconds: float


class Driver:
    """Runs cases; uninterrupted runs are kept in `root`, and made once."""

    def __init__(self, root: pathlib.Path, world: World, server: Server) -> None:
        self.root, self.world, self.server = root, world, server
        self.measured: dict[str, Measured] = {}
        self.outcomes: dict[str, dict[str, str]] = {}

    def folder(self, job: Job) -> pathlib.Path:
        return self.root / "uninterrupted" / job.name.replace(",", "").replace(" ", "-")

    @property
    def references(self) -> dict[str, pathlib.Path]:
        from tests.chaos.jobs import JOBS

        return {job.name: self.folder(job) for job in JOBS}

    def prepare(self, job: Job) -> None:
        """The uninterrupted run, which also fills the compilation cache; kept in the root."""
        from tests.chaos.jobs import find_job

        for name in job.needs:
            self.prepare(find_job(name))
        if job.name in self.measured:
            return
        folder, log = self.folder(job), self.root / "log.txt"
        code = code_version().sources  # of another version, files may differ by right
        note = folder.with_name(f"{folder.name}.{code}.json")
        if not note.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.parent.mkdir(parents=True, exist_ok=True)
            began = time.monotonic()
            running = self.server.start(
                job.words(self.world, self.references, folder), log, processes=job.processes,
                fault=f"kill:{_COUNT}:{folder}", count=True,
            )  # fmt: skip
            if any(running.wait(SECONDS)):
                raise RuntimeError(f"{job.name} fails by itself:\n{log.read_text()[-3000:]}")
            changes = log.read_text().count("CHAOS ")
            note.write_text(json.dumps([time.monotonic() - began, changes]))
        self.measured[job.name] = Measured(*json.loads(note.read_text()))
        self.outcomes[job.name] = dict(job.outcome(folder))

    def run(self, job: Job, seed: int, faults: list[Fault] | None = None) -> Case:
        """One case; `faults` in the place of those drawn from the seed."""
        self.prepare(job)
        began, folder = time.monotonic(), self.root / "case"
        shutil.rmtree(folder, ignore_errors=True)
        if faults is None:
            faults = draw(
                f"{job.name} {seed}", self.measured[job.name], checkpoints=job.checkpoints,
                processes=job.processes,
            )  # fmt: skip
        told, wrong, kills, terms = [], [], 0, 0
        for fault in faults:
            how, killed = self._suffer(job, folder, fault, wrong)
            told.append(f"{fault}: {how}")
            kills += killed and fault.signal != 15
            terms += killed and fault.signal == 15
        wrong += self._finish(job, folder)
        return Case(
            job=job.name, seed=seed, kills=kills, terms=terms, faults=told, wrong=wrong,
            seconds=round(time.monotonic() - began, 1),
        )  # fmt: skip

    def _suffer(
        self, job: Job, folder: pathlib.Path, fault: Fault, wrong: list[str]
    ) -> tuple[str, bool]:
        """How it went, and whether a process was ended by a signal of ours."""
        if fault.kind in ("cut", "no marker"):
            return damage_newest(folder, fault.kind) or "no older checkpoint: left alone", False
        words = job.words(self.world, self.references, folder)
        if fault.kind == "changed":
            return self._refused(job, folder, [*words, *job.changed], wrong), False
        log = self.root / "log.txt"
        running = self.server.start(
            words, log, processes=job.processes, fault=fault.inside(folder), victim=fault.victim
        )
        hit = False
        if fault.signal:
            wake = time.monotonic() + fault.share * self.measured[job.name].seconds
            while time.monotonic() < wake and None in running.statuses():
                self.server.pump(0.02)
            hit = running.send(fault.signal, fault.victim)
        statuses = running.wait(SECONDS)
        hit = hit or statuses[fault.victim] == -9
        text = log.read_text(errors="replace")
        refused = fault.kind in ("errno", "limit")
        if refused and statuses[fault.victim] not in (0, -9) and not is_clear(text):
            wrong.append(f"{fault}: not said clearly: {_last_line(text)}")
        if refused and any(statuses):
            return f"ended {statuses}: {_said(text)}", False
        return f"ended {statuses}", hit

    def _refused(self, job: Job, folder: pathlib.Path, words: list[str], wrong: list[str]) -> str:
        """Another config must be refused where there is something to be mixed up with."""
        if not _is_begun(folder):
            return "nothing begun: left out"
        log = self.root / "log.txt"
        statuses = self.server.start(words, log, processes=job.processes).wait(SECONDS)
        text = log.read_text(errors="replace")
        if all(status == 0 for status in statuses):
            wrong.append("another config was taken without a word")
        elif not is_clear(text) or job.named not in text[text.rindex("error: ") :]:
            wrong.append(f"another config was refused without naming {job.named}")
        return f"ended {statuses}: {_said(text)}"

    def _finish(self, job: Job, folder: pathlib.Path) -> list[str]:
        log = self.root / "log.txt"
        words = job.words(self.world, self.references, folder)
        statuses = self.server.start(words, log, processes=job.processes).wait(SECONDS)
        if any(statuses):
            text = log.read_text(errors="replace")
            (self.root / "failed-log.txt").write_text(text)
            return [f"the same command does not end well: {statuses}: {_last_line(text)}"]
        want, got = self.outcomes[job.name], job.outcome(folder)
        names = sorted(want.keys() | got.keys())
        return [
            f"{name}: {got.get(name, 'missing')}, uninterrupted {want.get(name, 'missing')}"
            for name in names
            if want.get(name) != got.get(name)
        ][:12]


def _is_begun(folder: pathlib.Path) -> bool:
    """Whether there is a result that another config's could be mixed with."""
    steps = [p for p in (folder / "checkpoints").glob("*") if p.name.isdigit()]
    captions = folder / "captions.jsonl"
    has_captions = captions.is_file() and captions.stat().st_size > 0
    return (
        bool(steps)
        or has_captions
        or any((folder / name).is_file() for name in ("manifest.json", "distill.json"))
    )


def is_clear(text: str) -> bool:
    """Whether the command's last word is what is wrong; orbax's threads log tracebacks before.

    The word may take several lines, of all settings that differ, say.
    """
    _, said, after = text.rpartition("error: ")
    return bool(said) and "Traceback" not in after


def _said(text: str) -> str:
    lines = [line for line in text.splitlines() if "error: " in line]
    return lines[-1][:200] if lines else _last_line(text)


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip() and "CHAOS " not in line]
    return lines[-1][:200] if lines else "nothing"
