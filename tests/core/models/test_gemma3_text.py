"""Gemma 3's language model against transformers: logits, padding, configurations."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.models.gemma3_text import Gemma3ForCausalLM, Gemma3TextConfig
from tests.core.models.gemma3_twin import TEXT, WINDOW, oracle_logits, text_ids, text_twin
from tests.oracle import close, relative_error

NAMES = list(TEXT)


def _logits(twin, ids, valid=None, **changes):
    model = Gemma3ForCausalLM(Gemma3TextConfig(**{**twin.model.config.__dict__, **changes}))
    return jax.jit(model.apply)({"params": twin.params}, jnp.asarray(ids), valid)


def _oracle(twin, ids, **kwargs):
    torch = pytest.importorskip("torch")

    return oracle_logits(twin, input_ids=torch.tensor(ids.astype(np.int64)), **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_logits_of_long_sequences_equal_transformers(name):
    twin, ids = text_twin(name), text_ids(2, 200)
    want = _oracle(twin, ids)
    assert close(_logits(twin, ids), want, 1e-5)


@pytest.mark.parametrize("change", [
    dict(sliding_window=WINDOW + 1), dict(rope_theta=1.5e6), dict(rope_local_base_freq=1.1e4),
    dict(rope_scaling_factor=8.5), dict(query_pre_attn_scalar=22),
], ids=str)  # fmt: skip
def test_each_thing_that_sets_gemma_apart_is_seen(change):
    """The controls."""
    twin, ids = text_twin("remainder"), text_ids(1, 60)
    assert relative_error(_logits(twin, ids, **change), _oracle(twin, ids)) > 1e-3


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_valid_tokens(side):
    torch = pytest.importorskip("torch")

    twin, ids = text_twin("whole"), text_ids(2, 40)
    valid = np.ones((2, 40), bool)
    valid[1, slice(0, 9) if side == "left" else slice(31, 40)] = False
    want = _oracle(twin, ids, attention_mask=torch.tensor(valid.astype(int)))
    got = np.array(_logits(twin, ids, jnp.asarray(valid)))
    assert close(got[valid], want[valid], 1e-5)
    alone = _logits(twin, ids[1:][:, valid[1]])
    assert close(alone[0], got[1][valid[1]], 1e-5)
    # A hole in the middle is as if it were not there, windows included.
    valid[1] = True
    valid[1, 10:20] = False
    got = np.array(_logits(twin, ids, jnp.asarray(valid)))
    alone = _logits(twin, ids[1:][:, valid[1]])
    assert close(alone[0], got[1][valid[1]], 1e-5)


def test_soft_capping_where_the_configuration_has_it():
    transformers = pytest.importorskip("transformers")

    twin, ids = text_twin("whole"), text_ids(1, 12)
    config = transformers.Gemma3TextConfig.from_dict(
        {**twin.oracle.config.to_dict(), "final_logit_softcapping": 3.0}
    )
    capped = transformers.Gemma3ForCausalLM(config).eval()
    capped.load_state_dict(twin.oracle.state_dict())
    plain = _oracle(twin, ids)
    twin_config = Gemma3TextConfig.from_hf(json.loads(config.to_json_string(use_diff=False)))
    assert twin_config.final_logit_softcapping == 3.0
    twin.oracle, keep = capped, twin.oracle
    try:
        want = _oracle(twin, ids)
    finally:
        twin.oracle = keep
    assert close(_logits(twin, ids, final_logit_softcapping=3.0), want, 1e-5)
    assert relative_error(plain, want) > 1e-2


def test_layer_patterns():
    def types(layers, every):
        config = Gemma3TextConfig(num_hidden_layers=layers, sliding_window_pattern=every)
        assert config.local_layers == config.layer_types.count("sliding_attention")
        return "".join(t[0] for t in config.layer_types), config.patterns, config.remainder

    assert types(8, 6) == ("sssssfss", 1, 2)
    assert types(6, 2) == ("sfsfsf", 3, 0)
    assert types(3, 1) == ("fff", 3, 0)
    assert types(3, 6) == ("sss", 0, 3)


@pytest.mark.parametrize(("layers", "every"), [(3, 1), (3, 6), (5, 2)])
def test_unusual_patterns_equal_transformers(layers, every):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    from tests.core.models.gemma3_twin import _twin

    config = transformers.Gemma3TextConfig(
        vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=12, query_pre_attn_scalar=12,
        sliding_window=3, sliding_window_pattern=every,
    )  # fmt: skip
    torch.manual_seed(0)
    twin = _twin(transformers.Gemma3ForCausalLM(config), 0.5)
    ids = text_ids(1, 12) % 50
    assert twin.model.config.sliding_window_pattern in (every, layers + 1)
    assert close(_logits(twin, ids), _oracle(twin, ids), 1e-5)


def test_configurations_of_both_transformers_and_what_is_refused():
    released = {  # google/gemma-3-1b-it
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": None, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "initializer_range": 0.02,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "model_type": "gemma3_text",
        "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
        "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    }  # fmt: skip
    preset = Gemma3TextConfig.gemma3_1b()
    assert Gemma3TextConfig.from_hf(released) == preset
    new = {k: v for k, v in released.items() if not k.startswith(("rope", "sliding_window_p"))}
    new["layer_types"] = [
        "full_attention" if i % 6 == 5 else "sliding_attention" for i in range(26)
    ]
    new["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8, "rope_theta": 1000000},
        "sliding_attention": {"rope_type": "default", "rope_theta": 20000},
    }
    read = Gemma3TextConfig.from_hf(new)
    assert (read.rope_scaling_factor, read.rope_local_base_freq) == (8.0, 2e4)
    for config in (preset, read):
        assert Gemma3TextConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    # What transformers makes of what is written.
    transformers = pytest.importorskip("transformers")
    for config in (preset, read):
        theirs = transformers.Gemma3TextConfig.from_dict(json.loads(json.dumps(config.to_hf())))
        full = theirs.rope_parameters["full_attention"]
        assert full["rope_theta"] == config.rope_theta
        assert full.get("factor", 1.0) == config.rope_scaling_factor
        local = theirs.rope_parameters["sliding_attention"]
        assert local == {"rope_type": "default", "rope_theta": config.rope_local_base_freq}
        assert tuple(theirs.layer_types) == config.layer_types
    for change, message in (
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        ({"attention_bias": True}, "attention_bias"),
        ({"use_bidirectional_attention": True}, "bidirectional"),
        ({"hidden_activation": "silu"}, "silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"layer_types": ["full_attention"] + ["sliding_attention"] * 25}, "layer_types"),
    ):
        with pytest.raises(ValueError, match=message):
            Gemma3TextConfig.from_hf(released | change)
    with pytest.raises(ValueError, match="multiple"):
        Gemma3TextConfig(num_attention_heads=6, num_key_value_heads=4)
