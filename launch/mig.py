"""Compute Engine: a managed instance group that is one TPU slice (v5p and newer).

A workload policy names the topology, so that the machines are wired as a slice; the group is
filled in one piece (bulk) or not at all. There is no `--worker=all` here: the hosts are listed,
and reached one by one. jax finds the hosts of a slice by the machines' metadata.

The group repairs itself: it makes a machine anew that fails or is taken away. Where it does not
get one back, the spot watcher empties the group and asks for all of them again, since bulk mode
adds machines to an empty group only (Google's page "About bulk mode in a MIG").
"""

from launch import worker
from launch.artifact import Artifact, commands, script
from launch.machines import SliceError
from launch.request import Request, check_place, check_remote
from launch.shell import Verbatim, flag, line
from launch.tpu_vm import Place

_COMPUTE = ("gcloud", "compute")
_GROUPS = (*_COMPUTE, "instance-groups", "managed")
_PATIENCE_MINUTES = 15  # that the group's own repair gets, before all machines are asked for anew


def _region(place: Place) -> str:
    return place.zone.rpartition("-")[0]


def _create(job: Request, place: Place) -> list[str]:
    """Policy, template, group; what is there already is left as it is."""
    project, zone = place.flags()
    region = flag("region", _region(place))
    path = f"projects/{place.project}/regions/{_region(place)}/resourcePolicies/{job.name}"
    single = job.topology.hosts == 1
    network = [
        *([flag("network", place.network)] if place.network else []),
        *([flag("subnet", place.subnetwork)] if place.subnetwork else []),
        *(["--no-address"] if place.internal_ips else []),
        *([flag("service-account", place.service_account)] if place.service_account else []),
    ]
    spot = ("--provisioning-model=SPOT", "--instance-termination-action=DELETE")
    policy = line(
        *_COMPUTE, "resource-policies", "create", "workload-policy", job.name, project, region,
        "--type=HIGH_THROUGHPUT", flag("accelerator-topology", job.topology.shape), indent="    ",
    )  # fmt: skip
    template = line(
        *_COMPUTE, "instance-templates", "create", job.name, project,
        flag("machine-type", job.topology.machine),
        "--image-project=ubuntu-os-accelerator-images",
        flag("image-family", job.topology.accelerator.image),
        "--maintenance-policy=TERMINATE", "--boot-disk-size=200GB", "--scopes=cloud-platform",
        *(spot if job.spot else ()), *network, indent="    ",
    )  # fmt: skip
    group = line(
        *_GROUPS, "create", job.name, project, zone, flag("template", job.name), "--size=0",
        "--target-size-policy-mode=bulk", "--default-action-on-vm-failure=repair",
        *(() if single else (flag("workload-policy", path),)), indent="    ",
    )  # fmt: skip
    return [
        *([] if single else _unless_there(("resource-policies", "describe", job.name),
                                          (project, region), policy)),
        *_unless_there(("instance-templates", "describe", job.name), (project,), template),
        *_unless_there(("instance-groups", "managed", "describe", job.name), (project, zone),
                       group),
        line(*_GROUPS, "resize", job.name, project, zone, flag("size", str(job.hosts)),
             indent="  "),
    ]  # fmt: skip


def _unless_there(words: tuple[str, ...], where: tuple[str, ...], create: str) -> list[str]:
    look = line(Verbatim("if !"), *_COMPUTE, *words, *where, indent="  ")
    return [f"{look} >/dev/null 2>&1; then", create, "  fi"]


def _list_words(name: str, place: Place) -> tuple[str, ...]:
    return (*_GROUPS, "list-instances", name, *place.flags(), "--format=value(name)")


def _running_words(name: str, place: Place) -> tuple[str, ...]:
    """Lists the hosts that are there: a group also lists those that it has yet to make."""
    return (*_list_words(name, place), "--filter=instanceStatus=RUNNING")


def _ssh(host: str, place: Place, command: str) -> tuple[str, ...]:
    return (*_COMPUTE, "ssh", host, *place.flags(), *place.tunnel(), flag("command", command))


def launch(job: Request, place: Place) -> Artifact:
    """Makes the group, waits until it stands, installs on every host, starts.

    Raises:
      LaunchError: the code is not a commit, or the working directory would not last.
      SliceError: there are no instance groups of that topology.
    """
    check_remote(job)
    check_place(job)
    if not job.topology.accelerator.image:
        raise SliceError(f"{job.topology.name} has no instance groups; use tpu_vm or gke")
    if job.slices > 1:
        raise SliceError("a group is one slice: for several, use gke or tpu_vm")
    host = Verbatim('"$host"')
    copy = line(*_COMPUTE, "scp", Verbatim(f'"$stage/{job.name}.tar.gz"'), Verbatim('"$host:"'),
                *place.flags(), *place.tunnel(), indent="    ")  # fmt: skip
    install = line(*_ssh(host, place, worker.install_command(job)), indent="    ")
    stable = line(*_GROUPS, "wait-until", job.name, *place.flags(), "--stable", indent="  ")
    lines = [
        "#!/usr/bin/env bash",
        f"# {job.name}: {job.topology.name}, {job.hosts} x {job.topology.machine}.",
        f"# Code {job.code}.",
        "set -euo pipefail",
        *worker.staging(job),
        "",
        "request() {",
        *_create(job, place),
        "}",
        "hosts() {  # that run",
        line(*_running_words(job.name, place), indent="  "),
        "}",
        "install_on() {",
        f"{copy} </dev/null &&",
        f"{install} </dev/null",
        "}",
        "install_and_start() {  # at once on all: they wait for each other",
        "  local host pids=() pid",
        "  for host in $(hosts); do",
        '    install_on "$host" &',
        '    pids+=("$!")',
        "  done",
        '  for pid in "${pids[@]}"; do',
        '    wait "$pid" || return 1',
        "  done",
        "}",
        "wait_until_stable() {",
        stable,
        "}",
        "",
        "request",
        "wait_until_stable",
        "install_and_start || echo 'not everywhere; trying again'" if job.spot
        else "install_and_start",
        *(_spot_loop(job, place) if job.spot else []),
        *([] if job.spot else
          [f"echo 'started; follow it by: python -m launch logs mig --name={job.name} ...'"]),
    ]  # fmt: skip
    return script("\n".join(lines) + "\n")


def _spot_loop(job: Request, place: Place) -> list[str]:
    """The group makes new machines for those that were taken; they are bare and need the code."""
    show = worker.unit_state_command(job.name)
    show = line(*_ssh(Verbatim('"$host"'), place, show), indent="    ")
    resize = (*_GROUPS, "resize", job.name, *place.flags())
    emptied = line(*_GROUPS, "wait-until", job.name, *place.flags(), "--stable",
                   "--timeout=600", indent="  ")  # fmt: skip
    return [
        "",
        "# Spot: about 30 s pass between the notice and the end; see docs/launching.md.",
        "states() {",
        "  local host",
        "  for host in $(hosts); do",
        f"{show} </dev/null || echo unreachable",
        "  done | sort -u",
        "}",
        "renew() {  # in bulk mode an empty group is the only one that takes machines",
        line(*resize, "--size=0", indent="  ") + " &&",
        emptied + " &&",
        line(*resize, flag("size", str(job.hosts)), indent="  "),
        "}",
        "waited=0",
        "while true; do",
        "  sleep 60",
        "  count=$(hosts | wc -l) || continue",
        f'  if [ "$count" -lt {job.hosts} ]; then',
        "    waited=$((waited + 1))",
        f'    echo "$count of {job.hosts} hosts run"',
        f'    if [ "$waited" -ge {_PATIENCE_MINUTES} ]; then',
        "      echo 'the group does not get them back; asking for all of them again'",
        "      waited=0",
        "      renew || continue",
        "    fi",
        "    continue",
        "  fi",
        "  waited=0",
        '  case "$(states)" in',
        "    inactive) echo 'the command is done'; break ;;",
        "    # Bare machines first: on the others the command may have failed for want of them.",
        "    *missing*) install_and_start || continue ;;",
        "    *failed*) echo 'the command failed too often; see its logs' >&2; exit 1 ;;",
        "  esac",
        "done",
    ]


def _for_hosts(name: str, place: Place) -> list[str]:
    """The head of a loop over the hosts that run; a list that fails ends the script."""
    return [
        f"hosts=$({line(*_running_words(name, place))})",
        "for host in $hosts; do",
    ]


def logs(name: str, place: Place) -> Artifact:
    """Follows the log of every host; lines of the first are the run's."""
    body = line(*_ssh(Verbatim('"$host"'), place, worker.logs_command(name)), indent="  ")
    return commands([
        *_for_hosts(name, place),
        f"{body} </dev/null | sed \"s/^/[$host] /\" &",
        "done",
        "wait",
    ])  # fmt: skip


def status(name: str, place: Place) -> Artifact:
    """How many hosts run of how many, the group's machines, and the unit's state on each."""
    size = line(*_GROUPS, "describe", name, *place.flags(), "--format=value(targetSize)")
    table = line(*_GROUPS, "list-instances", name, *place.flags())
    show = line(*_ssh(Verbatim('"$host"'), place, worker.unit_state_command(name)), indent="  ")
    return commands([
        f"expected=$({size})",
        table,
        *_for_hosts(name, place),
        f"  state=$({show.strip()} </dev/null) || state=unreachable",
        '  echo "$host: $state"',
        "done",
        'present=$(echo "$hosts" | wc -w)',
        'echo "$present of $expected hosts run"',
        '[ "$present" -eq "$expected" ]',
    ])  # fmt: skip


def delete(name: str, place: Place) -> Artifact:
    """Stops the command, which saves, and deletes group, template and policy."""
    project, zone = place.flags()
    region = flag("region", _region(place))
    stop = line(*_ssh(Verbatim('"$host"'), place, f"sudo systemctl stop {name}"), indent="  ")
    list_hosts, *loop = _for_hosts(name, place)
    return commands([
        f"{list_hosts} || hosts=",  # a group that is gone must not keep the rest from going
        *loop,
        f"{stop} </dev/null || true",
        "done",
        line(*_GROUPS, "delete", name, project, zone, "--quiet"),
        line(*_COMPUTE, "instance-templates", "delete", name, project, "--quiet"),
        "# A single host has no policy.",
        line(*_COMPUTE, "resource-policies", "delete", name, project, region, "--quiet")
        + " || true",
    ])  # fmt: skip
