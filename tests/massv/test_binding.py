"""A drafter is used with the target, and under the limits, that it was made for."""

import dataclasses
import json
import shutil

import jax
import pytest

from core_jax.config import to_dataclass
from core_jax.convert.safetensors_io import TensorReader
from core_jax.convert.safetensors_write import write_tensors
from core_jax.decode.target import load_target
from massv_jax import workdir
from massv_jax.binding import BindingError
from massv_jax.experiment import Experiment
from massv_jax.generating import make_decoder
from massv_jax.loading import load_drafter, make_drafter, save_drafter
from massv_jax.pixels import limit_pixels, pixels_of
from massv_jax.speculative.decoder import SpeculativeDecoder

LIMITS = {"max_pixels": 20 * 8 * 8}


@pytest.fixture(scope="module")
def other_target(qwen_pair, tmp_path_factory):
    """The target, but for one tensor of its tower."""
    path = tmp_path_factory.mktemp("other") / "target"
    shutil.copytree(qwen_pair.target, path)
    reader = TensorReader(qwen_pair.target)
    tensors = {name: reader.read(name) for name in reader.shapes}
    name = next(n for n in tensors if "visual.blocks.0.norm1" in n)
    tensors[name] = tensors[name] + 1
    write_tensors(path, tensors.items(), file_name="model.safetensors")
    return path


@pytest.fixture(scope="module")
def limited(qwen_pair, tmp_path_factory):
    """Directory of a drafter that was made under limits of its own."""
    path = tmp_path_factory.mktemp("limited") / "drafter"
    save_drafter(path, make_drafter(qwen_pair.target, qwen_pair.language_model, limits=LIMITS))
    return path


def test_limits_of_images_are_those_of_training(qwen_pair, limited):
    stored = json.loads((limited / "massv_config.json").read_text())["target"]["pixels"]
    assert stored == {"min_pixels": 4 * 8 * 8, **LIMITS}
    with pytest.raises(BindingError, match=r"1280.*2560[\s\S]*--max_pixels"):
        load_drafter(limited, qwen_pair.target)
    target = limit_pixels(load_target(qwen_pair.target), LIMITS)
    assert pixels_of(target) == stored
    SpeculativeDecoder(target, load_drafter(limited, qwen_pair.target, limits=LIMITS))
    assert load_drafter(limited, qwen_pair.target, loaded=target).binding.pixels == stored


def test_generate_works_under_the_limits_that_it_is_given(qwen_pair, limited):
    made = make_decoder(str(qwen_pair.target), str(limited), limits=LIMITS)
    assert pixels_of(made.target)["max_pixels"] == LIMITS["max_pixels"]
    with pytest.raises(BindingError, match="limits of the image processor"):
        make_decoder(str(qwen_pair.target), str(limited))


def test_a_file_may_say_its_limits_twice(qwen_pair):
    ours = make_drafter(qwen_pair.target, qwen_pair.language_model).binding
    twice = dict(ours.pixels) | {"size": {"shortest_edge": 256, "longest_edge": 2560}}
    dataclasses.replace(ours, pixels=twice).check(ours, where="x")


def _run(path, pair, parts, record, **data):
    """A working directory as training leaves it; its one checkpoint is empty."""
    (path / "checkpoints" / "2").mkdir(parents=True)
    config = {"task": "phase1", "data": data, "model": {
        "target": str(pair.target), "language_model": str(pair.language_model)}}  # fmt: skip
    experiment = to_dataclass(Experiment, config)
    (path / "experiment.json").write_text(json.dumps(dataclasses.asdict(experiment)))
    (path / "run.json").write_text(json.dumps(record))
    return experiment


@pytest.mark.parametrize("release", ["this", "earlier"])
def test_a_run_is_bound_to_its_target(qwen_pair, other_target, tmp_path, monkeypatch, release):
    parts = make_drafter(qwen_pair.target, qwen_pair.language_model)
    record = {"frozen_hashes": {"target": parts.binding.weights}}
    if release == "this":
        record["extra"] = {"target": dataclasses.asdict(parts.binding)}
    experiment = _run(tmp_path, qwen_pair, parts, record)
    trained = {"projector": jax.tree.map(lambda x: x + 1, parts.params["projector"])}
    monkeypatch.setattr(workdir, "own_params", lambda path, experiment: trained)
    workdir.open_drafter(tmp_path)
    workdir.open_drafter(tmp_path, qwen_pair.target)
    message = "vision tower" if release == "this" else "the model's tensors"
    with pytest.raises(BindingError, match=message):
        workdir.open_drafter(tmp_path, other_target)
    start = dataclasses.replace(experiment.run, init_from=str(tmp_path))
    second = dataclasses.replace(experiment, task="phase2", run=start)
    workdir.assemble(second)
    model = dataclasses.replace(experiment.model, target=str(other_target))
    with pytest.raises(BindingError, match=message):
        workdir.assemble(dataclasses.replace(second, model=model))


def test_a_run_is_bound_to_its_limits(qwen_pair, tmp_path, monkeypatch):
    parts = make_drafter(qwen_pair.target, qwen_pair.language_model, limits=LIMITS)
    record = {"extra": {"target": dataclasses.asdict(parts.binding)}}
    experiment = _run(tmp_path, qwen_pair, parts, record, **LIMITS)
    monkeypatch.setattr(workdir, "own_params", lambda path, experiment: {})
    assert workdir.open_drafter(tmp_path).binding == parts.binding
    with pytest.raises(BindingError, match="max_pixels"):
        workdir.open_drafter(tmp_path, loaded=load_target(qwen_pair.target))
    start = dataclasses.replace(experiment.run, init_from=str(tmp_path))
    data = dataclasses.replace(experiment.data, max_pixels=0)
    with pytest.raises(BindingError, match="max_pixels"):
        workdir.assemble(dataclasses.replace(experiment, run=start, data=data))


def test_a_target_in_memory_is_compared(qwen_pair, other_target):
    target, other = load_target(qwen_pair.target), load_target(other_target)
    parts = make_drafter(qwen_pair.target, qwen_pair.language_model)
    SpeculativeDecoder(target, parts)
    with pytest.raises(BindingError, match="vision tower"):
        SpeculativeDecoder(other, parts)
    # A model of the family goes with the tower that it has.
    SpeculativeDecoder(target, dataclasses.replace(target))
    with pytest.raises(BindingError, match="vision tower"):
        SpeculativeDecoder(target, other)
