"""Joining the other processes of a run, before anything else of jax, and leaving them.

Whether a process belongs to a group is decided once, by `find_membership`, in this order:

1. `--num_processes 1` (or `JAX_NUM_PROCESSES=1`): it is alone, wherever it runs.
2. `--coordinator_address`, `--num_processes`, `--process_id`, or the variables of the same names
   that `python -m launch` sets (`JAX_COORDINATOR_ADDRESS`, ...).
3. Slurm, inside `srun` with more than one task.
4. A machine with TPUs: jax asks its metadata (Compute Engine) or environment (GKE).
5. Otherwise it is alone, and `jax.distributed` is not touched.

The facts about `jax.distributed` that this relies on were read in jax 0.10.2: the service on
process 0 is unauthenticated and listens on all interfaces unless told otherwise, and a process
that ends by an exception waits in its exit handler for all others, for minutes.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

COORDINATOR, COUNT, INDEX = "coordinator_address", "num_processes", "process_id"
# Flag -> variable. jax itself reads the first only.
VARIABLES = {
    COORDINATOR: "JAX_COORDINATOR_ADDRESS",
    COUNT: "JAX_NUM_PROCESSES",
    INDEX: "JAX_PROCESS_ID",
}
_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
# v4 and older, v5 and newer.
_TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
PREEMPTED = 143  # how a command ends after it has saved on SIGTERM


class DistributedError(ValueError):
    """What a launch says about its processes is incomplete or wrong, or they did not meet."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Membership:
    """How a process finds the others; what is None is found out by jax.

    Attributes:
      method: "given" in full, or what jax asks.
      coordinator_address: "host:port" of process 0.
      num_processes: in all.
      process_id: of this one, from 0.
      join_seconds: how long it waits for the others.
      heartbeat_seconds: after which a silent process counts as dead, and all end.
    """

    method: Literal["given", "slurm", "tpu"]
    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    join_seconds: int = 300
    heartbeat_seconds: int = 100


def find_membership(
    given: Mapping[str, str | int | None],
    env: Mapping[str, str],
    *,
    join_seconds: int = 300,
    heartbeat_seconds: int = 100,
    has_tpu: bool | None = None,
) -> Membership | None:
    """Decides whether this process is one of several; the module's docstring says how.

    Args:
      given: values of the flags, None where one was not given.
      env: the environment.
      join_seconds: see `Membership`.
      heartbeat_seconds: see `Membership`.
      has_tpu: whether this machine has TPUs; None looks.

    Raises:
      DistributedError: some of the three values are missing, or one is not what it must be.
    """
    told = {
        name: env.get(variable) or None if given.get(name) is None else given[name]
        for name, variable in VARIABLES.items()
    }
    count, index = _number(COUNT, told[COUNT]), _number(INDEX, told[INDEX])
    address = None if told[COORDINATOR] is None else _address(str(told[COORDINATOR]))
    if count is not None and count < 1:
        raise DistributedError(f"--{COUNT} is {count}; it must be at least 1")
    if index is not None and count is not None and not 0 <= index < count:
        raise DistributedError(f"--{INDEX} is {index}; with --{COUNT} {count} it is 0..{count - 1}")
    if count == 1:
        return None
    member = functools.partial(
        Membership, coordinator_address=address, num_processes=count, process_id=index,
        join_seconds=join_seconds, heartbeat_seconds=heartbeat_seconds,
    )  # fmt: skip
    whole = {COORDINATOR: address, COUNT: count, INDEX: index}
    if None not in whole.values():
        return member(method="given")
    if all(name in env for name in _SLURM) and int(env["SLURM_NTASKS"]) > 1:
        return member(method="slurm")
    if _on_tpu(env) if has_tpu is None else has_tpu:
        return member(method="tpu")
    if missing := [name for name, value in whole.items() if value is None]:
        if len(missing) == len(whole):
            return None
        hints = ", ".join(f"--{name} (or {VARIABLES[name]})" for name in missing)
        raise DistributedError(
            f"a run of several processes needs {hints} too; --{COUNT} 1 runs this one alone"
        )
    return None


def _number(name: str, value: str | int | None) -> int | None:
    try:
        return None if value is None else int(value)
    except ValueError:
        raise DistributedError(f"{VARIABLES[name]} is {value!r}; it must be a number") from None


def _address(text: str) -> str:
    host, colon, port = text.rpartition(":")
    if not (host and colon and port.isdigit() and 0 < int(port) < 65536):
        raise DistributedError(f"--{COORDINATOR} is {text!r}; it must be host:port of process 0")
    return text


def _on_tpu(env: Mapping[str, str]) -> bool:
    """Whether jax can use TPUs here and may ask about them."""
    elsewhere = env.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("", "tpu")
    if elsewhere or "TPU_SKIP_MDS_QUERY" in env:
        return False
    found = any(pathlib.Path(device).exists() for device in _TPU_DEVICES)
    return found and importlib.util.find_spec("libtpu") is not None


def initialize(member: Membership, *, in_step: bool = False) -> None:
    """Meets the other processes; for `in_step` see `joined`.

    Raises:
      DistributedError: they did not meet, or jax could not find out who they are.
    """
    import jax

    arguments = {
        COORDINATOR: member.coordinator_address,
        COUNT: member.num_processes,
        INDEX: member.process_id,
        "initialization_timeout": member.join_seconds,
        "heartbeat_timeout_seconds": member.heartbeat_seconds,
    }
    if member.method == "given":
        arguments["cluster_detection_method"] = "deactivate"
    elif member.method == "slurm":
        arguments["cluster_detection_method"] = "slurm"
    # Its handler of SIGTERM takes the signal's effect away; only the training loop asks it.
    jax.config.update("jax_enable_preemption_service", in_step)
    address = member.coordinator_address or ""
    if address.rpartition(":")[0] in _LOCAL_HOSTS and "JAX_COORDINATOR_BIND_ADDRESS" not in (
        os.environ
    ):
        # Anyone who reaches the service can end the run: keep it on this machine.
        arguments["coordinator_bind_address"] = address
    try:
        jax.distributed.initialize(**arguments)
    except RuntimeError as error:
        if "must be called before" in str(error):  # ours to mend, not the user's
            raise
        raise DistributedError(_not_met(member, error)) from error
    except (ValueError, OSError) as error:
        raise DistributedError(_not_met(member, error)) from error


def _not_met(member: Membership, error: Exception) -> str:
    cause = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    if member.method == "given":
        return (
            f"process {member.process_id} of {member.num_processes} did not meet the others at "
            f"{member.coordinator_address} within {member.join_seconds} s ({cause}). Were all of "
            "them started, and can they reach that port?"
        )
    return (
        f"this looks like one of several processes ({member.method}), but jax could not find the "
        f"others ({cause}). Name them by --{COORDINATOR}, --{COUNT} and --{INDEX}, or run this "
        f"one alone by --{COUNT} 1"
    )


@contextlib.contextmanager
def joined(member: Membership | None, *, in_step: bool = False) -> Iterator[None]:
    """Joins the others for the length of a command; alone, it does nothing.

    A process that fails ends at once: the ordinary way waits for processes that wait for it.

    Args:
      member: of this process.
      in_step: the command asks `core_jax.train.preemption` after every step, and saves on SIGTERM.
        In others SIGTERM has its usual effect, or that of `core_jax.stopping`.

    Raises:
      DistributedError: see `initialize`.
    """
    if member is None:
        yield
        return
    import jax

    initialize(member, in_step=in_step)
    try:
        yield
    except AllStop as stop:
        jax.distributed.shutdown()  # all come here at the same point
        raise SystemExit(f"error: {stop}") from stop
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0, PREEMPTED):
            raise
        _end_at_once(error, jax.process_index(), jax.process_count())


class AllStop(Exception):
    """Every process of the run raises this at the same point, for the same reason."""


def _end_at_once(error: BaseException, index: int, count: int) -> None:
    where = f"process {index} of {count}"
    status = 1
    if isinstance(error, SystemExit) and isinstance(error.code, int):
        status = error.code
        print(f"{where} ends with status {status}", file=sys.stderr)
    elif isinstance(error, SystemExit):
        print(f"{where}: {error.code}", file=sys.stderr)
    else:
        traceback.print_exception(error)
        print(f"{where}: {type(error).__name__}, see above", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def host_names(indices: Sequence[int], names: Sequence[str] | Mapping[int, str]) -> str:
    """'process 1 (host-b)' for people; names by the processes' numbers."""
    kind = "process" if len(indices) == 1 else "processes"
    shown = ", ".join(f"{i} ({names[i]})" for i in indices[:8])
    return f"{kind} {shown}" + (f" and {len(indices) - 8} more" if len(indices) > 8 else "")
