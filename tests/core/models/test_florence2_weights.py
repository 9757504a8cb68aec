"""Florence-2 checkpoints: both layouts, strictness, released sizes."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core_jax.convert.rules import WeightsError, derive_entries
from core_jax.models import load_model, save_model
from core_jax.models.florence2 import FAMILY, Florence2, Florence2Config
from core_jax.partition import count_parameters, flatten
from core_jax.sharding import DEFAULT_RULES, make_mesh, param_shardings
from tests.core.models.florence2_twin import CONFIGS, make_twin

# The names microsoft's remote code gives to what transformers calls otherwise.
_TO_REMOTE = (
    (r"^model\.vision_tower\.", "vision_tower."),
    (r"\.convs\.(\d)\.conv\.", r".convs.\1.proj."),
    (r"_block\.(conv\d)\.", r"_block.\1.fn.dw."),
    (r"\.spatial_block\.norm1\.", ".spatial_block.window_attn.norm."),
    (r"\.channel_block\.norm1\.", ".channel_block.channel_attn.norm."),
    (r"_attn\.(qkv|proj)\.", r"_attn.fn.\1."),
    (r"\.norm2\.", ".ffn.norm."),
    (r"\.ffn\.(fc\d)\.", r".ffn.fn.net.\1."),
    (r"^model\.multi_modal_projector\.image_projection\.weight$", "image_projection"),
    (r"^model\.multi_modal_projector\.image_position_embed\.", "image_pos_embed."),
    (r"^model\.multi_modal_projector\.", ""),
    (r"^model\.language_model\.", "language_model.model."),
)


def _remote_name(name):
    for pattern, replacement in _TO_REMOTE:
        name = re.sub(pattern, replacement, name)
    return name


def _remote_config(config):
    """The configuration in the form microsoft publishes it."""
    vision, text = dict(config["vision_config"]), dict(config["text_config"])
    vision["dim_embed"] = vision.pop("embed_dim")
    vision["visual_temporal_embedding"] = {
        "type": "COSINE", "max_temporal_embeddings": vision.pop("max_temporal_embeddings"),
    }  # fmt: skip
    vision["image_pos_embed"] = {
        "type": "learned_abs_2d", "max_pos_embeddings": vision.pop("max_position_embeddings"),
    }  # fmt: skip
    vision |= {"model_type": "davit", "enable_checkpoint": False,
               "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"]}  # fmt: skip
    text |= {"model_type": "florence2_language", "max_position_embeddings": 4096,
             "normalize_before": False, "add_final_layer_norm": False}  # fmt: skip
    return {
        "architectures": ["Florence2ForConditionalGeneration"], "model_type": "florence2",
        "projection_dim": vision["projection_dim"], "vocab_size": text["vocab_size"],
        "vision_config": vision, "text_config": text,
    }  # fmt: skip


def _copy(twin, path, change):
    """Writes the twin's directory with its tensors changed by `change(tensors)`."""
    tensors = load_file(twin.path / "model.safetensors")
    tensors = change(tensors) or tensors
    save_file({n: np.ascontiguousarray(t) for n, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text((twin.path / "config.json").read_text())
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bitwise_and_torch_reads_it(name, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    twin = make_twin(name)
    model, params = twin.loaded
    save_model(tmp_path, model, params)
    stored, written = (load_file(p / "model.safetensors") for p in (twin.path, tmp_path))
    assert set(stored) == set(written)
    buffer = "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed"
    np.testing.assert_array_equal(written[buffer][0], stored[buffer][0])  # the row images use
    np.testing.assert_allclose(written.pop(buffer), stored.pop(buffer), atol=1e-6)
    for key, tensor in stored.items():
        np.testing.assert_array_equal(written[key], tensor)
    loaded, report = transformers.Florence2ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(report.values()), report
    with torch.no_grad():
        a = twin.oracle(**twin.torch_inputs()).logits
        b = loaded.eval()(**twin.torch_inputs()).logits
    assert torch.equal(a, b)
    assert load_model(tmp_path)[0] == model


def test_the_remote_code_layout_gives_the_same_parameters(tmp_path):
    twin = make_twin("tall")

    def change(tensors):
        remote = {_remote_name(n): t for n, t in tensors.items()}
        remote["image_projection"] = remote["image_projection"].T
        shared = remote["language_model.model.shared.weight"]
        remote["language_model.final_logits_bias"] = np.zeros((1, len(shared)), np.float32)
        for alias in ("model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head"):
            remote[f"language_model.{alias}.weight"] = shared
        assert not any(n.startswith("model.") for n in remote)
        return remote

    _copy(twin, tmp_path, change)
    config = json.loads((twin.path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(_remote_config(config)))
    model, params = load_model(tmp_path)
    want_model, want = twin.loaded
    # Its configuration claims 4096 positions; the tables say 128.
    assert model.config.text_config == want_model.config.text_config
    assert model.config.vision_config == want_model.config.vision_config
    for path, leaf in flatten(want).items():
        np.testing.assert_array_equal(flatten(params)[path], leaf)

    tensors = load_file(tmp_path / "model.safetensors")
    tensors["language_model.final_logits_bias"][0, 5] = 0.5
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"(?s)unless zero.*language_model\.final_logits_bias"):
        load_model(tmp_path)


def test_every_misfit_is_named_at_once(tmp_path):
    twin = make_twin("tall")
    shared = "model.language_model.shared.weight"
    missing = "model.vision_tower.blocks.2.1.channel_block.channel_attn.qkv.bias"
    misshaped = "model.language_model.encoder.layers.1.fc1.weight"
    doubled = "model.multi_modal_projector.image_proj_norm.weight"

    def change(tensors):
        del tensors[missing]
        tensors[misshaped] = tensors[misshaped][:-1]
        tensors["model.vision_tower.head.weight"] = np.zeros(3, np.float32)
        tensors["image_proj_norm.weight"] = tensors[doubled]

    with pytest.raises(WeightsError) as error:
        load_model(_copy(twin, tmp_path, change))
    for name in (missing, misshaped, doubled, "image_proj_norm.weight", "tower.head.weight"):
        assert name in str(error.value)

    def untie(tensors):
        tensors["lm_head.weight"] = tensors[shared] + 1

    with pytest.raises(WeightsError, match=r"lm_head\.weight differs from"):
        load_model(_copy(twin, tmp_path, untie))


def test_presets_have_the_released_sizes_and_names():
    large = FAMILY.abstract_params(Florence2(Florence2Config.large()))
    assert count_parameters(large["vision_tower"]) == 360_632_320
    text = large["language_model"]
    assert text["shared"]["embedding"].shape == (51289, 1024)
    assert math.prod(text["shared"]["embedding"].shape) == 52_519_936
    assert count_parameters(text["encoder"]) == 152_207_360
    assert count_parameters(text["decoder"]) == 202_612_736
    base = FAMILY.abstract_params(Florence2(Florence2Config.base()))
    assert round(count_parameters(base["vision_tower"]) / 1e6, 1) == 90.4
    assert round(count_parameters(base) / 1e6, 1) == 231.4

    rules = FAMILY.rules(Florence2Config.large())
    shapes = {p: x.shape for p, x in flatten(large).items()}
    entries = {_remote_name(e.name): e.shape for e in derive_entries(shapes, rules)}
    # The published file has 921 entries: three aliases of the token table and two buffers more.
    assert len(entries) == 921 - 5
    tower = "vision_tower.blocks.2.8"
    for name, shape in {
        "vision_tower.convs.0.proj.weight": (256, 3, 7, 7),
        "vision_tower.convs.3.norm.bias": (1024,),
        f"{tower}.spatial_block.conv1.fn.dw.weight": (1024, 1, 3, 3),
        f"{tower}.spatial_block.window_attn.fn.qkv.weight": (3072, 1024),
        f"{tower}.channel_block.channel_attn.norm.weight": (1024,),
        f"{tower}.channel_block.ffn.fn.net.fc1.weight": (4096, 1024),
        "image_projection": (1024, 2048),  # ours; stored transposed in that layout
        "image_pos_embed.column_embeddings.weight": (50, 1024),
        "language_model.model.encoder.embed_positions.weight": (1026, 1024),
        "language_model.model.decoder.layers.11.encoder_attn.out_proj.bias": (1024,),
        "language_model.model.decoder.layernorm_embedding.weight": (1024,),
    }.items():
        assert entries[name] == shape


def test_every_parameter_of_the_presets_has_a_sharding():
    mesh = make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    for config in (Florence2Config.large(), Florence2Config.base()):
        abstract = FAMILY.abstract_params(Florence2(config))
        shardings = param_shardings(abstract, FAMILY.param_axes, DEFAULT_RULES, mesh)
        spread = [s for s in jax.tree.leaves(shardings) if any(s.spec)]
        assert len(spread) > 60


def test_configurations_round_trip_and_unsupported_ones_raise():
    for config in (Florence2Config.large(), Florence2Config.base(), Florence2Config.tiny()):
        assert Florence2Config.from_hf(config.to_hf()) == config
        assert Florence2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    remote = _remote_config(Florence2Config.large().to_hf())
    read = Florence2Config.from_hf(remote)
    assert read.vision_config == Florence2Config.large().vision_config
    assert read.image_token_id == 51289
    for section, key, value in (
        ("vision_config", "activation_function", "relu"),
        ("vision_config", "image_feature_source", ["last_frame"]),
        ("vision_config", "image_pos_embed", {"type": "sine", "max_pos_embeddings": 50}),
        ("vision_config", "num_heads", [8, 16, 32]),
        ("vision_config", "projection_dim", 512),
        ("text_config", "normalize_before", True),
        ("text_config", "encoder_attention_heads", 7),
    ):
        broken = json.loads(json.dumps(remote))
        broken[section][key] = value
        with pytest.raises(ValueError, match=key):
            Florence2Config.from_hf(broken)


def test_float16_checkpoints_keep_or_change_their_type(tmp_path):
    twin = make_twin("tall")
    _copy(twin, tmp_path, lambda tensors: {n: t.astype(np.float16) for n, t in tensors.items()})
    assert {x.dtype for x in jax.tree.leaves(load_model(tmp_path)[1])} == {jnp.float16.dtype}
    params = load_model(tmp_path, dtype=jnp.float32)[1]
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.float32.dtype}
