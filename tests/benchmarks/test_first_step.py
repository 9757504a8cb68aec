"""Command to first step: what is read and written; the run itself is slow."""

import json
import os

import pytest

from benchmarks import first_step
from benchmarks.alternate import OURS, report


def test_times_come_from_the_run_s_files(tmp_path):
    lines = [{"step": 0, "time": 90.0}, {"step": 1, "time": 130.5, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (tmp_path / "run.json").write_text("{}")
    os.utime(tmp_path / "run.json", (120.0, 120.0))
    times = first_step.read_times(tmp_path, began=100.0)
    assert times == {"loaded": 20.0, "first step": 30.5}


def test_summary_has_the_common_fields(capsys):
    runs = [{"loaded": 1.0, "first step": 2.0, "end": 3.0}]
    result = first_step.summary({"cold": runs, "warm": runs}, "mini", "command", [0.0])
    assert result["measures"]["warm: first step"][OURS]["median"] == 2.0
    assert set(result["measures"]) == {
        f"{kind}: {stage}" for kind in ("cold", "warm") for stage in ("loaded", "first step", "end")
    }
    report(result)
    assert "cold: end" in capsys.readouterr().out


def test_arguments_for_the_training_must_be_config_values():
    with pytest.raises(SystemExit):
        first_step.main(["--rouns=3"])


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    assert first_step.main(["--size=tiny", "--rounds=1", f"--results={tmp_path}"]) == 0
    result = json.loads((tmp_path / "first-step-tiny.json").read_text())
    assert result["measures"]["cold: first step"][OURS]["calls"] == 1
