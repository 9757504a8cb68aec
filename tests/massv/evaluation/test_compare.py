"""Several measured runs in one report."""

import json

import pytest

from massv_jax.compare import main, parse_arms
from massv_jax.evaluation.arms import RECORDS, make_arm, read_lines
from massv_jax.evaluation.prompts import EvaluationError

KEY = ("descriptions", 0.0, 5)


def _line(arm, name, emitted, rounds, temperature=0.0):
    return {
        "id": name, "task": "descriptions", "arm": arm, "temperature": temperature, "gamma": 5,
        "tokens": emitted, "rounds": rounds, "emitted": emitted, "judged": [rounds, rounds],
        "accepted": [emitted - rounds, 0],
    }  # fmt: skip


def _write(folder, lines):
    folder.mkdir(parents=True)
    (folder / RECORDS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def measured(tmp_path):
    """Text alone with 2 tokens a pass; two runs of MASSV with 4 and 3."""
    first = _write(tmp_path / "a", [
        *[_line("text", f"q{i}", 20, 10) for i in range(6)],
        *[_line("massv_0", f"q{i}", 20, 5) for i in range(6)],
    ])  # fmt: skip
    second = _write(tmp_path / "b", [_line("massv_1", f"q{i}", 30, 10) for i in range(6)])
    return [str(first), str(second)]


def test_runs_of_an_arm_are_pooled(measured):
    lines = read_lines(measured)
    arm, base = (make_arm(lines, runs, KEY) for runs in (["massv_0", "massv_1"], ["text"]))
    assert arm.emitted_length().value == pytest.approx(50 / 15)
    assert arm.accepted_length().value == pytest.approx(35 / 15)
    assert arm.by_run() == pytest.approx([4.0, 3.0])
    assert arm.times(base).value == pytest.approx(50 / 15 / 2)
    assert arm.minus(base).value == pytest.approx(50 / 15 - 2)
    assert make_arm(lines, ["other"], KEY) is None


def test_distances_are_pooled_where_every_run_has_them(tmp_path):
    def line(arm, i, distance):
        return _line(arm, f"q{i}", 20, 10) | {"distance": distance, "places": 10}

    lines = read_lines([_write(tmp_path / "a", [
        *[line("massv_0", i, 2.0) for i in range(3)], *[line("massv_1", i, 4.0) for i in range(3)],
        *[_line("lookup", f"q{i}", 20, 10) for i in range(3)],
    ])])  # fmt: skip
    arm = make_arm(lines, ["massv_0", "massv_1"], KEY)
    assert arm.tvd().value == pytest.approx(0.3)
    assert make_arm(lines, ["lookup"], KEY).tvd() is None


def test_command_writes_a_section(measured, tmp_path, capsys):
    out = tmp_path / "report"
    main(["--records", *measured, "--arms", "text=text", "massv=massv_0,massv_1",
          "--baseline", "text", "--section", "massv.qwen", "--out", str(out),
          "--title", "Results"])  # fmt: skip
    found = json.loads((out / "report.json").read_text())["massv"]["qwen"]["descriptions"]["t0"]
    massv = found["gamma5"]["massv"]
    assert massv["times_text"]["value"] == pytest.approx(5 / 3)
    assert massv["times_text"]["n"] == 6
    assert "each run" in (out / "report.html").read_text()
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arms", "baseline", "message"),
    [
        (["text=text", "massv=massv_9"], "", "no task"),
        (["text=text"], "massv", "none of text"),
        (["text"], "", "name=RUN"),
        (["massv=massv_0,massv_9"], "", "massv_9: not measured"),
    ],
)
def test_wrong_arms_are_named(measured, tmp_path, arms, baseline, message):
    with pytest.raises(SystemExit, match=message):
        main(["--records", *measured, "--arms", *arms, "--baseline", baseline,
              "--section", "massv", "--out", str(tmp_path / "out")])  # fmt: skip


def test_a_run_measured_twice_is_refused(measured, tmp_path):
    _write(tmp_path / "c", [_line("text", "q0", 1, 1)])
    with pytest.raises(EvaluationError, match="two names"):
        read_lines([*measured, tmp_path / "c"])
    with pytest.raises(EvaluationError, match="first"):
        read_lines([tmp_path / "nothing"])


def test_other_questions_are_refused(measured, tmp_path):
    _write(tmp_path / "c", [_line("massv_2", "other", 1, 1)])
    lines = read_lines([*measured, tmp_path / "c"])
    with pytest.raises(EvaluationError, match="other questions"):
        make_arm(lines, ["massv_0", "massv_2"], KEY)


def test_an_arm_may_be_named_twice():
    assert parse_arms(["a=x", "a=y,z"]) == {"a": ["x", "y", "z"]}
