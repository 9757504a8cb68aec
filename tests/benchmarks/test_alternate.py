"""The driver: turns, ratios, what is written, and peers that are missing."""

import argparse
import json
import pathlib

import numpy as np
import pytest

from benchmarks import alternate
from benchmarks.alternate import OURS, PEER, Benchmark, UnavailableError
from benchmarks.timing import Measured, ratio, summarize
from tests.benchmarks.in_process import run_tiny


def _side(value):
    def side(arguments, folder):
        measured = Measured(facts={"cores": 2})
        measured.time("work", lambda: value, repeats=arguments.repeats)
        measured.outputs["work"] = np.asarray([value, 1.0])
        return measured

    return side


def _benchmark(**changes) -> Benchmark:
    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--size", default="tiny")

    fields = dict(
        module="tests.benchmarks.test_alternate", peer="nobody", add_arguments=add_arguments,
        name=lambda a: f"fake-{a.size}", prepare=lambda a, folder: {"parameters": 3},
        ours=_side(1.0), theirs=_side(1.0), rates=lambda a: {"work": ("things/s", 10.0)},
    )  # fmt: skip
    return Benchmark(**(fields | changes))


def test_result_has_every_field(tmp_path):
    result = run_tiny(_benchmark(), tmp_path)
    assert result["name"] == "fake-tiny"
    assert result["options"]["repeats"] == 1
    assert result["facts"] == {"parameters": 3, "cores": 2}
    assert {"command", "commit", "versions", "cpu", "time"} <= set(result["provenance"])
    work = result["measures"]["work"]
    assert set(work) == {OURS, PEER, "ratio", "rate"}
    assert {"calls", "min", "median", "max", "round_medians", "first_call"} <= set(work[OURS])
    assert work["rate"]["unit"] == "things/s"
    path = alternate.write_result(result, tmp_path / "new" / "folder")
    assert json.loads(path.read_text())["differences"] == {"work": 0.0}


def test_different_outputs_are_told(tmp_path):
    result = run_tiny(_benchmark(theirs=_side(4.0)), tmp_path)
    assert result["differences"] == {"work": 0.75}


def test_processes_take_turns(tmp_path):
    benchmark, order = _benchmark(), []

    def launch(side):
        order.append(side)
        return {"seconds": {"work": [1.0]}, "first_call": {}, "facts": {}}

    arguments = alternate.parse(benchmark, ["--rounds=2"])
    alternate.drive(benchmark, arguments, tmp_path, launch, "")
    assert order == ["prepare", "ours", "peer", "ours", "peer"]


def test_a_missing_peer_is_left_out_once(tmp_path, capsys):
    calls = []

    def theirs(arguments, folder):
        calls.append(1)
        raise UnavailableError("install it")

    result = run_tiny(_benchmark(theirs=theirs), tmp_path, "--rounds=3")
    assert len(calls) == 1
    assert result["peer_unavailable"] == "install it"
    assert "ratio" not in result["measures"]["work"]
    alternate.report(result)
    assert "the peer was not measured: install it" in capsys.readouterr().out


def test_no_peer_is_an_option(tmp_path):
    result = run_tiny(_benchmark(), tmp_path, "--no-peer")
    assert PEER not in result["measures"]["work"]


def test_nothing_to_measure_here_is_an_error(tmp_path):
    def ours(arguments, folder):
        raise UnavailableError("no device")

    with pytest.raises(SystemExit, match="no device"):
        run_tiny(_benchmark(ours=ours), tmp_path)


def test_report_points_at_a_busy_machine(tmp_path, capsys):
    result = run_tiny(_benchmark(), tmp_path)
    for load, told in ((0.1, False), (3.0, True)):
        alternate.report({**result, "busy_cores": [load]})
        assert ("NOT a quiet machine" in capsys.readouterr().out) == told


def test_the_command_leaves_the_place_of_results_out():
    argv = ["--size=mini", "--results=/a", "--results", "/b", "--rounds", "1"]
    command = alternate._command(_benchmark(), argv)
    assert command == "python -m tests.benchmarks.test_alternate --size=mini --rounds 1"


def test_a_result_has_no_place_of_a_machine():
    arguments = argparse.Namespace(
        side="ours", inside=alternate.ROOT / "runs" / "a", other=pathlib.Path("/x/b"), n=3
    )
    assert alternate._options(arguments) == {"inside": "runs/a", "other": "b", "n": 3}


def test_counts_must_be_positive():
    with pytest.raises(SystemExit):
        alternate.parse(_benchmark(), ["--rounds=0"])


def test_ratio_is_peer_over_ours():
    ours, peer = summarize([[1.0, 3.0, 2.0], [4.0]]), summarize([[4.0], [2.0]])
    assert (ours["min"], ours["median"], ours["max"], ours["calls"]) == (1.0, 2.5, 4.0, 4)
    assert ratio(ours, peer) == {"median": 3.0 / 2.5, "min": 0.5, "max": 2.0}


def test_the_first_call_and_warm_up_are_not_timed():
    measured, calls = Measured(), []
    measured.time("work", lambda: calls.append(1), repeats=3, warmup=2)
    assert len(calls) == 6
    assert len(measured.seconds["work"]) == 3
    assert measured.first_call["work"] >= 0
