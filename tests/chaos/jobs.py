"""The kinds of jobs: how each is started, and what of it must come out the same."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence

from tests.chaos import outcomes
from tests.chaos.world import World

Outcome = Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One kind of job.

    Attributes:
      name: for the table.
      module: what `python -m` runs.
      flags: `(world, references, folder) -> flags`; `references` has the uninterrupted jobs'
        folders by name, which stage 2 starts from.
      outcome: what is compared, from the folder. The job has ended if its command says so by
        status 0; an outcome that lacks something differs from the reference's.
      changed: flags of another config, which a begun folder must refuse.
      named: what the refusal must name.
      checkpoints: whether it keeps checkpoints that can be damaged.
      processes: how many share the work.
      needs: jobs whose references it reads.
    """

    name: str
    module: str
    flags: Callable[[World, Mapping[str, pathlib.Path], pathlib.Path], Sequence[str]]
    outcome: Callable[[pathlib.Path], Outcome]
    changed: Sequence[str] = ()
    named: str = ""
    checkpoints: bool = False
    processes: int = 1
    needs: Sequence[str] = ()

    def words(
        self, world: World, references: Mapping[str, pathlib.Path], folder: pathlib.Path
    ) -> list[str]:
        """Module and flags."""
        return [self.module, *self.flags(world, references, folder)]


def _stage1(world, references, folder):
    experiment = world.vlv(1)
    return [f"--config={world.config('stage1', experiment)}", f"--workdir={folder}"]


def _stage2(world, references, folder):
    experiment = world.vlv(2, init_from=str(references["vlv stage 1"]))
    return [f"--config={world.config('stage2', experiment)}", f"--workdir={folder}"]


def _phase1(world, references, folder):
    return [
        f"--config={world.config('phase1', world.massv('phase1'))}", f"--workdir={folder}",
    ]  # fmt: skip


def _phase2(world, references, folder):
    experiment = world.massv("phase2")
    experiment["run"]["init_from"] = str(references["massv phase 1"])
    return [f"--config={world.config('phase2', experiment)}", f"--workdir={folder}"]


def _cache(world, references, folder):
    return [
        f"--config={world.config('cache', world.vlv(1))}", f"--out={folder}",
        "--examples_per_shard=2", "--batch_size=2",
    ]  # fmt: skip


def _caption(world, references, folder):
    return [
        f"--workdir={references['vlv stage 2']}", f"--input={world.hub.images}",
        f"--output={folder / 'captions.jsonl'}", "--batch_size=2", "--threads=2",
        "--temperature=1.0",
    ]  # fmt: skip


def _distill(world, references, folder):
    distill = {"chunk_size": 2, "batch_size": 2, "max_new_tokens": 6, "prompt_lengths": (64, 96)}
    experiment = world.massv("distill", distill=distill)
    return [f"--config={world.config('distill', experiment)}", f"--out={folder}"]


STAGE1 = Job(
    name="vlv stage 1", module="vlv_jax.train", flags=_stage1, outcome=outcomes.of_training,
    changed=["--config.optimizer.learning_rate=0.002"], named="learning_rate", checkpoints=True,
)  # fmt: skip
JOBS = (
    STAGE1,
    dataclasses.replace(STAGE1, name="vlv stage 1, 2 processes", processes=2),
    Job(
        name="vlv stage 2", module="vlv_jax.train", flags=_stage2, outcome=outcomes.of_training,
        changed=["--config.run.seed=2"], named="seed", checkpoints=True, needs=["vlv stage 1"],
    ),
    Job(
        name="massv phase 1", module="massv_jax.train", flags=_phase1,
        outcome=outcomes.of_training, changed=["--config.data.batch_size=2"], named="batch_size",
        checkpoints=True,
    ),
    Job(
        name="massv phase 2", module="massv_jax.train", flags=_phase2,
        outcome=outcomes.of_training, changed=["--config.data.max_length=80"],
        named="max_length", checkpoints=True, needs=["massv phase 1"],
    ),
    Job(
        name="feature cache", module="vlv_jax.cache", flags=_cache,
        outcome=outcomes.of_files("*", ".*"), changed=["--config.data.crop=squash"], named="crop",
    ),
    Job(
        name="captions", module="vlv_jax.caption", flags=_caption,
        outcome=outcomes.of_files("captions.jsonl*"), changed=["--temperature=0.5"],
        named="temperature", needs=["vlv stage 1", "vlv stage 2"],
    ),
    Job(
        name="distillation", module="massv_jax.distill", flags=_distill,
        outcome=outcomes.of_files("*", ".*", "parts/*", "parts/.*"),
        changed=["--config.distill.seed=1"], named="seed",
    ),
)  # fmt: skip


def find_job(name: str) -> Job:
    return next(job for job in JOBS if job.name == name)
