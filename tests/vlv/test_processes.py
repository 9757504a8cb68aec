"""Training and captioning by real processes on localhost is that by one."""

import json

import numpy as np
import pytest
from PIL import Image

from core_jax.partition import flatten
from core_jax.train.checkpoint import load_params
from tests.local_processes import run

pytestmark = pytest.mark.slow

DATA, FSDP = {"data": -1}, {"data": 2, "fsdp": -1}


def _experiment(tiny_hub, **options):
    made = tiny_hub.experiment(steps=2, **options)
    # A bias of keys has no gradient but rounding, which Adam would make as large as any.
    made["optimizer"]["eps"] = 1e-4
    return made


def _train(experiment, workdir, processes):
    file = workdir.with_suffix(".json")
    file.write_text(json.dumps(experiment))
    config = f"tests/vlv/json_config.py:{file}"
    run("vlv_jax.train", processes=processes, config=config, workdir=workdir)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return flatten(load_params(str(workdir), ema=False)), rows


def _same_training(one, other):
    """Two runs' (parameters, metrics), up to rounding."""
    (params, rows), (together, others) = one, other
    assert together.keys() == params.keys()
    for name, leaf in params.items():
        np.testing.assert_allclose(together[name], leaf, rtol=0, atol=2e-5, err_msg=name)
    # As many rows: process 0 alone writes.
    np.testing.assert_allclose(
        [row["loss"] for row in others], [row["loss"] for row in rows], rtol=1e-4
    )


@pytest.fixture(scope="module", params=[DATA, FSDP], ids=["data", "fsdp"])
def alone(request, tiny_hub, tmp_path_factory):
    """Two steps of one process with eight devices."""
    experiment = _experiment(tiny_hub, stage=1, mesh=request.param)
    return experiment, _train(experiment, tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.parametrize("processes", [2, 4])
def test_steps_of_several_processes_are_those_of_one(alone, tmp_path, processes):
    experiment, made = alone
    _same_training(made, _train(experiment, tmp_path / "run", processes))


@pytest.fixture(scope="module")
def stage_2(tiny_hub, tmp_path_factory):
    """A config, the folder of its run by one process, and what came of it."""
    mesh = {"fsdp": 2, "tensor": -1}
    experiment = _experiment(tiny_hub, stage=2, mesh=mesh, sample_every=2)
    experiment["evaluation"] = {
        "source": experiment["data"]["source"], "num_captions": 9, "num_redrawn": 3,
        "num_denoising": 9, "timesteps_per_image": 2, "bootstrap_samples": 20,
    }  # fmt: skip
    workdir = tmp_path_factory.mktemp("stage-2") / "run"
    return experiment, workdir, _train(experiment, workdir, 1)


def test_stage_2_and_its_sheets(stage_2, tmp_path):
    """Every process holds a part of what the sheet after step 2 shows."""
    experiment, one, made = stage_2
    two = tmp_path / "two"
    _same_training(made, _train(experiment, two, 2))
    sheets = [np.asarray(Image.open(w / "samples" / "step-2.png"), int) for w in (one, two)]
    assert np.abs(sheets[0] - sheets[1]).max() <= 2


def test_captions_by_two_processes_are_those_of_one(stage_2, tiny_hub, tmp_path):
    _, workdir, _ = stage_2
    flags = [f"--workdir={workdir}", f"--input={tiny_hub.images}", "--batch_size=2",
             "--temperature=1.0"]  # fmt: skip
    config = f"tests/vlv/json_config.py:{workdir.with_suffix('.json')}"
    for count in (1, 2):
        output = tmp_path / f"by-{count}" / "captions.jsonl"
        run("vlv_jax.caption", *flags, f"--output={output}", processes=count, devices=count,
            config=config)  # fmt: skip
    alone, *others = (
        file.read_text().splitlines()
        for folder in (tmp_path / "by-1", tmp_path / "by-2")
        for file in sorted(folder.glob("*.jsonl"))
    )
    assert [len(lines) for lines in others] == [5, 5]
    # Process i has every second image: laid together again, they are the same bytes.
    assert [line for pair in zip(*others, strict=True) for line in pair] == alone


def test_an_evaluation_by_two_processes_gives_the_bytes_of_one(stage_2, tmp_path):
    """Three batches and one: the second process has fewer than the first, or none."""
    _, workdir, _ = stage_2
    config = f"tests/vlv/json_config.py:{workdir.with_suffix('.json')}"
    made = []
    for count in (1, 2):
        out = tmp_path / f"by-{count}"
        said = run("vlv_jax.evaluate", f"--out={out}", processes=count, devices=count,
                   config=config, workdir=workdir)  # fmt: skip
        assert said.count("wrote ") == 1
        report = json.loads((out / "report.json").read_text())
        files = sorted(out.glob("evaluated_*.jsonl"))
        assert [len(file.read_text().splitlines()) for file in files] == [9, 3, 9]
        made.append((report["vlv"], {file.name: file.read_bytes() for file in files}))
    assert made[0] == made[1]
