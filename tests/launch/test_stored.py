"""Plans that are kept: what makes one stale, their table, and the jobs they are made of."""

import subprocess
import sys
import warnings

import jax
import pytest

from core_jax.abstract import AbstractProgram
from launch.chips import CHIPS
from launch.compiling import lower_job, lower_program
from launch.planned import ROWS, SMALL, row_named
from launch.planning import make_plan
from launch.stored import (
    DOCUMENT,
    FORMAT,
    read_record,
    record_of,
    table,
    why_stale,
    with_table,
)
from launch.topology import has_libtpu, parse_topology, prepare_environment, topology_devices

needs_libtpu = pytest.mark.skipif(not has_libtpu(), reason="libtpu is not installed")


@pytest.fixture(scope="module", autouse=True)
def environment():
    prepare_environment()


@pytest.fixture
def row():
    return row_named("vlv_stage2_1.5b")


@pytest.fixture
def record(row):
    found = read_record(row)
    assert found is not None
    return found | {"versions": {"jax": jax.__version__}}


def test_a_plan_is_stale_where_something_differs(row, record):
    now = record["fingerprint"]
    assert why_stale(row, record, now) == ""
    assert why_stale(row, None, now) == "no plan has been made"
    assert "the program is abc now" in why_stale(row, record, "abc")
    other = record | {"versions": {"jax": "0.0.1"}}
    assert "made with jax 0.0.1" in why_stale(row, other, now)
    assert "made with: python" in why_stale(row, record | {"command": "python x"}, now)
    assert "made with: " in why_stale(row, record | {"format": FORMAT + 1}, now)


def test_the_table_marks_what_is_stale(row, record):
    lines = table([row], {row.name: record}, [row.name]).splitlines()
    assert len(lines) == 3
    assert f"[{row.name}](plans/{row.name}.json) **stale** | {row.topology}" in lines[2]
    assert "stale" not in table([row], {row.name: record})
    assert "not made" in table([row], {})


def test_the_documented_table_is_that_of_the_files():
    records = {r.name: found for r in ROWS if (found := read_record(r))}
    document = DOCUMENT.read_text(encoding="utf-8")
    assert with_table(document, table(ROWS, records)) == document.replace(" **stale**", "")
    for row in ROWS:
        if row.name in records:
            assert records[row.name]["command"] == row.command


def test_every_job_is_a_job_of_its_config():
    names = [row.name for row in (*ROWS, *SMALL)]
    assert len(names) == len(set(names))
    for row in (*ROWS, *SMALL):
        job = row.open()
        assert job.batch_size >= 1
        assert all(count >= 1 for count in job.units.values())
    with pytest.raises(KeyError, match="no plan is named 'x'"):
        row_named("x")


def test_a_program_is_the_same_lowered_on_any_devices():
    """CPUs stand in for a pod; a fingerprint sees mesh and program."""

    def fingerprint(function, mesh_shape):
        from core_jax.sharding import batch_sharding, make_mesh

        mesh = make_mesh(mesh_shape, jax.devices())
        x = jax.ShapeDtypeStruct((8, 4), "float32", sharding=batch_sharding(mesh))
        program = AbstractProgram(fn=jax.jit(function), arguments=(x,), parts={"batch": x})
        return lower_program(program, mesh, CHIPS["v5e"], "tpu").fingerprint

    first = fingerprint(lambda x: x + 1, {"data": 8})
    assert first == fingerprint(lambda x: x + 1, {"data": 8})
    assert first != fingerprint(lambda x: x + 2, {"data": 8})
    assert first != fingerprint(lambda x: x + 1, {"data": 2, "fsdp": 4})


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("row", SMALL, ids=lambda row: row.name)
def test_small_jobs_compile_and_their_fingerprints_need_no_libtpu(row):
    topology = parse_topology(row.topology)
    plan = make_plan(row.open(), topology, config=row.config_text)
    cpus = jax.devices("cpu")[: topology.num_chips]
    here = lower_job(row.open(), cpus, topology.chip, platform="tpu")
    record = record_of(row, plan.to_json(), here.fingerprint)
    assert record["fits"]
    cells = table([row], {row.name: record}).splitlines()[2].split(" | ")
    assert cells[1] == row.topology
    assert why_stale(row, record, here.fingerprint) == ""
    there = lower_job(row.open(), topology_devices(topology), topology.chip)
    assert there.fingerprint == here.fingerprint


@pytest.mark.slow
def test_every_job_is_lowered_and_what_is_stale_is_reported():
    """A job that cannot be lowered fails here; a stale plan fails `make plan-check` alone."""
    command = [sys.executable, "-m", "launch.plans", "--check", "--notable"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    told = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert set(told) == {row.name for row in ROWS}, done.stderr[-2000:]
    stale = [f"{name}: {what}" for name, what in told.items() if what != "as the code is"]
    assert done.returncode == bool(stale), done.stderr[-2000:]
    if stale:
        warnings.warn("renew by `make plan`: " + "; ".join(stale), stacklevel=1)
