"""Prints what a launch would do; `--execute` does it. docs/launching.md has examples.

python -m launch <local|tpu_vm|mig|gke|slurm> --config ... --topology ... -- MODULE FLAGS
python -m launch <logs|status|delete> <tpu_vm|mig|gke|slurm> --name ...
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence

from core_jax.code_version import code_version
from launch import gke, local, mig, slurm, tpu_vm
from launch.artifact import Artifact, Step
from launch.machines import ACCELERATORS, Slice, SliceError, find_slice
from launch.request import LaunchError, Request, check_name
from launch.supervisor import Supervisor

CLOUD = ("tpu_vm", "mig")
REMOTE = (*CLOUD, "gke", "slurm")
VERBS = ("logs", "status", "delete")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the status for the shell."""
    words = list(sys.argv[1:] if argv is None else argv)
    own, command = words, []
    if "--" in words:
        at = words.index("--")
        own, command = words[:at], words[at + 1 :]
    args = _parser().parse_args(own)
    try:
        if args.target in VERBS:
            return _carry_out(_verb(args), args.execute)
        job = _request(args, command)
        if args.target == "local":
            return _local(job, args)
        return _carry_out(_launch(job, args), args.execute)
    except (LaunchError, SliceError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    families = ", ".join(
        f"{name}:{row.shapes[-1]}" if row.shapes else f"{name}:2x4"
        for name, row in ACCELERATORS.items()
    )
    parser = argparse.ArgumentParser(
        prog="python -m launch", allow_abbrev=False,
        description="Prints the commands or the manifest of a launch; --execute runs them.",
    )  # fmt: skip
    targets = parser.add_subparsers(dest="target", required=True, metavar="TARGET")
    for name in ("local", *REMOTE):
        one = targets.add_parser(name, help=f"start on {name}", allow_abbrev=False)
        _add_request(one, families, needs_topology=name != "local")
        if name == "local":
            _add_local(one)
        else:
            one.add_argument("--spot", action="store_true", help="machines that may be taken away")
            one.add_argument("--bucket", default="", help="mounted at /bucket on every host")
        _add_place(one, name, starting=True)
    for verb in VERBS:
        one = targets.add_parser(verb, help=f"{verb} of what was started", allow_abbrev=False)
        where = one.add_subparsers(dest="where", required=True, metavar="TARGET")
        for name in REMOTE:
            inner = where.add_parser(name, allow_abbrev=False)
            inner.add_argument("--name", required=True)
            inner.add_argument("--execute", action="store_true")
            if name == "tpu_vm":
                inner.add_argument("--slices", type=int, default=1)
            _add_place(inner, name, starting=False)
    return parser


def _add_request(one: argparse.ArgumentParser, families: str, needs_topology: bool) -> None:
    one.add_argument("--config", required=True, help="experiment file, with its :variant")
    one.add_argument("--topology", required=needs_topology, default="", help=f"such as {families}")
    one.add_argument("--slices", type=int, default=1, help="with GPUs: nodes")
    one.add_argument("--workdir", default="", help="the same path on every host")
    one.add_argument("--name", default="", help="by default the config's")
    one.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    one.add_argument(
        "--secret", action="append", default=[], metavar="NAME",
        help="variable whose value is taken from this environment",
    )  # fmt: skip
    one.add_argument("--save_seconds", type=int, default=60, help="how long a save takes at most")
    one.add_argument("--grace_seconds", type=int, default=300, help="from SIGTERM to SIGKILL")
    one.add_argument("--max_restarts", type=int, default=10)
    one.add_argument("--execute", action="store_true", help="do it, instead of printing it")


def _add_local(one: argparse.ArgumentParser) -> None:
    one.add_argument("--processes", type=int, help="instead of --topology cpu:PxD")
    one.add_argument("--devices_per_process", type=int)
    one.add_argument("--port", type=int, default=0, help="of the coordinator; 0: a free one")
    one.set_defaults(spot=False, bucket="", max_restarts=0)


def _add_place(one: argparse.ArgumentParser, target: str, *, starting: bool) -> None:
    if target in CLOUD:
        one.add_argument("--project", required=True)
        one.add_argument("--zone", required=True)
        one.add_argument("--internal_ips", action="store_true")
        if starting:
            one.add_argument("--network", default="")
            one.add_argument("--subnetwork", default="")
            one.add_argument("--service_account", default="")
    elif target == "gke":
        one.add_argument("--namespace", default="default")
        if starting:
            one.add_argument("--image", default="")
            one.add_argument("--service_account", default="")
            one.add_argument("--queue", default="", help="Kueue's local queue")
    elif target == "slurm" and starting:
        one.add_argument("--code", default="", help="folder of the checkout on the cluster")
        one.add_argument("--python", default="python", help="interpreter on the cluster")
        one.add_argument("--partition", default="")
        one.add_argument("--account", default="")
        one.add_argument("--time", default="")
        one.add_argument("--cpus_per_task", type=int, default=8)


def _request(args: argparse.Namespace, command: Sequence[str]) -> Request:
    if not command:
        raise LaunchError("after the launch's own flags comes -- and the module to run, such as "
                          "-- vlv_jax.train --config.run.steps=1000")  # fmt: skip
    pairs = [text.partition("=") for text in args.env]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise LaunchError(f"--env {wrong[0]}: write NAME=VALUE")
    if missing := [name for name in args.secret if args.execute and not os.environ.get(name)]:
        raise LaunchError(f"--secret {missing[0]}: that variable is not set in this environment")
    return Request(
        name=args.name or _default_name(args.config), module=command[0], config=args.config,
        workdir=args.workdir, arguments=tuple(command[1:]), topology=_slice(args),
        slices=args.slices, env={name: value for name, _, value in pairs},
        secrets=tuple(args.secret), code=code_version(), spot=args.spot, bucket=args.bucket,
        save_seconds=args.save_seconds, grace_seconds=args.grace_seconds,
        max_restarts=args.max_restarts,
    )  # fmt: skip


def _slice(args: argparse.Namespace) -> Slice:
    if args.target == "local":
        return local.local_slice(args.topology, args.processes, args.devices_per_process)
    found = find_slice(args.topology)
    if found.accelerator.kind == "cpu":
        raise SliceError(f"{args.topology} is this machine: use local")
    return found


def _default_name(config: str) -> str:
    """configs/vlv_stage1.py:mini -> vlv-stage1-mini."""
    path, _, variant = config.partition(":")
    words = f"{pathlib.PurePath(path).stem} {variant}".lower()
    return re.sub(r"[^a-z0-9]+", "-", words).strip("-")[:40].rstrip("-")


def _local(job: Request, args: argparse.Namespace) -> int:
    python = sys.executable or "python"
    if not args.execute:
        print(local.text(job, port=args.port), end="")
        return 0
    flags = os.environ.get("XLA_FLAGS", "")
    supervisor = Supervisor(grace_seconds=job.grace_seconds)
    fate = supervisor.run(
        lambda: local.processes(
            job, port=args.port or local.free_port(), python=python, xla_flags=flags
        ),
        max_restarts=job.max_restarts,
    )
    return fate.status


def _launch(job: Request, args: argparse.Namespace) -> Artifact:
    if args.target in CLOUD:
        module = tpu_vm if args.target == "tpu_vm" else mig
        if job.topology.accelerator.kind != "tpu":
            raise SliceError(f"{args.target} launches TPUs; GPUs are launched by slurm")
        return module.launch(job, _place(args))
    if args.target == "gke":
        return gke.launch(job, _cluster(args))
    return slurm.launch(
        job,
        slurm.Partition(
            code=args.code, python=args.python, partition=args.partition, account=args.account,
            time=args.time, cpus_per_task=args.cpus_per_task,
        ),
    )  # fmt: skip


def _place(args: argparse.Namespace) -> tpu_vm.Place:
    return tpu_vm.Place(
        project=args.project, zone=args.zone, internal_ips=args.internal_ips,
        network=getattr(args, "network", ""), subnetwork=getattr(args, "subnetwork", ""),
        service_account=getattr(args, "service_account", ""),
    )  # fmt: skip


def _cluster(args: argparse.Namespace) -> gke.Cluster:
    return gke.Cluster(
        image=getattr(args, "image", ""), namespace=args.namespace,
        service_account=getattr(args, "service_account", ""), queue=getattr(args, "queue", ""),
    )  # fmt: skip


def _verb(args: argparse.Namespace) -> Artifact:
    check_name(args.name)
    if args.where == "tpu_vm":
        return getattr(tpu_vm, args.target)(args.name, args.slices, _place(args))
    if args.where == "mig":
        return getattr(mig, args.target)(args.name, _place(args))
    if args.where == "gke":
        return getattr(gke, args.target)(args.name, _cluster(args))
    return getattr(slurm, args.target)(args.name)


def _carry_out(artifact: Artifact, execute: bool) -> int:
    if not execute:
        print(artifact.text, end="")
        return 0
    for step in artifact.steps:
        if status := run_step(step):
            return status
    return 0


def run_step(step: Step) -> int:
    """Runs one step; the status of its command.

    Raises:
      LaunchError: the program is not installed.
    """
    given = step.stdin or ""
    if step.secret_stdin:
        given = "".join(f"{name}={os.environ[name]}\n" for name in step.secret_stdin)
    try:
        return subprocess.run(step.words, text=True, check=False, input=given).returncode
    except FileNotFoundError:
        raise LaunchError(f"{step.words[0]} is not installed here, or not in PATH") from None


if __name__ == "__main__":
    sys.exit(main())
