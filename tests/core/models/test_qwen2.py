"""Qwen2 against transformers: logits, padding, names, presets."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.convert.rules import WeightsError
from core_jax.models import load_config, load_model, save_model
from core_jax.models.qwen2 import FAMILY, Qwen2Config, Qwen2ForCausalLM
from core_jax.ops.execution import Execution
from core_jax.partition import count_parameters, flatten
from tests.oracle import close, randomize, relative_error

CONFIGS = {
    "untied_gqa": dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
                       num_key_value_heads=2, tie_word_embeddings=False),
    "tied_mqa": dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=6,
                     num_key_value_heads=1, tie_word_embeddings=True),
}  # fmt: skip


def make_oracle(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=151, intermediate_size=112, max_position_embeddings=1024, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, rope_parameters=dict(rope_type="default", rope_theta=1e6),
        **CONFIGS[name],
    )  # fmt: skip
    torch.manual_seed(0)
    return randomize(transformers.Qwen2ForCausalLM(config).eval(), std=0.3)


@pytest.fixture(scope="module", params=CONFIGS)
def twin(request, tmp_path_factory):
    model = make_oracle(request.param)
    path = tmp_path_factory.mktemp("qwen2")
    model.save_pretrained(path)
    return model, path


def _ids(length=500):
    return jnp.asarray(np.random.default_rng(0).integers(3, 150, (2, length)), jnp.int32)


def _oracle_logits(oracle, ids, **kwargs):
    torch = pytest.importorskip("torch")

    with torch.no_grad():
        return oracle(torch.tensor(np.array(ids)), **kwargs).logits.numpy()


def test_logits_of_long_sequences_equal_transformers(twin):
    oracle, path = twin
    want = _oracle_logits(oracle, _ids())
    model, params = load_model(path)
    got = jax.jit(model.apply)({"params": params}, _ids())
    assert close(got, want, 1e-5)
    # Controls: another base of the rotary embeddings, and one changed bias.
    other = Qwen2ForCausalLM(FAMILY.config(**{**model.config.__dict__, "rope_theta": 9.9e5}))
    assert relative_error(other.apply({"params": params}, _ids()), want) > 1e-3
    changed = jax.tree.map(lambda x: x, params)
    changed["layers"]["self_attn"]["k_proj"]["bias"] *= 1.1
    assert relative_error(model.apply({"params": changed}, _ids()), want) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_valid_tokens(twin, side):
    torch = pytest.importorskip("torch")

    oracle, path = twin
    valid = np.ones((2, 40), bool)
    pads = slice(0, 7) if side == "left" else slice(33, 40)
    valid[1, pads] = False
    ids = np.where(valid, np.array(_ids(40)), 0)
    want = _oracle_logits(oracle, ids, attention_mask=torch.tensor(valid.astype(int)))
    model, params = load_model(path)
    got = model.apply({"params": params}, jnp.asarray(ids), jnp.asarray(valid))
    assert close(np.array(got)[valid], want[valid], 1e-5)
    unmasked = model.apply({"params": params}, jnp.asarray(ids))
    if side == "left":
        assert relative_error(np.array(unmasked)[valid], want[valid]) > 1e-3
    # A row alone gives what it gives beside others.
    alone = model.apply({"params": params}, jnp.asarray(ids[1:][:, valid[1]]))
    assert close(alone[0], np.array(got)[1][valid[1]], 1e-5)


def test_round_trip_is_bitwise_and_torch_reads_it(twin, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    oracle, path = twin
    model, params = load_model(path)
    save_model(tmp_path / "out", model, params)
    again_model, again = load_model(tmp_path / "out")
    assert again_model.config == model.config
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, flatten(again)[name])
    loaded, info = transformers.Qwen2ForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert loaded.config.rope_parameters["rope_theta"] == 1e6
    want, got = (_oracle_logits(m.eval(), _ids(50)) for m in (oracle, loaded))
    assert np.array_equal(want, got)
    assert torch.equal(oracle.model.norm.weight, loaded.model.norm.weight)


def test_bare_layout_buffers_and_aliases_are_read(twin, tmp_path):
    from safetensors.numpy import load_file, save_file

    _, path = twin
    tensors = load_file(path / "model.safetensors")
    config, want = load_config(path)[1], flatten(load_model(path)[1])
    variants = [{n.removeprefix("model."): t for n, t in tensors.items()}]
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    if config.tie_word_embeddings:
        extra["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    variants.append(tensors | extra)
    for variant in variants:
        save_file(variant, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text((path / "config.json").read_text())
        got = flatten(load_model(tmp_path)[1])
        assert all(np.array_equal(got[n], want[n]) for n in want)


def test_every_wrong_tensor_is_listed(twin, tmp_path):
    from safetensors.numpy import load_file, save_file

    _, path = twin
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.0.mlp.extra"] = np.ones(3, np.float32)
    tensors["norm.weight"] = tensors["model.norm.weight"].copy()
    bias = "model.layers.0.self_attn.q_proj.bias"
    tensors[bias] = tensors[bias][:-1].copy()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    with pytest.raises(WeightsError) as error:
        load_model(tmp_path)
    for name in ("layers.1.mlp.up_proj.weight", "layers.0.mlp.extra", "<- ", bias):
        assert name in str(error.value)


def test_presets_have_the_released_sizes_and_names():
    counts = {
        "qwen2p5_0p5b": 494_032_768,
        "qwen2p5_1p5b": 1_543_714_304,
        "qwen2p5_3b": 3_085_938_688,
        "qwen2p5_7b": 7_615_616_512,
    }
    for name, count in counts.items():
        config = getattr(Qwen2Config, name)()
        assert count_parameters(FAMILY.abstract_params(Qwen2ForCausalLM(config))) == count
        assert config.tie_word_embeddings == (name != "qwen2p5_7b")
        assert config.vocab_size == (152064 if name == "qwen2p5_7b" else 151936)
        assert Qwen2Config.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_the_3b_preset_has_the_released_tensors():
    from core_jax.convert.rules import derive_entries

    config = Qwen2Config.qwen2p5_3b()
    shapes = flatten(FAMILY.abstract_params(Qwen2ForCausalLM(config)))
    entries = derive_entries({n: x.shape for n, x in shapes.items()}, FAMILY.rules(config))
    stored = {e.name: e.shape for e in entries}
    layer = {
        "self_attn.q_proj.weight": (2048, 2048), "self_attn.q_proj.bias": (2048,),
        "self_attn.k_proj.weight": (256, 2048), "self_attn.k_proj.bias": (256,),
        "self_attn.v_proj.weight": (256, 2048), "self_attn.v_proj.bias": (256,),
        "self_attn.o_proj.weight": (2048, 2048), "mlp.gate_proj.weight": (11008, 2048),
        "mlp.up_proj.weight": (11008, 2048), "mlp.down_proj.weight": (2048, 11008),
        "input_layernorm.weight": (2048,), "post_attention_layernorm.weight": (2048,),
    }  # fmt: skip
    want = {f"model.layers.{i}.{n}": s for i in range(36) for n, s in layer.items()}
    want |= {"model.embed_tokens.weight": (151936, 2048), "model.norm.weight": (2048,)}
    assert stored == want


def test_configurations_of_both_transformers_and_what_is_refused():
    released = {
        "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 11008, "max_position_embeddings": 32768, "max_window_layers": 36,
        "model_type": "qwen2", "num_attention_heads": 16, "num_hidden_layers": 36,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "use_sliding_window": False,
        "vocab_size": 151936, "bos_token_id": 151643, "eos_token_id": 151643,
    }  # fmt: skip
    assert Qwen2Config.from_hf(released) == Qwen2Config.qwen2p5_3b()
    new = {k: v for k, v in released.items() if k != "rope_theta"}
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": 1000000.0}
    assert Qwen2Config.from_hf(new) == Qwen2Config.qwen2p5_3b()
    for change, message in (
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "linear"),
        ({"use_sliding_window": True}, "sliding"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding"),
        ({"hidden_act": "gelu"}, "gelu"),
    ):
        with pytest.raises(ValueError, match=message):
            Qwen2Config.from_hf(released | change)
    with pytest.raises(ValueError, match="multiple"):
        Qwen2Config(num_attention_heads=6, num_key_value_heads=4)


def test_bfloat16_is_near_float32_and_remat_and_unrolling_change_nothing(twin):
    _, path = twin
    model, params = load_model(path)
    want = jax.jit(model.apply)({"params": params}, _ids(8))
    half, half_params = load_model(path, dtype=jnp.bfloat16)
    got = jax.jit(half.apply)({"params": half_params}, _ids(8))
    assert got.dtype == jnp.bfloat16
    assert 1e-4 < relative_error(got.astype(jnp.float32), want) < 0.1
    changed = Qwen2ForCausalLM(model.config, Execution(remat="full", unroll=2))

    def loss(params, model):
        return jnp.mean(jnp.square(model.apply({"params": params}, _ids(8))))

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    plain, again = (grad(params, m) for m in (model, changed))
    for name, leaf in flatten(plain).items():
        assert close(flatten(again)[name], leaf, 1e-5), name
