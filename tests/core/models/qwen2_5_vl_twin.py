"""Small randomised Qwen2.5-VLs of transformers, and prompts with images for both sides."""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.models import load_model
from core_jax.models.qwen2_5_vl import pack_images, place_prompts
from tests.oracle import randomize

PAD, IMAGE, START, END = 0, 150, 152, 153

CONFIGS = {
    "untied": dict(
        text=dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                  num_key_value_heads=2, rope=(1e6, (2, 3, 3))),
        vision=dict(depth=4, hidden_size=32, num_heads=2, patch_size=14, window_size=56,
                    fullatt_block_indexes=[1, 3], out_hidden_size=64),
        tied=False,
    ),
    "tied": dict(
        text=dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
                  num_key_value_heads=1, rope=(1e4, (2, 6, 4))),
        vision=dict(depth=3, hidden_size=48, num_heads=3, patch_size=4, window_size=24,
                    fullatt_block_indexes=[0], out_hidden_size=48),
        tied=True,
    ),
}  # fmt: skip


def make_oracle(name, std=0.3, seed=0, table=1.0):
    """transformers' model, every tensor of it random; `table` scales the token table."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    parts = CONFIGS[name]
    text = dict(parts["text"])
    theta, sections = text.pop("rope")
    config = transformers.Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=160, intermediate_size=96, max_position_embeddings=512, rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=theta,
                                 mrope_section=list(sections)),
            bos_token_id=1, eos_token_id=2, pad_token_id=PAD, **text,
        ),
        vision_config=dict(intermediate_size=60, spatial_merge_size=2, temporal_patch_size=2,
                           tokens_per_second=4, **parts["vision"]),
        image_token_id=IMAGE, video_token_id=151, vision_start_token_id=START,
        vision_end_token_id=END, tie_word_embeddings=parts["tied"],
    )  # fmt: skip
    torch.manual_seed(seed)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).eval()
    randomize(model, seed=seed, std=std)
    model.get_input_embeddings().weight.data.mul_(table)
    return model


@functools.cache
def tiny(name, **kwargs):
    """(transformers' model, ours, our parameters)."""
    oracle = make_oracle(name, **kwargs)
    with tempfile.TemporaryDirectory() as path:
        oracle.save_pretrained(path)
        return oracle, *load_model(path)


def random_images(config, grids, seed=0):
    """Patches for images of these sizes."""
    rng = np.random.default_rng(seed)
    values = config.vision_config.patch_values
    return [rng.standard_normal((int(np.prod(g)), values), np.float32) for g in grids]


def prompt(*parts, seed=0):
    """Ids: an int is as many random text tokens, a grid is an image of that size."""
    rng = np.random.default_rng(seed)
    ids = []
    for part in parts:
        if isinstance(part, int):
            ids += rng.integers(3, 149, part).tolist()
        else:
            ids += [START] + [IMAGE] * (int(np.prod(part)) // 4) + [END]
    return ids


def batch(rows, side="left"):
    """Rows of ids, padded, and which are valid."""
    length = max(map(len, rows))
    ids, valid = np.full((len(rows), length), PAD, np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], valid[i, place] = row, True
    return ids, valid


def torch_inputs(ids, valid, patches, grids):
    """Keyword arguments of transformers' model."""
    torch = pytest.importorskip("torch")

    inputs = dict(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(valid).long())
    if grids:
        inputs |= dict(
            pixel_values=torch.tensor(np.concatenate(patches)),
            image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=torch.tensor(ids == IMAGE).int(),
        )
    return inputs


def oracle_logits(oracle, *inputs):
    torch = pytest.importorskip("torch")

    with torch.no_grad():
        return oracle(**torch_inputs(*inputs)).logits.numpy()


def our_inputs(config, ids, valid, patches, grids, **packing):
    """Positional arguments of our model, and the packed images."""
    packed = pack_images(patches, grids, config.vision_config, **packing) if grids else None
    places = place_prompts(ids, valid, packed, config)
    images = (None,) * 3
    if packed is not None:
        b = packed.batch
        images = tuple(map(jnp.asarray, (b.patches, b.positions, b.segments)))
    args = tuple(map(jnp.asarray, (ids, places.positions, places.image_slots)))
    return (*args, *images, jnp.asarray(valid)), packed, places


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply(model, params, *args, method=None):
    """Compiled once for each model, method and shape."""
    return model.apply({"params": params}, *args, method=method)
