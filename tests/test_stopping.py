"""SIGTERM stops real processes that share work: what is done stays, and they end by 143."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.chaos.world import open_world
from tests.local_processes import start

PIECES = 3000  # far more than are done before the signal comes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return open_world(tmp_path_factory.mktemp("world"))


def _cache(world, out):
    manifest = world.root / "many.jsonl"
    name = json.loads((pathlib.Path(world.hub.images) / "captions.jsonl").open().readline())
    lines = [{"file_name": name["file_name"], "id": str(i)} for i in range(PIECES)]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    experiment = world.vlv(1)
    experiment["data"]["source"]["manifest"] = str(manifest)
    flags = [f"--out={out}", "--examples_per_shard=2", "--batch_size=2"]
    return "vlv_jax.cache", experiment, flags, lambda: list(out.glob("features-*.json"))


def _distill(world, out):
    records = json.loads((world.root / "llava" / "data.json").read_text())
    many = [{**records[0], "id": str(i)} for i in range(PIECES)]
    file = world.root / "llava" / "many.json"
    file.write_text(json.dumps(many))
    distill = {"chunk_size": 2, "batch_size": 2, "max_new_tokens": 6, "prompt_lengths": (64, 96)}
    experiment = world.massv("distill", distill=distill)
    experiment["data"]["source"]["path"] = str(file)
    return (
        "massv_jax.distill",
        experiment,
        [f"--out={out}"],
        lambda: list((out / "parts").glob("*.json")),
    )


def _generate(world, out):
    prompts = world.root / "prompts.jsonl"
    lines = [{"id": str(i), "prompt": "what is it?"} for i in range(PIECES)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    decoding = {"max_new_tokens": 4, "prompt_lengths": (64, 96)}
    experiment = world.massv("eval", decoding=decoding)
    flags = [f"--input={prompts}", f"--output={out / 'answers.jsonl'}", "--drafter=none"]
    return "massv_jax.generate", experiment, flags, lambda: _lines(out, "answers*-of-*.jsonl")


def _lines(folder, pattern):
    return [line for file in folder.glob(pattern) for line in file.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("job", [_cache, _distill, _generate])
def test_sigterm_stops_processes_between_two_pieces(world, tmp_path, job):
    module, experiment, flags, done = job(world, tmp_path / "out")
    config = world.config(job.__name__, experiment)
    process = start(module, *flags, config=config, processes=2, devices=2)
    while len(done()) < 4 and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 143, said
    assert said.count("SIGTERM: stopped at") == 2, said  # both of them
    assert 4 <= len(done()) < PIECES / 2
    assert not [file for file in (tmp_path / "out").rglob("*") if file.name.endswith(".tmp")]


def test_a_process_that_is_alone_is_ended_at_once():
    script = """
import os, signal
from core_jax.stopping import stop_between
stop_between(print)("somewhere")
os.kill(os.getpid(), signal.SIGTERM)
print("went on")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == -signal.SIGTERM
    assert done.stdout.split() in ([], ["somewhere"])
