"""Starts commands as real processes, quickly: it has imported what they import, and forks.

Requests come as JSON lines on stdin: {"key", "words": [module, flag, ...], "env", "log"}; answers
go to stdout: {"key", "pid"}, and {"key", "status"} once the process has ended. No backend of jax
is started here, so that a child is as fresh as `python -m` would be.
"""

import contextlib
import ctypes
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys

_AHEAD = (
    "jax", "jax.experimental.multihost_utils", "flax.linen", "optax", "core_jax.train.loop",
    "grain", "transformers", "tokenizers", "PIL.Image", "tensorboardX", "ml_collections",
    "safetensors.flax", "array_record.python.array_record_module", "jinja2",
    "vlv_jax.training", "vlv_jax.cache", "vlv_jax.caption", "massv_jax.training",
    "massv_jax.distilling", "miniature.world",
)  # fmt: skip


def die_with_parent() -> None:
    """Linux: nothing trains on after the script was interrupted."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def main() -> None:
    die_with_parent()
    for name in _AHEAD:
        importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    keys: dict[int, str] = {}
    print(json.dumps({"ready": True}), file=answers)
    while True:
        readable, _, _ = select.select([0], [], [], 0.02)
        if readable:
            line = _line()
            if not line:
                return
            request = json.loads(line)
            pid = os.fork()
            if not pid:
                _become(request)
            keys[pid] = request["key"]
            print(json.dumps({"key": request["key"], "pid": pid}), file=answers)
        while keys:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps({"key": keys.pop(pid), "status": code}), file=answers)


def _line() -> bytes:
    """One line, byte by byte: a buffer would hide the next one from select."""
    found = b""
    while not found.endswith(b"\n"):
        if not (byte := os.read(0, 1)):
            return b""
        found += byte
    return found


def _become(request: dict) -> None:
    """The child: never returns."""
    status, copier = 70, None
    try:
        die_with_parent()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        if request["env"].get("CHAOS_FAULT", "").startswith("limit"):
            # The log is a file, too: somebody without a limit writes it.
            copier = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
            log = os.dup(copier.stdin.fileno())
            copier.stdin.close()
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (log, 1), (log, 2)):
            os.dup2(source, target)
        os.environ.update(request["env"])
        module, *words = request["words"]
        if os.environ.get("CHAOS_FAULT"):
            importlib.import_module("tests.chaos.inject.sitecustomize")  # which installs itself
        sys.argv = [module, *words]
        status = 0
        sys.modules.pop(module, None)  # imported ahead; `python -m` has it once, as __main__
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
        status = 1
    finally:
        import atexit

        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        if copier is not None:
            os.closerange(1, 3)
            os.close(log)
            with contextlib.suppress(subprocess.TimeoutExpired):
                copier.wait(10)
        os._exit(status)


if __name__ == "__main__":
    main()
