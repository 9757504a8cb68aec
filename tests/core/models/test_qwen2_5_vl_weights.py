"""Qwen2.5-VL's files: both layouts of names, strictness, presets, configurations, precision."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from core_jax import verify
from core_jax.convert.rules import WeightsError, derive_entries
from core_jax.models import load_config, load_model, save_model
from core_jax.models.qwen2_5_vl import (
    FAMILY,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLVisionConfig,
)
from core_jax.ops.execution import Execution
from core_jax.partition import count_parameters, flatten
from core_jax.sharding import DEFAULT_RULES, make_mesh, param_shardings
from tests.core.models.qwen2_5_vl_twin import (
    CONFIGS,
    apply,
    batch,
    make_oracle,
    oracle_logits,
    our_inputs,
    prompt,
    random_images,
    tiny,
)
from tests.oracle import close, relative_error

GRIDS = [(1, 4, 8)]


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen2_5_vl")
    oracle = make_oracle(request.param)
    oracle.save_pretrained(path)
    return oracle, path


def _tensors(path):
    from safetensors.numpy import load_file

    return load_file(path / "model.safetensors")


def _write(path, tensors, config):
    from safetensors.numpy import save_file

    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text((config / "config.json").read_text())
    return path


def _inputs(config):
    ids, valid = batch([prompt(6, GRIDS[0], 9)])
    return ids, valid, random_images(config, GRIDS), GRIDS


def test_round_trip_is_bitwise_and_torch_reads_it(saved, tmp_path):
    import transformers

    oracle, path = saved
    model, params = load_model(path)
    save_model(tmp_path, model, params)
    again_model, again = load_model(tmp_path)
    assert again_model.config == model.config
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, flatten(again)[name])
    # The names are the released ones, which transformers' own files have as well.
    assert set(_tensors(tmp_path)) == set(_tensors(path))
    assert "visual.patch_embed.proj.weight" in _tensors(tmp_path)
    loaded, info = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    inputs = _inputs(model.config)
    np.testing.assert_array_equal(
        oracle_logits(loaded.eval(), *inputs), oracle_logits(oracle, *inputs)
    )
    rope = loaded.config.text_config.rope_parameters
    assert rope["mrope_section"] == list(model.config.text_config.mrope_section)


def test_newer_names_and_buffers_are_read(saved, tmp_path):
    _, path = saved
    tensors, config = _tensors(path), load_config(path)[1]
    want = flatten(load_model(path)[1])

    def newer(name):
        if name.startswith("visual."):
            return f"model.{name}"
        return name.replace("model.", "model.language_model.", 1)

    variants = [{newer(n): t for n, t in tensors.items()}]
    extra = {"visual.rotary_pos_emb.inv_freq": np.ones(4, np.float32)}
    if config.text_config.tie_word_embeddings:
        assert "lm_head.weight" not in tensors
        extra["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    else:
        assert "lm_head.weight" in variants[0]
    for variant in [*variants, tensors | extra]:
        got = flatten(load_model(_write(tmp_path, variant, path))[1])
        assert all(np.array_equal(got[n], want[n]) for n in want)


def test_every_wrong_tensor_is_listed(saved, tmp_path):
    _, path = saved
    tensors = _tensors(path)
    del tensors["visual.blocks.1.mlp.up_proj.bias"]
    tensors["visual.blocks.0.attn.extra"] = np.ones(3, np.float32)
    tensors["model.visual.merger.ln_q.weight"] = tensors["visual.merger.ln_q.weight"].copy()
    kernel = "visual.patch_embed.proj.weight"
    tensors[kernel] = tensors[kernel][:, :, :1].copy()
    with pytest.raises(WeightsError) as error:
        load_model(_write(tmp_path, tensors, path))
    for name in ("blocks.1.mlp.up_proj.bias", "blocks.0.attn.extra", "ln_q.weight <- ", kernel):
        assert name in str(error.value)


PRESETS = {
    "qwen2p5_vl_3b": 3_754_622_976,
    "qwen2p5_vl_7b": 8_292_166_656,
    "qwen2p5_vl_32b": 33_452_718_336,
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_released_tensors(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = getattr(Qwen2_5_VLConfig, name)()
    abstract = FAMILY.abstract_params(Qwen2_5_VLForConditionalGeneration(config))
    assert count_parameters(abstract) == PRESETS[name]
    shapes = {n: x.shape for n, x in flatten(abstract).items()}
    stored = {e.name: e.shape for e in derive_entries(shapes, FAMILY.rules(config))}
    raw = json.loads(json.dumps(config.to_hf()))
    assert Qwen2_5_VLConfig.from_hf(raw) == config
    with torch.device("meta"):
        twin = transformers.Qwen2_5_VLForConditionalGeneration(
            transformers.Qwen2_5_VLConfig.from_dict(raw)
        )
    want = {
        n.replace("model.visual.", "visual.").replace("model.language_model.", "model."):
        tuple(p.shape) for n, p in twin.named_parameters()
    }  # fmt: skip
    assert stored == want
    assert ("lm_head.weight" in stored) == (name != "qwen2p5_vl_3b")


def test_every_parameter_has_a_sharding():
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    for name in ("qwen2p5_vl_3b", "qwen2p5_vl_7b"):
        config = getattr(Qwen2_5_VLConfig, name)()
        abstract = FAMILY.abstract_params(Qwen2_5_VLForConditionalGeneration(config))
        rules = {**DEFAULT_RULES, "kv_heads": None}
        found = flatten(param_shardings(abstract, FAMILY.param_axes, rules, mesh))
        assert found["visual/blocks/mlp/up_proj/kernel"].spec == PartitionSpec(
            None, "fsdp", "tensor"
        )


RELEASED_7B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"], "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "vision_start_token_id": 151652,
    "vision_end_token_id": 151653, "vision_token_id": 151654, "image_token_id": 151655,
    "video_token_id": 151656, "hidden_act": "silu", "hidden_size": 3584,
    "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 128000,
    "max_window_layers": 28, "model_type": "qwen2_5_vl", "num_attention_heads": 28,
    "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True, "use_sliding_window": False,
    "vision_config": {
        "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420,
        "num_heads": 16, "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14,
        "spatial_merge_size": 2, "spatial_patch_size": 14, "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "vocab_size": 152064,
}  # fmt: skip


def test_configurations_of_both_transformers_and_what_is_refused():
    want = Qwen2_5_VLConfig.qwen2p5_vl_7b()
    assert Qwen2_5_VLConfig.from_hf(RELEASED_7B) == want
    transformers = pytest.importorskip("transformers")
    new = transformers.Qwen2_5_VLConfig.from_dict(json.loads(json.dumps(RELEASED_7B))).to_dict()
    assert "text_config" in new
    assert Qwen2_5_VLConfig.from_hf(json.loads(json.dumps(new))) == want
    tied = RELEASED_7B | {"text_config": {**RELEASED_7B, "tie_word_embeddings": True}}
    assert Qwen2_5_VLConfig.from_hf(tied).text_config.tie_word_embeddings
    vision = RELEASED_7B["vision_config"]
    for change, message in (
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"use_sliding_window": True}, "sliding"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 16, 16]}}, "mrope_section"),
        ({"head_dim": 64}, "head_dim"),
        ({"vision_config": vision | {"hidden_act": "gelu"}}, "gelu"),
        ({"vision_config": vision | {"out_hidden_size": 1536}}, "out_hidden_size"),
        ({"vision_config": vision | {"window_size": 14}}, "window_size"),
        ({"vision_config": vision | {"num_heads": 640}}, "heads"),
        ({"vision_config": vision | {"rope_parameters": {"rope_theta": 1e6}}}, "base 10000"),
    ):
        with pytest.raises(ValueError, match=message):
            Qwen2_5_VLConfig.from_hf(RELEASED_7B | change)
    assert Qwen2_5_VLVisionConfig().window_patches == 64


def test_bfloat16_is_near_float32():
    _, model, params = tiny("untied")
    inputs, _, _ = our_inputs(model.config, *_inputs(model.config))
    want = apply(model, params, *inputs)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    got = apply(model, half, *inputs)
    assert got.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(got.astype(jnp.float32), want) < 0.2


@pytest.mark.slow
def test_remat_changes_no_gradient_of_the_tower():
    # The text model's layers are Qwen2's, whose tests look at their gradients.
    _, model, params = tiny("untied")
    inputs, _, _ = our_inputs(model.config, *_inputs(model.config))
    remat = dataclasses.replace(model, execution=Execution(remat="full"))

    def loss(visual, model):
        tokens = model.apply({"params": {"visual": visual}}, *inputs[3:6], method="image_tokens")
        return jnp.mean(jnp.square(tokens))

    grads = (jax.jit(jax.grad(loss), static_argnums=1)(params["visual"], m) for m in (model, remat))
    plain, again = map(flatten, grads)
    for name, leaf in plain.items():
        assert np.abs(leaf).max() > 0, name
        assert close(again[name], leaf, 1e-4), name


def test_verify_compares_the_family(tmp_path, capsys):
    make_oracle("tied").save_pretrained(tmp_path)
    assert verify.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "image_tokens" in out
    assert "logits" in out
    (tmp_path / "other").mkdir()
    tensors = _tensors(tmp_path)
    tensors["visual.merger.mlp.0.bias"][3] += 0.5
    other = _write(tmp_path / "other", tensors, tmp_path)
    assert verify.main([str(tmp_path), "--reference", str(other)]) == 1
