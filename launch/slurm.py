"""Slurm, for GPUs: one task a GPU; jax finds the others by Slurm's variables.

All tasks of a node see all of its GPUs, and jax takes the one with the task's local number: so
GPUs are asked for by node (`--gpus-per-node`), never by task, which would hide them.
"""

import dataclasses
import re

from launch.artifact import Artifact, Step, commands, in_turn
from launch.machines import SliceError
from launch.request import LaunchError, Request
from launch.shell import exports, line, need_secrets, quote


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
    """Where and how long.

    Attributes:
      partition: Slurm partition; empty: the default one.
      account: that is charged; empty: the default one.
      time: limit, such as 2-00:00:00; empty: the partition's.
      cpus_per_task: cores of each process.
      code: folder of the checkout on the cluster, installed in the environment of `python`.
      python: interpreter on the cluster.
    """

    code: str
    python: str = "python"
    partition: str = ""
    account: str = ""
    time: str = ""
    cpus_per_task: int = 8

    def __post_init__(self):
        # These go into #SBATCH lines, where a shell's quoting does not reach.
        for name in ("partition", "account"):
            if not re.fullmatch(r"[\w.,-]*", getattr(self, name)):
                raise LaunchError(f"--{name} {getattr(self, name)!r} is not a name")
        if not re.fullmatch(r"[\d:-]*", self.time):
            raise LaunchError(f"--time {self.time!r}: write such as 12:00:00 or 2-00:00:00")
        if not self.code:
            raise LaunchError("slurm needs --code, the folder of the checkout on the cluster")
        if self.cpus_per_task < 1:
            raise LaunchError("--cpus_per_task is at least 1")


def launch(job: Request, place: Partition) -> Artifact:
    """A batch script.

    Raises:
      SliceError: the topology is not GPUs.
    """
    if job.topology.accelerator.kind != "gpu":
        raise SliceError(f"{job.topology.name}: slurm launches GPUs, such as h200:8")
    if job.bucket:
        raise LaunchError("--bucket is for the cloud; on Slurm give a --workdir all nodes see")
    gpus = job.topology.chips
    options = {
        "job-name": job.name,
        "partition": place.partition,
        "account": place.account,
        "time": place.time,
        "nodes": str(job.slices),
        "ntasks-per-node": str(gpus),
        "gpus-per-node": str(gpus),
        "cpus-per-task": str(place.cpus_per_task),
        # To the tasks, not to this script: they save, and end with 143.
        "signal": f"TERM@{job.grace_seconds}",
        "output": f"{job.name}-%j.log",
        "open-mode": "append",
    }
    variables = job.variables() | {"JAX_PLATFORMS": job.env.get("JAX_PLATFORMS", "cuda")}
    lines = [
        "#!/usr/bin/env bash",
        *(f"#SBATCH --{name}={value}" for name, value in options.items() if value),
        "#SBATCH --requeue",
        f"# {job.name}: {job.slices} x {job.topology.name}.",
        f"# Code {job.code}: the checkout must be that, or the tasks stop.",
        "set -uo pipefail",
        *need_secrets(job.secrets),
        f"cd {quote(place.code)} || exit 1",
        *exports(variables),
        "# One that fails ends all: the others would wait for it.",
        line("srun", "--label", "--kill-on-bad-exit=1", *job.words(place.python)),
        "status=$?",
        "# 143: it has saved because the time is over or the nodes are wanted; it goes on later.",
        f'if [ "$status" -eq 143 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {job.max_restarts} ]; '
        "then",
        '  scontrol requeue "$SLURM_JOB_ID"',
        "fi",
        'exit "$status"',
    ]
    text = "\n".join(lines) + "\n"
    return Artifact(kind="shell", text=text, steps=(Step(words=("sbatch",), stdin=text),))


def logs(name: str) -> Artifact:
    """Follows the logs, in the folder from which the job was submitted."""
    return commands([f"tail --lines=200 --follow=name {name}-*.log"])


def status(name: str) -> Artifact:
    """The queue's view."""
    return in_turn(("squeue", "--me", f"--name={name}", "--long"))


def delete(name: str) -> Artifact:
    """Ends the job; its tasks get SIGTERM first."""
    return in_turn(("scancel", "--me", f"--name={name}"))
