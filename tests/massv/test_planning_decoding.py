"""Decoding as shapes is the decoding that distillation runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from core_jax.config import ConfigError, to_dataclass
from core_jax.sharding import make_mesh, mesh_of
from massv_jax import planning_decoding
from massv_jax.distilling import make_answerer
from massv_jax.experiment import Experiment
from massv_jax.planning_decoding import abstract_decoding
from massv_jax.speculative.loop import advance, start

SIDE = 48  # of the largest square that 40 image tokens of 8 x 8 pixels allow


def experiment_of(pair, **model):
    return to_dataclass(Experiment, {
        "task": "distill",
        "model": {"target": str(pair.target), "language_model": str(pair.language_model), **model},
        "data": {"max_pixels": 40 * 8 * 8, "limits": {"min_side": 8}},
        "run": {"mesh": {"data": 2, "fsdp": 4}},
        "distill": {"batch_size": 1, "max_new_tokens": 8, "prompt_lengths": (128,)},
    })  # fmt: skip


def kinds(tree):
    return jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)


def places(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


@pytest.mark.slow
def test_arguments_and_programs_are_those_of_distillation(qwen_pair, monkeypatch):
    experiment = experiment_of(qwen_pair)
    decoder = make_answerer(experiment).decoder
    ends = (decoder.target.eos_ids, decoder.target.pad_id)
    monkeypatch.setattr(planning_decoding, "_ENDS", {"qwen2_5_vl": ends})
    picture = Image.fromarray(np.zeros((SIDE, SIDE, 3), np.uint8))
    session = decoder.begin(
        [[picture]] * 8, ["what is it?"] * 8, max_new_tokens=8, temperature=1.0
    )
    planned = abstract_decoding(experiment, make_mesh(experiment.run.mesh))
    _, params, request = planned.before.arguments
    assert kinds(params) == kinds(session.params)
    assert places(params) == places(session.params)
    assert kinds(request) == kinds(session.request)
    assert planned.rows == 8
    state, rounds = session.state, jnp.int32(3)
    with mesh_of(session.params):
        prompts = start.lower(session.program, session.params, session.request).as_text()
        gamma = session.program.options.max_gamma
        one = advance.lower(session.program, session.params, state, rounds, gamma=gamma).as_text()
    assert planned.before.trace().lower().as_text() == prompts
    assert planned.laid_out(places(state)).trace().lower().as_text() == one
    assert planned.trace().lower().as_text() != one  # a control: layouts are seen


def test_drafters_that_no_plan_is_made_for_are_named(qwen_pair):
    with pytest.raises(ConfigError, match="drafters that see images"):
        abstract_decoding(experiment_of(qwen_pair, drafter="lookup"), make_mesh({"data": -1}))
