"""Before a run of several processes does anything: do all of them see the same working directory?

The same path on every host may be each host's own disk. Nothing fails then by itself: each process
finds its own checkpoints, or none, and goes on from another step than the others.
"""

import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable

import jax

from core_jax.distributed import host_names
from core_jax.preflight import HOST, PreflightError, exchange

_TOKEN, _SEEN = "token", "seen"


def check_shared(folder: pathlib.Path, *, seconds: float) -> None:
    """Stops all processes unless each sees a file that process 0 writes; every one calls it.

    Where process 0 cannot write, nothing is checked: what it does need to write there fails by
    itself, and says why.

    Args:
      folder: it is made if it is not there.
      seconds: how long a process looks for the file. No mount that hangs takes longer.

    Raises:
      PreflightError: on every process, naming those that do not see it.
    """
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    first = jax.process_index() == 0
    name = f".shared-{uuid.uuid4().hex}"
    wrote = first and _within(seconds, lambda: _write(folder / name))
    told = exchange({HOST: socket.gethostname(), _TOKEN: name if wrote else ""})
    token = told[0][_TOKEN]
    if not token:
        return
    seen = first or _within(seconds, lambda: _look(folder / token, seconds))
    everyone = exchange({HOST: socket.gethostname(), _SEEN: "yes" if seen else "no"})
    if first:
        _within(seconds, lambda: _remove(folder / token))
    blind = [i for i, facts in enumerate(everyone) if facts[_SEEN] == "no"]
    if blind:
        raise PreflightError(_message(folder, blind, [facts[HOST] for facts in everyone], seconds))


def _message(folder: pathlib.Path, blind: list[int], hosts: list[str], seconds: float) -> str:
    do = "does" if len(blind) == 1 else "do"
    return (
        f"{host_names(blind, hosts)} {do} not see within {seconds:g} s what process 0 ({hosts[0]}) "
        f"writes in {folder}, so nothing was run: --workdir must be a folder that all processes "
        "share (docs/launching.md)"
    )


def _within(seconds: float, work: Callable[[], bool]) -> bool:
    """What the work says; False if it takes longer, as on a mount that hangs."""
    said: list[bool] = []
    thread = threading.Thread(target=lambda: said.append(work()), daemon=True)
    thread.start()
    thread.join(seconds + 1)
    return bool(said and said[0])


def _write(file: pathlib.Path) -> bool:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("w") as out:
            out.write(file.name)
            out.flush()
            os.fsync(out.fileno())  # some network file systems send it only now
    except OSError:
        _remove(file)
        return False
    return True


def _look(file: pathlib.Path, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if file.read_text() == file.name:
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False


def _remove(file: pathlib.Path) -> bool:
    try:
        file.unlink(missing_ok=True)
    except OSError:
        return False
    return True
