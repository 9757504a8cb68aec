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
    experiment = tiny_hub.experiment(stage=1, steps=2, mesh=request.param)
    return experiment, _train(experiment, tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.parametrize("processes", [2, 4])
def test_steps_of_several_processes_are_those_of_one(alone, tmp_path, processes):
    experiment, made = alone
    _same_training(made, _train(experiment, tmp_path / "run", processes))


def test_stage_2_and_its_sheets_and_captions(tiny_hub, tmp_path):
    """Every process holds a part of what the sheet after step 2 shows."""
    mesh = {"fsdp": 2, "tensor": -1}
    experiment = tiny_hub.experiment(stage=2, steps=2, mesh=mesh, sample_every=2)
    # A bias of keys has no gradient but rounding, which Adam would make as large as any.
    experiment["optimizer"]["eps"] = 1e-4
    one, two = tmp_path / "one", tmp_path / "two"
    _same_training(_train(experiment, one, 1), _train(experiment, two, 2))
    sheets = [np.asarray(Image.open(w / "samples" / "step-2.png"), int) for w in (one, two)]
    assert np.abs(sheets[0] - sheets[1]).max() <= 2

    flags = [f"--workdir={one}", f"--input={tiny_hub.images}", "--batch_size=2",
             "--temperature=1.0"]  # fmt: skip
    config = f"tests/vlv/json_config.py:{one.with_suffix('.json')}"
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
