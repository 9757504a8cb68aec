"""Processes on this machine: several on its CPU cores or GPUs, one for a whole machine."""

import dataclasses
import os
import re
import shlex
import socket
from collections.abc import Mapping

from launch.machines import Slice, find_slice
from launch.request import LaunchError, Request

_DEVICE_COUNT = re.compile(r"--xla_force_host_platform_device_count=\d+")
_PRINTED_PORT = 12321


@dataclasses.dataclass(frozen=True, kw_only=True)
class LocalProcess:
    """One process.

    Attributes:
      index: which it is.
      words: its command.
      env: variables that differ from the launcher's; None takes one away.
    """

    index: int
    words: tuple[str, ...]
    env: Mapping[str, str | None]


def local_slice(topology: str, processes: int | None, devices: int | None) -> Slice:
    """From `--topology cpu:2x4`, or from `--processes 2 --devices_per_process 4`.

    Raises:
      LaunchError: both are given, or neither.
    """
    if topology and (processes or devices):
        raise LaunchError("give --topology or --processes and --devices_per_process, not both")
    if not topology:
        return find_slice(f"cpu:{processes or 1}x{devices or 1}")
    found = find_slice(topology)
    if found.accelerator.kind == "tpu":
        raise LaunchError(f"{topology} is a TPU; local runs have --topology cpu:2x4 or h200:8")
    return found


def processes(job: Request, *, port: int, python: str, xla_flags: str = "") -> list[LocalProcess]:
    """The processes of a job.

    GPUs are driven by one process, which sees all of them; a CPU is cut into devices.

    Args:
      job: what is run.
      port: of the coordinator, on this machine only.
      python: interpreter.
      xla_flags: the launcher's XLA_FLAGS; a number of devices in it would contradict ours.

    Raises:
      LaunchError: the topology is not one machine.
    """
    if job.slices > 1:
        raise LaunchError("--slices is for remote targets; local takes --topology cpu:2x4")
    cpu = job.topology.accelerator.kind == "cpu"
    count = job.topology.hosts if cpu else 1
    common: dict[str, str | None] = dict(job.variables())
    if cpu:
        common |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(job.topology.chips_per_host),
            "XLA_FLAGS": _DEVICE_COUNT.sub("", xla_flags).strip() or None,
        }
    if count > 1:
        common |= {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
        }
    else:
        common["JAX_NUM_PROCESSES"] = "1"
    return [
        LocalProcess(
            index=index,
            words=job.words(python),
            env=common | ({"JAX_PROCESS_ID": str(index)} if count > 1 else {}),
        )
        for index in range(count)
    ]


def text(job: Request, *, python: str = "python", port: int = 0) -> str:
    """Commands that start the same processes by hand."""
    started = processes(job, port=port or _PRINTED_PORT, python=python)
    lines = [
        "#!/usr/bin/env bash",
        f"# {len(started)} process(es) on this machine, {job.topology.name}. --execute also "
        "prefixes their lines,",
        "# passes SIGTERM on to all, and ends the others when one dies.",
    ]
    background = " &" if len(started) > 1 else ""
    for process in started:
        away = [word for name, value in process.env.items() if value is None
                for word in ("-u", name)]  # fmt: skip
        here = [f"{name}={value}" for name, value in process.env.items() if value is not None]
        lines.append(shlex.join(["env", *away, *here, *process.words]) + background)
    if background:
        lines.append("wait")
    return "\n".join(lines) + "\n"


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(process: LocalProcess, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """The whole environment of a process."""
    base = os.environ if base is None else base
    merged: dict[str, str | None] = {**base, **process.env}
    if any(name.lower() in ("http_proxy", "https_proxy", "grpc_proxy") for name in base):
        # A proxy would swallow what the processes say to each other.
        merged["no_proxy"] = ",".join(filter(None, [base.get("no_proxy"), "127.0.0.1"]))
    return {name: value for name, value in merged.items() if value is not None}
