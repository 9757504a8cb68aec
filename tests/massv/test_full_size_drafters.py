"""The released pairs as shapes: no memory, no weights; configs ask for exactly these."""

import functools
import importlib

import jax
import jax.numpy as jnp
import pytest

from core_jax.config import to_dataclass
from core_jax.models import gemma3, gemma3_text, qwen2, qwen2_5_vl
from core_jax.partition import count_parameters, split
from massv_jax.drafter import Drafter
from massv_jax.drafter_config import DrafterConfig, PrefixConfig
from massv_jax.experiment import Experiment
from massv_jax.loading import language_model_of
from massv_jax.losses import LossConfig
from massv_jax.phase1 import TRAINABLE as PHASE1
from massv_jax.phase2 import TARGET, TOWER, Teacher, make_loss
from massv_jax.phase2 import TRAINABLE as PHASE2
from massv_jax.projector import init_projector

LMS = {"qwen": qwen2.Qwen2Config.qwen2p5_1p5b(), "gemma": gemma3_text.Gemma3TextConfig.gemma3_1b()}
TARGETS = {
    "qwen2_5_vl_7b": qwen2_5_vl.Qwen2_5_VLConfig.qwen2p5_vl_7b(),
    "qwen2_5_vl_32b": qwen2_5_vl.Qwen2_5_VLConfig.qwen2p5_vl_32b(),
    "gemma3_12b": gemma3.Gemma3Config.gemma3_12b(),
    "gemma3_27b": gemma3.Gemma3Config.gemma3_27b(),
    "vlv": PrefixConfig(num_embeddings=77, embed_dim=1024, vocab_size=151936),
}
# Trained in phase 1 and in phase 2, in millions.
SIZES = {
    "qwen2_5_vl_7b": (34.09, 1577.80), "qwen2_5_vl_32b": (34.09, 1577.80),
    "gemma3_12b": (1.33, 1001.21), "gemma3_27b": (1.33, 1001.21),
    "vlv": (3.94, 1547.65),
}  # fmt: skip


@functools.cache
def drafter(name):
    lm = LMS["gemma" if name.startswith("gemma") else "qwen"]
    return Drafter(DrafterConfig.for_pair(TARGETS[name], lm))


@functools.cache
def abstract(name):
    """Parameters of the drafter, its tower and its teacher, as shapes."""
    config = drafter(name).config
    lm = language_model_of(config)
    family = gemma3_text.FAMILY if name.startswith("gemma") else qwen2.FAMILY
    params = {
        "projector": jax.eval_shape(lambda k: init_projector(config, k), jax.random.key(0)),
        "language_model": family.abstract_params(lm),
    }
    if name.startswith("gemma"):
        model = gemma3.Gemma3ForConditionalGeneration(config=config.target)
        whole = dict(gemma3.FAMILY.abstract_params(model))
        return params, whole.pop("vision_tower"), whole
    if name == "vlv":
        return params, {}, None
    model = qwen2_5_vl.Qwen2_5_VLForConditionalGeneration(config=config.target)
    whole = dict(qwen2_5_vl.FAMILY.abstract_params(model))
    visual = dict(whole["visual"])
    teacher = {"merger": visual.pop("merger"), "language_model": whole["language_model"]}
    return params, visual, teacher


def batch(name, data):
    """What massv_jax.batches makes of two examples, as shapes."""
    T = data.max_length
    shapes = {
        "tokens": ((2, T), jnp.int32), "valid": ((2, T), jnp.bool_),
        "supervised": ((2, T), jnp.bool_),
    }  # fmt: skip
    config = drafter(name).config
    if name.startswith("gemma"):
        shapes["pixels"] = ((2, 1, 896, 896, 3), jnp.float32)
    elif name == "vlv":
        shapes |= {"images": ((2, 77, 1024), jnp.float32), "slots": ((2, T), jnp.int32)}
    else:
        v = config.target.vision_config
        S = data.image_windows * v.window_patches
        shapes |= {
            "positions": ((2, 3, T), jnp.int32), "slots": ((2, T), jnp.int32),
            "patches": ((2, S, v.patch_values // 2), jnp.bfloat16),
            "patch_positions": ((2, S, 2), jnp.int32), "segments": ((2, S), jnp.int32),
        }  # fmt: skip
    return {k: jax.ShapeDtypeStruct(*x) for k, x in shapes.items()}


@pytest.mark.parametrize("name", TARGETS)
def test_trained_parameters(name):
    params, _, _ = abstract(name)
    counts = tuple(count_parameters(split(params, p)[0]) / 1e6 for p in (PHASE1, PHASE2))
    assert tuple(round(c, 2) for c in counts) == SIZES[name]


@pytest.mark.parametrize("name", ["qwen2_5_vl_7b", "gemma3_12b", "vlv"])
def test_losses_of_both_phases_trace_with_gradients(name):
    params, tower, teacher = abstract(name)
    target = drafter(name).config.target
    for task, patterns, loss_config in (
        ("phase1", PHASE1, LossConfig()),
        ("phase2", PHASE2, LossConfig(kl=1.0, teacher="target") if teacher else LossConfig()),
    ):
        module = importlib.import_module(f"configs.massv_{task}")
        experiment = to_dataclass(Experiment, module.get_config(name).to_dict())
        trained, frozen = split(params, patterns)
        loss = make_loss(drafter(name), loss_config, teacher=Teacher(target),
                         encode=lambda _, images: images)  # fmt: skip
        frozen = {**frozen, TOWER: tower, **({TARGET: teacher} if teacher else {})}
        grad = jax.value_and_grad(lambda *a, f=loss: f(*a)[0])
        key = jax.eval_shape(lambda: jax.random.key(0))
        value, grads = jax.eval_shape(grad, trained, frozen, batch(name, experiment.data), key)
        assert value.shape == ()
        assert count_parameters(grads) == count_parameters(trained)


def test_drafters_are_the_presets():
    """What the mask, the positions and the export rely on."""
    assert drafter("gemma3_12b").config.whole == gemma3.Gemma3Config.drafter_1b()
    vl = drafter("qwen2_5_vl_7b").config
    assert vl.text.mrope_section == (16, 24, 24)
    assert (vl.vocab_size, vl.target_vocab_size) == (151936, 152064)
    assert vl.whole.vision_config.out_hidden_size == 1536
    assert drafter("gemma3_12b").config.vocab_size == 262144
    assert drafter("gemma3_12b").config.target_vocab_size == 262208
