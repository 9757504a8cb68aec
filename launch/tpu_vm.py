"""Cloud TPU VMs by queued resources: the older service, and still the one most people use.

Slices are nodes of one queued resource; with several, Cloud TPU tells each its number, and jax
reads that from the metadata (`jax.distributed`, MEGASCALE_*). Flags are those of
`gcloud compute tpus queued-resources create`; autocheckpoint, which turns maintenance into
SIGTERM, exists in the alpha command only.
"""

import dataclasses
from collections.abc import Sequence

from launch import worker
from launch.artifact import Artifact, commands, script
from launch.request import Request, check_place, check_remote
from launch.shell import Verbatim, flag, line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
    """Where resources are made.

    Attributes:
      project: Google Cloud project.
      zone: its zone.
      network, subnetwork: of the VMs; empty: the default ones.
      internal_ips: reach the VMs through Identity-Aware Proxy; they have no public addresses.
      service_account: that the VMs act as; empty: the default one.
    """

    project: str
    zone: str
    network: str = ""
    subnetwork: str = ""
    internal_ips: bool = False
    service_account: str = ""

    def flags(self) -> tuple[str, str]:
        """Project and zone."""
        return flag("project", self.project), flag("zone", self.zone)

    def tunnel(self) -> tuple[str, ...]:
        """How ssh and scp reach a VM without a public address."""
        return ("--tunnel-through-iap",) if self.internal_ips else ()


_TPUS = ("gcloud", "compute", "tpus")
_LONGEST_PAUSE = 600  # seconds between two questions that fail


def nodes(name: str, slices: int) -> list[str]:
    """Names of the slices."""
    return [name] if slices == 1 else [f"{name}-{index}" for index in range(slices)]


def create_words(job: Request, place: Place) -> tuple[str, ...]:
    """The command that asks for the slices."""
    row = job.topology.accelerator
    named = (
        (flag("node-id", job.name),)
        if job.slices == 1
        else (flag("node-count", str(job.slices)), flag("node-prefix", job.name))
    )
    optional = [
        *([flag("network", place.network)] if place.network else []),
        *([flag("subnetwork", place.subnetwork)] if place.subnetwork else []),
        *(["--internal-ips"] if place.internal_ips else []),
        *([flag("service-account", place.service_account)] if place.service_account else []),
        *(["--spot"] if job.spot else []),
    ]
    return (
        "gcloud", "alpha", "compute", "tpus", "queued-resources", "create", job.name,
        *place.flags(), *named, flag("accelerator-type", job.topology.accelerator_type),
        flag("runtime-version", row.runtime), "--autocheckpoint-enabled", *optional,
    )  # fmt: skip


def _ssh(node: str, place: Place, worker_index: str, command: str) -> tuple[str, ...]:
    return (
        *_TPUS, "tpu-vm", "ssh", node, *place.flags(), flag("worker", worker_index),
        *place.tunnel(), flag("command", command),
    )  # fmt: skip


def launch(job: Request, place: Place) -> Artifact:
    """Asks for the slices, waits, installs, starts; with spot, again whenever they are taken.

    Raises:
      LaunchError: the code is not a commit, or the working directory would not last.
      SliceError: the Cloud TPU API does not have the topology.
    """
    check_remote(job)
    check_place(job)
    names = nodes(job.name, job.slices)
    archive = Verbatim(f'"$stage/{job.name}.tar.gz"')
    install = [
        text
        for node in names
        for text in (
            line(*_TPUS, "tpu-vm", "scp", archive, f"{node}:", *place.flags(), "--worker=all",
                 *place.tunnel(), indent="  "),
            line(*_ssh(node, place, "all", worker.install_command(job)), indent="  "),
        )
    ]  # fmt: skip
    lines = [
        "#!/usr/bin/env bash",
        f"# {job.name}: {job.slices} x {job.topology.name} ({job.topology.accelerator_type}), "
        f"{job.hosts} host(s).",
        f"# Code {job.code}.",
        *_spot_note(job),
        "set -euo pipefail",
        *worker.staging(job),
        "",
        "request() {",
        line(*create_words(job, place), indent="  "),
        "}",
        *_state(job.name, place),
        "wait_until_active() {",
        "  local now",
        "  while true; do",
        "    now=$(state)",
        '    case "$now" in',
        "      ACTIVE) return ;;",
        '      FAILED | SUSPENDED) echo "the resource is $now" >&2; return 1 ;;',
        "      unknown) back_off; continue ;;",
        "    esac",
        "    pause=30",
        '    echo "waiting: $now"',
        "    sleep 30",
        "  done",
        "}",
        "install_and_start() {",
        " &&\n".join(install),
        "}",
        "",
        *(_spot_loop(job, place, names[0]) if job.spot else _once(job)),
    ]
    return script("\n".join(lines) + "\n")


def _state(name: str, place: Place) -> list[str]:
    """Shell that asks for the resource's state; what it could not learn is not taken for absence.

    A question fails for many reasons (network, quota of questions, credentials that are renewed);
    only NOT_FOUND says that there is no resource.
    """
    describe = line(
        *_TPUS, "queued-resources", "describe", name, *place.flags(),
        "--format=value(state.state)", Verbatim('2>"$stage/error"'), indent="  ",
    )  # fmt: skip
    return [
        "pause=30",
        "back_off() {",
        '  sleep "$pause"',
        f"  pause=$((pause * 2 < {_LONGEST_PAUSE} ? pause * 2 : {_LONGEST_PAUSE}))",
        "}",
        "state() {  # absent where there is no such resource, unknown where that was not learned",
        f"{describe} && return",
        '  if grep -q NOT_FOUND "$stage/error"; then',
        "    echo absent",
        "  else",
        '    cat "$stage/error" >&2',
        "    echo unknown",
        "  fi",
        "}",
    ]


def _once(job: Request) -> list[str]:
    return [
        "while now=$(state) && [ \"$now\" = unknown ]; do",
        "  back_off",
        "done",
        'if [ "$now" = absent ]; then',
        "  request",
        "fi",
        "wait_until_active",
        "install_and_start",
        f"echo 'started; follow it by: python -m launch logs tpu_vm --name={job.name} ...'",
    ]


def _spot_note(job: Request) -> list[str]:
    if not job.spot:
        return []
    return [
        "# Spot: about 30 s pass between the notice and the end. A save that takes longer is not "
        "finished,",
        "# and the run resumes from the last regular one (run.save_every).",
    ]


def _spot_loop(job: Request, place: Place, first: str) -> list[str]:
    """Keeps asking for slices until the command is done; the same run resumes on each."""
    delete = line(*delete_words(job.name, place), indent="      ")
    show = line(*_ssh(first, place, "0", worker.unit_state_command(job.name)), indent="      ")
    return [
        "started=no",
        "while true; do",
        '  case "$(state)" in',
        "    unknown)",
        "      back_off",
        "      continue",
        "      ;;",
        "    absent)",
        "      request || echo 'the request failed; trying again' >&2",
        "      started=no",
        "      ;;",
        "    ACTIVE)",
        '      if [ "$started" = no ]; then',
        "        if install_and_start; then started=yes; else sleep 10; fi",
        "        continue",
        "      fi",
        f"      unit=$({show.strip()} || true)",
        '      case "$unit" in',
        "        inactive) echo 'the command is done'; break ;;",
        "        missing) started=no ;;",
        "        failed) echo 'the command failed too often; see its logs' >&2; exit 1 ;;",
        "      esac",
        "      ;;",
        "    FAILED | SUSPENDED)",
        "      echo 'the machines were taken away; asking for others'",
        f"{delete} || true",
        "      started=no",
        "      ;;",
        "  esac",
        "  pause=30",
        "  sleep 60",
        "done",
    ]


def delete_words(name: str, place: Place) -> tuple[str, ...]:
    """Deletes the resource with its machines."""
    return (*_TPUS, "queued-resources", "delete", name, *place.flags(), "--force", "--quiet")


def logs(name: str, slices: int, place: Place) -> Artifact:
    """Follows the log of the first host, the only one that logs progress."""
    return _verb([_ssh(nodes(name, slices)[0], place, "0", worker.logs_command(name))])


def status(name: str, slices: int, place: Place) -> Artifact:
    """The resource's state, and the unit's on every host."""
    describe = (*_TPUS, "queued-resources", "describe", name, *place.flags())
    show = worker.unit_state_command(name)
    return _verb([describe, *(_ssh(node, place, "all", show) for node in nodes(name, slices))])


def delete(name: str, slices: int, place: Place) -> Artifact:
    """Stops the command, which saves, and deletes the machines."""
    stop = f"sudo systemctl stop {name}"
    stops = [_ssh(node, place, "all", stop) for node in nodes(name, slices)]
    return _verb([*stops, delete_words(name, place)], tolerate=len(stops))


def _verb(run: Sequence[tuple[str, ...]], tolerate: int = 0) -> Artifact:
    """A script of commands; the first `tolerate` of them may fail (machines that are gone)."""
    texts = [
        line(*words) + (" || true" if index < tolerate else "")
        for index, words in enumerate(run)
    ]
    return commands(texts)
