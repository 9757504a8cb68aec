"""CLIP text against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from core_jax.models import load_model, save_model
from core_jax.models.clip_text import FAMILY, CLIPTextConfig, CLIPTextModel
from core_jax.partition import count_parameters, flatten
from tests.oracle import close, randomize, relative_error

CONFIGS = {
    "sd2": dict(hidden_size=32, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
                hidden_act="gelu"),
    "sd1": dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=3,
                hidden_act="quick_gelu"),
}  # fmt: skip


@pytest.fixture(scope="module", params=CONFIGS)
def twin(request, tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=100, max_position_embeddings=77, bos_token_id=0, eos_token_id=2, pad_token_id=1,
        **CONFIGS[request.param],
    )  # fmt: skip
    torch.manual_seed(0)
    model = randomize(transformers.CLIPTextModel(config).eval())
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    return model, path


def _ids():
    return jnp.asarray(np.random.default_rng(0).integers(3, 98, (2, 77)), jnp.int32)


def test_ids_and_embeddings_equal_transformers(twin):
    torch = pytest.importorskip("torch")

    oracle, path = twin
    with torch.no_grad():
        want = oracle(torch.tensor(np.array(_ids()))).last_hidden_state.numpy()
    model, params = load_model(path)
    got = jax.jit(model.apply)({"params": params}, _ids())
    assert close(got, want, 1e-5)
    embeds = params["token_embedding"]["embedding"][_ids()]
    from_embeds = model.apply({"params": params}, embeds, method="from_embeddings")
    assert close(from_embeds, want, 1e-5)
    changed = jax.tree.map(lambda x: x, params)
    changed["layers"]["mlp"]["fc1"]["bias"] = changed["layers"]["mlp"]["fc1"]["bias"] + 0.1
    assert relative_error(model.apply({"params": changed}, _ids()), want) > 1e-3


def test_round_trip_is_bitwise_and_torch_reads_it(twin, tmp_path):
    torch = pytest.importorskip("torch")
    import transformers

    oracle, path = twin
    model, params = load_model(path)
    save_model(tmp_path / "out", model, params)
    again = load_model(tmp_path / "out")[1]
    for name, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, flatten(again)[name])
    loaded = transformers.CLIPTextModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        a = oracle(torch.tensor(np.array(_ids()))).last_hidden_state
        b = loaded.eval()(torch.tensor(np.array(_ids()))).last_hidden_state
    assert torch.equal(a, b)


def test_presets_have_the_released_parameter_counts():
    abstract = FAMILY.abstract_params(CLIPTextModel(CLIPTextConfig.sd21()))
    assert count_parameters(abstract) == 340_387_840
    abstract = FAMILY.abstract_params(CLIPTextModel(CLIPTextConfig.sd15()))
    assert count_parameters(abstract) == 123_060_480


def test_too_many_tokens_is_an_error(twin):
    model, params = load_model(twin[1])
    with pytest.raises(ValueError, match="78 tokens"):
        model.apply({"params": params}, jnp.zeros((1, 78), jnp.int32))
