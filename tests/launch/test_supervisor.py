"""The supervisor with processes that need no jax; test_two_processes.py has those that do."""

import io
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from launch.local import LocalProcess, environment, local_slice, processes
from launch.request import LaunchError
from launch.supervisor import Supervisor
from tests.launch.requests import request

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "


def _group(*codes):
    return [
        LocalProcess(index=i, words=(sys.executable, "-uc", code), env={})
        for i, code in enumerate(codes)
    ]


def _run(*codes, grace=20.0, patience=0.5, **options):
    out = io.StringIO()
    supervisor = Supervisor(grace_seconds=grace, patience_seconds=patience, out=out)
    return supervisor.run(lambda: _group(*codes), **options), out.getvalue()


def test_lines_have_the_number_of_their_process():
    fate, said = _run("print('a'); print('b')", "import sys; print('c', file=sys.stderr)")
    assert fate.status == 0
    assert not fate.message
    assert sorted(said.splitlines()) == ["[0] a", "[0] b", "[1] c"]


@pytest.mark.parametrize(
    ("code", "status", "how"),
    [
        ("import sys; sys.exit(3)", 3, "died with status 3"),
        ("import os; os.kill(os.getpid(), 9)", 137, "died by SIGKILL"),
    ],
)
def test_the_others_end_when_one_dies_and_it_is_named(code, status, how):
    began = time.monotonic()
    fate, said = _run(STUBBORN + "time.sleep(60)", code)
    assert time.monotonic() - began < 20
    assert fate.status == status
    assert f"[launch] process 1 {how}; process 0 was still running and was killed" in said


def test_a_failure_is_followed_by_a_restart(tmp_path):
    mark = tmp_path / "mark"
    code = f"import os, sys; new = not os.path.exists({str(mark)!r}); " \
           f"open({str(mark)!r}, 'w'); sys.exit(new)"  # fmt: skip
    fate, said = _run(code, max_restarts=2)
    assert fate.status == 0
    assert said.count("restart 1 of 2") == 1
    assert "restart 2" not in said


def _later(seconds, number):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.start()
    return timer


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_all_and_is_no_failure_to_restart_after(number):
    code = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(143)))\n"
        "print('ready')\n"
        "time.sleep(60)\n"
    )
    timer = _later(3, number)
    fate, said = _run(code, code, max_restarts=3)
    timer.join()
    assert fate.stopped
    assert fate.status == 143
    assert "[0] saved" in said
    assert "[1] saved" in said
    assert "restart" not in said
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # as it was


def test_who_does_not_end_within_the_grace_period_is_killed_and_named():
    timer = _later(2, signal.SIGTERM)
    fate, said = _run(STUBBORN + "time.sleep(60)", "import time; time.sleep(60)", grace=1.0)
    timer.join()
    assert fate.status in (137, 143)
    assert "process 0" in said


def test_output_that_nobody_reads_any_more_does_not_stop_the_run():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    supervisor = Supervisor(grace_seconds=5, out=Gone())
    fate = supervisor.run(lambda: _group("for i in range(30000): print('a long line', i)"))
    assert fate.status == 0


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told on Linux only")
def test_nobody_goes_on_when_the_launcher_is_killed(tmp_path):
    mark = tmp_path / "pid"
    inner = f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    outer = (
        "import sys; from launch.local import LocalProcess; "
        "from launch.supervisor import Supervisor; "
        f"one = LocalProcess(index=0, words=(sys.executable, '-c', {inner!r}), env={{}}); "
        "Supervisor(grace_seconds=1).run(lambda: [one])"
    )
    launcher = subprocess.Popen([sys.executable, "-c", outer])
    deadline = time.monotonic() + 30
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    pid = int(mark.read_text())
    while time.monotonic() < deadline:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True,
                               text=True, check=False).stdout.strip()  # fmt: skip
        if not state or state.startswith("Z"):
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} still runs")


def test_processes_of_a_cpu_have_their_devices_and_numbers():
    made = processes(
        request("cpu:2x4"), port=7, python="python",
        xla_flags="--xla_force_host_platform_device_count=8 --xla_x=1",
    )  # fmt: skip
    assert [p.env["JAX_PROCESS_ID"] for p in made] == ["0", "1"]
    for process in made:
        assert process.env["JAX_NUM_CPU_DEVICES"] == "4"
        assert process.env["JAX_COORDINATOR_ADDRESS"] == "127.0.0.1:7"
        assert process.env["XLA_FLAGS"] == "--xla_x=1"
        assert process.env["LAUNCH_SOURCES"] == "0123456789abcdef"


def test_one_process_is_alone_and_gpus_have_one():
    [cpu] = processes(request("cpu:1x4"), port=7, python="python")
    [gpu] = processes(request("h200:8"), port=7, python="python")
    for process in (cpu, gpu):
        assert process.env["JAX_NUM_PROCESSES"] == "1"
        assert "JAX_COORDINATOR_ADDRESS" not in process.env
    assert "JAX_PLATFORMS" not in gpu.env


def test_a_proxy_is_not_asked_for_this_machine():
    one = LocalProcess(index=0, words=("x",), env={"A": None})
    found = environment(one, {"A": "1", "https_proxy": "p", "no_proxy": "x"})
    assert found["no_proxy"] == "x,127.0.0.1"
    assert "A" not in found
    assert "no_proxy" not in environment(one, {"B": "1"})


def test_topologies_of_this_machine():
    assert local_slice("", 2, 4).name == "cpu:2x4"
    assert local_slice("h200:8", None, None).chips == 8
    with pytest.raises(LaunchError, match="not both"):
        local_slice("cpu:2x4", 2, None)
    with pytest.raises(LaunchError, match="is a TPU"):
        local_slice("v5e:4x4", None, None)
