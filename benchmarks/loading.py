"""Host memory while a checkpoint is loaded and saved.

    python -m benchmarks.loading [--layers=28] [--folder=/tmp] [--cases=1x1,1x8,2x4]

Writes a Qwen2.5-1.5B of random bfloat16 (3.1 GB, layers stacked when they are loaded), and for each
case, PROCESSESxDEVICES on the CPU with all devices in one `fsdp` axis, starts fresh processes that
load it with `load_model` and write it with `save_model`. This process watches theirs: the peak of
RssAnon (memory that no file stands behind), which includes Python, its packages and XLA, less the
bytes of the arrays that the process holds, must stay under the largest tensor and 300 MB. `read` is
what the kernel counted (rchar) while loading. What was saved must be the checkpoint, byte by byte.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

ALLOWANCE = 300e6
POLL_SECONDS = 0.002


@dataclasses.dataclass
class Watched:
    """A process, what it said, and its peaks of RssAnon in bytes by phase."""

    process: subprocess.Popen
    peaks: dict[str, int] = dataclasses.field(default_factory=dict)
    phase: str = "start"
    result: dict[str, Any] = dataclasses.field(default_factory=dict)

    def listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("phase "):
                self.phase = line.split()[1]
            elif line.startswith("{"):
                self.result |= json.loads(line)
            else:
                print(line, end="", flush=True)

    def poll(self) -> None:
        with contextlib.suppress(OSError, StopIteration, ValueError):
            anon = rss_anon(self.process.pid)
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), anon)


def rss_anon(pid: int | str = "self") -> int:
    """Anonymous resident bytes of a process."""
    lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("RssAnon")).split()[1]) * 1024


def bytes_read() -> int:
    """What this process has read by system calls."""
    text = pathlib.Path("/proc/self/io").read_text()
    return int(next(x for x in text.splitlines() if x.startswith("rchar")).split()[1])


def write_checkpoint(folder: pathlib.Path, layers: int) -> None:
    """A Qwen2.5-1.5B with so many layers; a few megabytes are in memory at a time."""
    import ml_dtypes
    import numpy as np

    from benchmarks.generation import qwen2_config
    from core_jax.convert.rules import derive_entries
    from core_jax.convert.safetensors_write import Outgoing, write_stream
    from core_jax.models.qwen2 import FAMILY, Qwen2ForCausalLM
    from core_jax.partition import flatten

    config = dataclasses.replace(qwen2_config("1.5b"), num_hidden_layers=layers)
    abstract = FAMILY.abstract_params(Qwen2ForCausalLM(config=config))
    shapes = {path: x.shape for path, x in flatten(abstract).items()}
    rng = np.random.default_rng(0)

    def blocks(size: int) -> Iterator[np.ndarray]:
        for start in range(0, size, 2**21):  # finite numbers below 2
            bits = rng.integers(0, 2**14, min(2**21, size - start), np.uint16)
            yield bits.view(ml_dtypes.bfloat16)

    entries = derive_entries(shapes, FAMILY.rules(config))
    tensors = [
        Outgoing(e.name, e.shape, np.dtype(ml_dtypes.bfloat16),
                 functools.partial(blocks, int(np.prod(e.shape, dtype=np.int64))))
        for e in entries
    ]  # fmt: skip
    write_stream(folder, tensors, file_name=FAMILY.file_name)
    text = json.dumps({**config.to_hf(), "dtype": "bfloat16"}, indent=2, sort_keys=True)
    (folder / "config.json").write_text(text + "\n")


def child(arguments: argparse.Namespace) -> None:
    """Loads, then saves; prints phases and figures."""
    import jax

    if arguments.processes > 1:
        jax.distributed.initialize(
            arguments.coordinator, arguments.processes, arguments.child,
            initialization_timeout=600,
        )  # fmt: skip
    from core_jax.models import load_model, save_model
    from core_jax.sharding import make_mesh

    mesh = make_mesh({"fsdp": -1}) if jax.device_count() > 1 else None
    say = functools.partial(print, flush=True)
    figures: dict[str, Any] = {"before": rss_anon()}
    say("phase load")
    read, began = bytes_read(), time.perf_counter()
    model, params = load_model(arguments.folder / "checkpoint", mesh=mesh)
    figures |= {"read": bytes_read() - read, "load_seconds": time.perf_counter() - began}
    say("phase loaded")
    shards = [s.data for x in jax.tree.leaves(params) for s in x.addressable_shards]
    # Replicas share the host's memory here, so each place counts once.
    places = {(s.unsafe_buffer_pointer(), s.nbytes) for s in shards}
    figures |= {"arrays": sum(size for _, size in places)}
    figures |= {"parameters": sum(x.nbytes for x in jax.tree.leaves(params))}
    say("phase save")
    began = time.perf_counter()
    save_model(arguments.folder / "saved", model, params)
    figures |= {"save_seconds": time.perf_counter() - began}
    say("phase end")
    say(json.dumps(figures))


def run_case(processes: int, devices: int, folder: pathlib.Path) -> list[Watched]:
    """Starts a case's processes and watches them.

    Raises:
      RuntimeError: one of them failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "benchmarks.loading", f"--processes={processes}",
        f"--coordinator=127.0.0.1:{port}", f"--folder={folder}",
    ]  # fmt: skip
    watched = [
        Watched(subprocess.Popen([*command, f"--child={i}"], env=environment, text=True,
                                 stdout=subprocess.PIPE))
        for i in range(processes)
    ]  # fmt: skip
    listeners = [threading.Thread(target=w.listen) for w in watched]
    for listener in listeners:
        listener.start()
    while any(w.process.poll() is None for w in watched):
        for w in watched:
            w.poll()
        time.sleep(POLL_SECONDS)
    for listener in listeners:
        listener.join()
    if failed := [i for i, w in enumerate(watched) if w.process.returncode]:
        raise RuntimeError(f"processes {failed} failed")
    return watched


def report(case: str, number: int, watched: Watched, largest: int) -> bool:
    """Prints a process's figures; returns whether they are within the limit."""
    r, limit = watched.result, largest + ALLOWANCE
    peaks = {phase: watched.peaks[phase] - r["arrays"] for phase in ("load", "save")}
    print(
        f"{case} process {number}: arrays {r['arrays'] / 1e6:.0f} MB, read {r['read'] / 1e6:.0f} "
        f"MB; peak RssAnon less arrays: load {peaks['load'] / 1e6:.0f} MB, save "
        f"{peaks['save'] / 1e6:.0f} MB (before loading {r['before'] / 1e6:.0f} MB; limit "
        f"{limit / 1e6:.0f} MB); load {r['load_seconds']:.1f} s, save {r['save_seconds']:.1f} s",
        flush=True,
    )
    return max(peaks.values()) <= limit


def same_bytes(one: pathlib.Path, other: pathlib.Path) -> bool:
    """Whether both folders hold the same files."""
    names = sorted(f.name for f in one.iterdir())
    if names != sorted(f.name for f in other.iterdir()):
        return False
    for name in names:
        with (one / name).open("rb") as a, (other / name).open("rb") as b:
            while block := a.read(2**22):
                if block != b.read(2**22):
                    return False
            if b.read(1):
                return False
    return True


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loading", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--folder", type=pathlib.Path, help="scratch files go below it")
    parser.add_argument("--cases", default="1x1,1x8,2x4")
    for hidden, kind in (("--child", int), ("--processes", int), ("--coordinator", str)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        child(arguments)
        return 0
    good = True
    with tempfile.TemporaryDirectory(prefix="loading-", dir=arguments.folder) as scratch:
        folder = pathlib.Path(scratch)
        (folder / "checkpoint").mkdir()
        write_checkpoint(folder / "checkpoint", arguments.layers)
        from core_jax.convert.safetensors_io import TensorReader

        reader = TensorReader(folder / "checkpoint")
        sizes = [2 * functools.reduce(int.__mul__, s, 1) for s in reader.shapes.values()]
        print(f"checkpoint of {sum(sizes) / 1e9:.2f} GB, {len(sizes)} tensors, the largest "
              f"{max(sizes) / 1e6:.0f} MB; writing it took a peak of "
              f"{own_peak() / 1e6:.0f} MB resident", flush=True)  # fmt: skip
        for case in arguments.cases.split(","):
            processes, devices = map(int, case.split("x"))
            for number, watched in enumerate(run_case(processes, devices, folder)):
                good &= report(case, number, watched, max(sizes))
            same = same_bytes(folder / "checkpoint", folder / "saved")
            print(f"{case}: what was saved is the checkpoint: {same}", flush=True)
            good &= same
            for file in (folder / "saved").iterdir():
                file.unlink()
    print("within the limit" if good else "TOO MUCH, or not the same bytes")
    return 0 if good else 1


def own_peak() -> int:
    """This process's peak of resident bytes, pages of files included."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    sys.exit(main())
