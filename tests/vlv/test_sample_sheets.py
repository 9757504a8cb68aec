"""Sample sheets: what they look like, that seeds are fixed, and what they cost."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from core_jax.config import to_dataclass
from core_jax.partition import flatten, unflatten
from vlv_jax import sample_sheets
from vlv_jax.experiment import Experiment
from vlv_jax.loading import load_networks
from vlv_jax.sample_sheets import draw_sheet, make_sample_hook

CELL, GAP, TEXT = 128, 6, 420


def pictures(rng, count=3, side=16):
    return rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_three_columns_a_row_an_image():
    grey, red = np.full((2, 8, 8, 3), 90, np.uint8), np.zeros((2, 8, 8, 3), np.uint8)
    red[..., 0] = 200
    sheet = np.asarray(draw_sheet(grey, red, ["a red square", ""]))
    assert sheet.shape == (2 * (CELL + GAP) + GAP, 2 * CELL + 3 * GAP + TEXT, 3)
    middle = GAP + CELL // 2
    assert tuple(sheet[middle, GAP + CELL // 2]) == (90, 90, 90)
    assert tuple(sheet[middle, 2 * GAP + CELL + CELL // 2]) == (200, 0, 0)
    text = sheet[:, 2 * CELL + 3 * GAP :]
    assert (text[: CELL + GAP] < 128).any()  # the caption, beside its own image
    assert (text[CELL + GAP :] > 250).all()  # the second image has none
    assert (sheet[:GAP] == 255).all()


def test_without_captions_there_are_two_columns(rng):
    images = pictures(rng)
    assert draw_sheet(images, images, None).size == (2 * CELL + 3 * GAP, 3 * (CELL + GAP) + GAP)


def test_long_captions_stay_inside(rng):
    sheet = draw_sheet(pictures(rng, 1), pictures(rng, 1), ["word " * 400])
    assert sheet.size[0] == 2 * CELL + 3 * GAP + TEXT


@pytest.fixture(scope="module")
def made(tiny_hub):
    """A stage-2 experiment in bfloat16, its networks, trainable and frozen parameters."""
    content = tiny_hub.experiment(stage=2)
    content["model"]["compute_dtype"] = "bfloat16"
    content["model"]["frozen_dtype"] = "bfloat16"
    content["evaluation"] = {"num_captions": 6}  # no held-out images: sheets show training images
    experiment = to_dataclass(Experiment, content)
    networks, params, pieces = load_networks(experiment.model)
    flat = flatten(params)
    trained = {n: x.astype(jnp.float32) for n, x in flat.items() if n.startswith("projector")}
    assert trained
    frozen = {n: x for n, x in flat.items() if n not in trained}
    return experiment, networks, unflatten(trained), unflatten(frozen), pieces


def state_of(trained):
    return types.SimpleNamespace(params=trained, ema=None)


def test_fixed_seeds_give_the_same_sheet(made, tmp_path):
    experiment, networks, trained, frozen, pieces = made
    hook = make_sample_hook(experiment, networks, frozen, pieces, tmp_path)
    hook(1, state_of(trained))
    hook(2, state_of(trained))
    again = tmp_path / "again"
    make_sample_hook(experiment, networks, frozen, pieces, again)(1, state_of(trained))
    first = np.asarray(Image.open(tmp_path / "samples" / "step-1.png"))
    assert first.shape == (2 * (CELL + GAP) + GAP, 2 * CELL + 3 * GAP + TEXT, 3)
    for other in (tmp_path / "samples" / "step-2.png", again / "samples" / "step-1.png"):
        np.testing.assert_array_equal(np.asarray(Image.open(other)), first)
    sampling = dataclasses.replace(experiment.sampling, seed=7)
    changed = dataclasses.replace(experiment, sampling=sampling)
    make_sample_hook(changed, networks, frozen, pieces, again)(3, state_of(trained))
    assert (np.asarray(Image.open(again / "samples" / "step-3.png")) != first).any()


def test_parameters_are_cast_once_and_frozen_ones_not_copied(made, tmp_path, monkeypatch):
    experiment, networks, trained, frozen, pieces = made
    hook = make_sample_hook(experiment, networks, frozen, pieces, tmp_path)
    seen, casts, real_merge = [], [], sample_sheets.merge

    def merge(own, others):
        casts.append(flatten(own))
        return real_merge(own, others)

    def redraw(networks, params, context, key, sampling, *, latent_size):
        seen.append(flatten(params))
        return jnp.zeros((len(context), 32, 32, 3), jnp.uint8)

    def generate(networks, params, prefix, sampling, **options):
        seen.append(flatten(params))
        return

    monkeypatch.setattr(sample_sheets, "merge", merge)
    monkeypatch.setattr(sample_sheets, "redraw", redraw)
    monkeypatch.setattr(sample_sheets, "generate_captions", generate)
    monkeypatch.setattr(sample_sheets, "decode_texts", lambda *a: ["x"] * 2)
    ema = jax.tree.map(lambda x: x + 1.0, trained)
    hook(1, types.SimpleNamespace(params=trained, ema=ema))
    assert len(casts) == 1
    assert len(seen) == 2
    for name, leaf in flatten(ema).items():  # the average, where there is one
        assert casts[0][name].dtype == jnp.bfloat16
        np.testing.assert_array_equal(casts[0][name], leaf.astype(jnp.bfloat16))
        assert all(params[name] is casts[0][name] for params in seen)
    for name, leaf in flatten(frozen).items():
        assert all(params[name] is leaf for params in seen)
