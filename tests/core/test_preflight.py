import dataclasses
import subprocess

import pytest

from core_jax import preflight
from core_jax.code_version import (
    CodeVersion,
    code_version,
    difference_from_launch,
    read_code_version,
)
from core_jax.preflight import PreflightError, collect_facts, disagreement


def _facts(index, **values):
    return {"host": f"host-{index}", "problem": "", "version of jax": "0.10.2", **values}


def test_agreement_is_silent():
    assert disagreement([_facts(i) for i in range(4)]) == ""


def test_the_odd_one_is_named_with_what_is_odd():
    text = disagreement([_facts(0), _facts(1), _facts(2, **{"version of jax": "0.10.1"})])
    assert "process 2 (host-2) differs" in text
    assert "version of jax: 0.10.1, elsewhere 0.10.2" in text
    assert "host-0" not in text
    assert "host-1" not in text


def test_of_two_the_first_is_the_rule():
    text = disagreement([_facts(0, mesh="1"), _facts(1, mesh="2")])
    assert "process 1 (host-1)" in text
    assert "mesh: 2, elsewhere 1" in text


def test_those_that_differ_alike_are_named_together():
    text = disagreement([_facts(i, mesh=str(int(i > 8))) for i in range(19)])
    assert "processes 0 (host-0), 1 (host-1)" in text
    assert "and 1 more" in text  # of nine, eight are named


def test_what_one_process_lacks_is_named():
    assert "x: absent, elsewhere 1" in disagreement([_facts(0, x="1"), _facts(1)])


def test_a_problem_of_one_is_told_to_all_and_one_of_all_is_the_message():
    text = disagreement([_facts(0), _facts(1), _facts(2, problem="config.x is unknown")])
    assert "process 2" in text
    assert "problem: config.x is unknown, elsewhere none" in text
    same = [_facts(i, problem="config.x is unknown") for i in range(2)]
    assert disagreement(same) == "config.x is unknown"


def test_config_values_and_mesh_are_facts_by_name():
    @dataclasses.dataclass(frozen=True)
    class Run:
        steps: int
        mesh: dict

    @dataclasses.dataclass(frozen=True)
    class Experiment:
        run: Run

    facts = collect_facts(Experiment(Run(3, {"data": -1})), extra={"--workdir": "w"})
    assert facts["config.run.steps"] == "3"
    assert facts["config.run.mesh.data"] == "-1"
    assert facts["--workdir"] == "w"
    for package in (
        "jax", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "pillow",
        "safetensors", "array_record", "grain",
    ):  # fmt: skip
        assert facts[f"version of {package}"]
    assert facts["code version"]
    assert len(facts["source files"]) == 16


def test_alone_only_an_own_problem_stops(monkeypatch):
    monkeypatch.delenv("LAUNCH_SOURCES", raising=False)
    preflight.check(None)
    with pytest.raises(PreflightError, match="is unknown"):
        preflight.check(None, problem="config.x is unknown")
    monkeypatch.setenv("LAUNCH_SOURCES", "0" * 16)
    with pytest.raises(PreflightError, match="not the code that was launched"):
        preflight.check(None)
    monkeypatch.setenv("LAUNCH_SOURCES", code_version().sources)
    preflight.check(None)


def test_code_version_sees_every_change(tmp_path):
    folder = tmp_path / "core_jax"
    folder.mkdir()
    file = folder / "a.py"
    file.write_text("x = 1\n")
    before = read_code_version(tmp_path, {"LAUNCH_COMMIT": "abc"})
    assert before.commit == "abc"  # no checkout: what the launch says
    file.write_text("x = 2\n")
    assert read_code_version(tmp_path, {}).sources != before.sources
    file.rename(folder / "b.py")
    assert read_code_version(tmp_path, {}).commit == ""


def test_code_version_of_a_checkout(tmp_path):
    def git(*words):
        own = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", "-C", tmp_path, *own, *words], check=True, capture_output=True)

    (tmp_path / "core_jax").mkdir()
    (tmp_path / "core_jax" / "a.py").write_text("x = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    found = read_code_version(tmp_path, {"LAUNCH_COMMIT": "another"})
    assert len(found.commit) == 12
    (tmp_path / "core_jax" / "a.py").write_text("x = 2\n")
    assert read_code_version(tmp_path, {}).commit == f"{found.commit}+changes"


def test_another_code_than_the_launched_one():
    found = CodeVersion(release="1", commit="", sources="aa")
    assert difference_from_launch(found, {}) == ""
    assert difference_from_launch(found, {"LAUNCH_SOURCES": "aa"}) == ""
    text = difference_from_launch(found, {"LAUNCH_SOURCES": "bb", "LAUNCH_COMMIT": "c0"})
    assert "aa" in text
    assert "commit c0" in text
