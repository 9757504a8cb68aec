import dataclasses
import json
import sys

import pytest

from launch import __main__ as command_line
from launch import gke, mig, slurm, tpu_vm
from launch.machines import ACCELERATORS, SliceError, find_slice
from launch.request import LaunchError
from launch.shell import here_document
from tests.launch.requests import CLUSTER, CODE, PLACE, request


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "kind", "machine"),
    [
        ("v4:2x2x4", 16, 4, "v4-32", "ct4p-hightpu-4t"),
        ("v5e:1x1", 1, 1, "v5litepod-1", "ct5lp-hightpu-1t"),
        ("v5e:2x4", 8, 1, "v5litepod-8", "ct5lp-hightpu-8t"),
        ("v5e:16x16", 256, 64, "v5litepod-256", "ct5lp-hightpu-4t"),
        ("v5p:4x4x8", 128, 32, "v5p-256", "ct5p-hightpu-4t"),
        ("v6e:4x4", 16, 4, "v6e-16", "ct6e-standard-4t"),
    ],
)
def test_rows_of_the_table(name, chips, hosts, kind, machine):
    found = find_slice(name)
    assert (found.chips, found.hosts) == (chips, hosts)
    assert (found.accelerator_type, found.machine) == (kind, machine)


def test_every_row_has_a_machine():
    for family, row in ACCELERATORS.items():
        for shape in row.shapes:
            found = find_slice(f"{family}:{shape}")
            assert found.chips_per_host * found.hosts == found.chips
            if row.kind == "tpu":
                assert found.machine


@pytest.mark.parametrize("name", ["v9:2x2", "v5e:3x3", "v5e", "cpu:2", "h200:3", ""])
def test_unknown_topologies_are_named(name):
    with pytest.raises(SliceError, match=r"unknown|write"):
        find_slice(name)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "Upper"}, "lower-case"),
        ({"name": "a" * 41}, "at most 40"),
        ({"module": "rm -rf"}, "the module to run"),
        ({"workdir": "gs://bucket/run"}, "give --bucket"),
        ({"workdir": "a\nb"}, "line break"),
        ({"arguments": ("--token=hf_" + "a" * 30,)}, "looks like an access token"),
        ({"env": {"HF_TOKEN": "x"}}, "--secret HF_TOKEN"),
        ({"env": {"WANDB_API_KEY": "x"}}, "--secret WANDB_API_KEY"),
        ({"env": {"a b": "x"}}, "not a variable"),
        ({"env": {"JAX_PROCESS_ID": "1"}}, "set by the launch"),
        ({"secrets": ("$(x)",)}, "not a variable"),
        ({"bucket": "gs://x"}, "without gs://"),
        ({"save_seconds": 300}, "cut short"),
        ({"slices": 0}, "at least 1"),
    ],
)
def test_what_is_wrong_is_named(changes, match):
    with pytest.raises(LaunchError, match=match):
        request("v5e:4x4", **changes)


def test_only_a_commit_is_sent():
    for commit in ("", "0123456789ab+changes"):
        code = dataclasses.replace(CODE, commit=commit)
        with pytest.raises(LaunchError, match="Commit them first"):
            tpu_vm.launch(request("v5e:4x4", code=code), PLACE)


def test_a_working_directory_that_goes_with_the_code_is_refused():
    job = request("v6e:4x4", workdir="runs/a")
    for start in (
        lambda: tpu_vm.launch(job, PLACE), lambda: mig.launch(job, PLACE),
        lambda: gke.launch(job, CLUSTER),
    ):  # fmt: skip
        with pytest.raises(LaunchError, match="runs/a is relative"):
            start()


def test_each_service_refuses_what_it_does_not_have():
    with pytest.raises(SliceError, match="gke or mig"):
        tpu_vm.launch(request("tpu7x:2x2x2"), PLACE)
    with pytest.raises(SliceError, match="no instance groups"):
        mig.launch(request("v5e:4x4"), PLACE)
    with pytest.raises(SliceError, match="one slice"):
        mig.launch(request("v6e:4x4", slices=2), PLACE)
    with pytest.raises(SliceError, match="slurm launches GPUs"):
        slurm.launch(request("v6e:4x4"), slurm.Partition(code="c"))


@pytest.mark.parametrize("bad", [{"partition": "a\n#SBATCH"}, {"time": "x"}, {"account": "a b"}])
def test_batch_options_are_names(bad):
    with pytest.raises(LaunchError):
        slurm.Partition(code="c", **bad)


def test_a_here_document_cannot_be_left():
    with pytest.raises(ValueError, match="has a line"):
        here_document("x", "a\nEND\nrm -rf", end="END")


def _main(capsys, *words):
    status = command_line.main(words)
    return status, capsys.readouterr()


def test_printing_is_the_default(capsys):
    status, said = _main(
        capsys, "local", "--config=c.py:mini", "--processes=2", "--devices_per_process=4",
        "--workdir=w", "--", "vlv_jax.train", "--config.run.steps=1",
    )  # fmt: skip
    assert status == 0
    assert said.out.count("JAX_PROCESS_ID=") == 2
    assert "--config.run.steps=1" in said.out


def test_verbs_are_apart(capsys):
    where = ("--name=n", "--project=p", "--zone=z-a")
    for verb, word in (("logs", "journalctl"), ("status", "describe"), ("delete", "delete")):
        status, said = _main(capsys, verb, "tpu_vm", *where)
        assert status == 0
        assert word in said.out


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("local", "--config=c"), "comes -- and the module"),
        (("local", "--config=c", "--topology=v5e:4x4", "--", "a.b"), "is a TPU"),
        (("local", "--config=c", "--topology=cpu:1x1", "--processes=2", "--", "a.b"), "not both"),
        (("local", "--config=c", "--env=A", "--", "a.b"), "NAME=VALUE"),
        (("slurm", "--config=c", "--topology=h200:8", "--", "a.b"), "needs --code"),
        (("gke", "--config=c", "--topology=cpu:1x1", "--", "a.b"), "use local"),
        (("delete", "slurm", "--name=$(x)"), "lower-case"),
    ],
)
def test_mistakes_end_with_one_line(capsys, words, match):
    status, said = _main(capsys, *words)
    assert status == 2
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    assert match in said.err


def test_execute_runs_the_steps_and_feeds_secrets(monkeypatch, tmp_path):
    seen = tmp_path / "seen"
    monkeypatch.setenv("MY_TOKEN", "v")
    code = f"import sys; open({json.dumps(str(seen))}, 'w').write(sys.stdin.read())"
    step = command_line.Step(words=(sys.executable, "-c", code), secret_stdin=("MY_TOKEN",))
    assert command_line.run_step(step) == 0
    assert seen.read_text() == "MY_TOKEN=v\n"
    with pytest.raises(LaunchError, match="no-such-program is not installed"):
        command_line.run_step(command_line.Step(words=("no-such-program",)))
