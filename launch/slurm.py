"""Slurm, for GPUs: one task a GPU; jax finds the others by Slurm's variables.

All tasks of a node see all of its GPUs, and jax takes the one with the task's local number: so
GPUs are asked for by node (`--gpus-per-node`), never by task, which would hide them.

The job goes back into the queue in each of these cases, and the run resumes:

- a node fails or the job is preempted: Slurm does it (`--requeue`);
- its time is over: `--signal` gives the tasks the grace period to save, and they end with 143;
- a task fails, or the watchdog ends a run that hangs: the script does it, `max_restarts` times.

What somebody cancelled does not go back.
"""

import dataclasses
import re

from core_jax.distributed import PREEMPTED
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
        "log_folder=$PWD  # where the job was submitted",
        f"cd {quote(place.code)} || exit 1",
        *exports(variables),
        "# One that fails ends all: the others would wait for it.",
        line("srun", "--label", "--kill-on-bad-exit=1", *job.words(place.python)),
        "status=$?",
        *_again(job),
        'exit "$status"',
    ]
    text = "\n".join(lines) + "\n"
    return Artifact(kind="shell", text=text, steps=(Step(words=("sbatch",), stdin=text),))


def _again(job: Request) -> list[str]:
    """Shell that sends the job back into the queue; a save on SIGTERM counts as no failure.

    Failures are counted in a file, since SLURM_RESTART_COUNT counts every return.
    """
    return [
        "again() {  # a job whose script still runs is in these states if somebody has ended it",
        '  case "$(scontrol show job "$SLURM_JOB_ID")" in',
        "    *JobState=CANCELLED* | *JobState=COMPLETING*) ;;",
        '    *) scontrol requeue "$SLURM_JOB_ID" ;;',
        "  esac",
        "}",
        f'failures="$log_folder/{job.name}-$SLURM_JOB_ID.failures"',
        'if [ "$status" -eq 0 ]; then',
        '  rm -f "$failures"',
        f'elif [ "$status" -eq {PREEMPTED} ]; then',
        "  # It has saved because its time is over or the nodes are wanted; it goes on later.",
        "  again",
        "else",
        '  echo "failed with status $status" >>"$failures"',
        f'  if [ "$(wc -l <"$failures")" -le {job.max_restarts} ]; then',
        "    again",
        "  fi",
        "fi",
    ]


def logs(name: str) -> Artifact:
    """Follows the logs, in the folder from which the job was submitted."""
    return commands([f"tail --lines=200 --follow=name {name}-*.log"])


def status(name: str) -> Artifact:
    """The queue's view."""
    return in_turn(("squeue", "--me", f"--name={name}", "--long"))


def delete(name: str) -> Artifact:
    """Ends the job; its tasks get SIGTERM first."""
    return in_turn(("scancel", "--me", f"--name={name}"))
