"""Faults inside a process, chosen by CHAOS_FAULT; Python imports this file at its start.

CHAOS_FAULT="kill:17:DIR" ends the process by SIGKILL right before its 17th change of a file below
DIR; "28:17:DIR" lets that change and all later ones fail with errno 28, as a full disk does.
These are changes that Python makes. "limit:4096:DIR" refuses what would make a file, anywhere,
longer than 4096 bytes: the kernel does so, to TensorStore's and ArrayRecord's C++ as well.
"""

import os
import resource
import signal
import sys
import threading

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link",
            "os.symlink")  # fmt: skip


def install(text):
    what, number, root = text.split(":", 2)
    if what == "limit":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write, not a death
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(number), resource.RLIM_INFINITY))
        return
    root = os.path.abspath(root)
    log = os.environ.get("CHAOS_COUNT", "")
    left = [int(number)]
    lock = threading.Lock()

    def below(path):
        try:
            return os.path.abspath(os.fsdecode(os.fspath(path))).startswith(root)
        except (TypeError, ValueError):
            return False

    def changes(event, args):
        if event == "open":
            path, _, flags = args
            return isinstance(flags, int) and flags & _WRITING and below(path)
        return event in _CHANGES and below(args[0])

    def hook(event, args):
        if (event != "open" and event not in _CHANGES) or not changes(event, args):
            return
        with lock:
            left[0] -= 1
            due = left[0] < 0
        if log and below(args[0]):
            os.write(2, f"CHAOS {event} {args[0]}\n".encode())
        if not due:
            return
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(int(what), os.strerror(int(what)), os.fsdecode(os.fspath(args[0])))

    sys.addaudithook(hook)


if os.environ.get("CHAOS_FAULT"):
    install(os.environ["CHAOS_FAULT"])
