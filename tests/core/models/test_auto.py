"""load_model and save_model: types, shards, meshes, pipelines, and errors that name everything."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from safetensors.numpy import load_file, save_file

from core_jax.convert.rules import WeightsError
from core_jax.convert.safetensors_io import CheckpointFormatError
from core_jax.models import load_config, load_model, save_model
from core_jax.models.auto import UnknownModelError, family_of, find_family
from core_jax.models.clip_text import FAMILY as CLIP_TEXT
from core_jax.models.clip_text import CLIPTextConfig, CLIPTextModel
from core_jax.models.hf_config import ModelConfigError
from core_jax.models.qwen2 import FAMILY as QWEN2
from core_jax.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from core_jax.partition import flatten
from core_jax.sharding import DEFAULT_RULES, make_mesh

FILE = "model.safetensors"
CLIP = CLIPTextConfig(
    vocab_size=24, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, max_position_embeddings=6,
)  # fmt: skip
QWEN = Qwen2Config(
    vocab_size=24, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


def _random(family, model, dtype=np.float32):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), family.abstract_params(model)
    )


@pytest.fixture(scope="module")
def clip():
    model = CLIPTextModel(config=CLIP)
    return model, _random(CLIP_TEXT, model)


@pytest.fixture
def stored(clip, tmp_path):
    """A directory, and a function that rewrites its tensors."""
    save_model(tmp_path, *clip)

    def rewrite(change):
        tensors = load_file(tmp_path / FILE)
        tensors = change(tensors) or tensors
        tensors = {n: np.ascontiguousarray(t) for n, t in tensors.items()}
        save_file(tensors, tmp_path / FILE)
        return tmp_path

    return rewrite


def _equal(a, b):
    a, b = flatten(a), flatten(b)
    assert set(a) == set(b)
    return all(
        a[n].dtype == b[n].dtype and np.asarray(a[n]).tobytes() == np.asarray(b[n]).tobytes()
        for n in a
    )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_canonical_round_trips_are_bitwise(dtype, tmp_path):
    model = Qwen2ForCausalLM(config=QWEN)
    params = _random(QWEN2, model, dtype)
    save_model(tmp_path / "a", model, params)
    read, again = load_model(tmp_path / "a")
    assert read.config == QWEN
    assert _equal(again, params)
    save_model(tmp_path / "b", read, again)
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["dtype"] == np.dtype(dtype).name


def test_shards_give_the_same_parameters(clip, tmp_path):
    save_model(tmp_path, *clip, max_shard_bytes=600)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    assert _equal(load_model(tmp_path)[1], clip[1])


def test_the_type_can_be_chosen_on_both_sides(clip, tmp_path):
    save_model(tmp_path, *clip)
    for dtype in (jnp.bfloat16, "bfloat16"):
        _, params = load_model(tmp_path, dtype=dtype)
        assert {x.dtype.name for x in jax.tree.leaves(params)} == {"bfloat16"}
        assert _equal(params, jax.tree.map(lambda x: x.astype(jnp.bfloat16), clip[1]))
    save_model(tmp_path, *clip, dtype=np.float16)
    assert {t.dtype.name for t in load_file(tmp_path / FILE).values()} == {"float16"}


def test_types_may_be_mixed_in_one_file(stored, clip):
    def change(tensors):
        for name in tensors:
            if name.endswith("fc1.weight"):
                tensors[name] = tensors[name].astype(np.float16)
            elif "layers.1" in name and "fc2" in name:
                tensors[name] = tensors[name].astype(ml_dtypes.bfloat16)
            elif "final_layer_norm" in name:
                tensors[name] = tensors[name].astype(np.float64)

    _, params = load_model(stored(change))
    mlp = params["layers"]["mlp"]
    assert mlp["fc1"]["kernel"].dtype == jnp.float16
    # One layer of the stack is stored in float32, the other in bfloat16: the wider type.
    assert mlp["fc2"]["kernel"].dtype == jnp.float32
    want = np.asarray(clip[1]["layers"]["mlp"]["fc2"]["kernel"])
    np.testing.assert_array_equal(mlp["fc2"]["kernel"][0], want[0])
    np.testing.assert_array_equal(
        mlp["fc2"]["kernel"][1], want[1].astype(ml_dtypes.bfloat16).astype(np.float32)
    )
    assert params["final_layer_norm"]["scale"].dtype == jnp.float32


def test_every_misfit_of_a_directory_is_named(stored):
    def change(tensors):
        del tensors["text_model.final_layer_norm.bias"]
        tensors["text_model.encoder.layers.0.mlp.fc1.bias"] = np.zeros(3, np.float32)
        tensors["encoder.layers.1.mlp.fc1.bias"] = np.zeros(16, np.float32)
        tensors["adapter.weight"] = np.zeros(1, np.float32)

    with pytest.raises(WeightsError) as caught:
        load_model(stored(change))
    for name in ("final_layer_norm.bias", "layers.0.mlp.fc1.bias: (3,)", "adapter.weight",
                 "layers.1.mlp.fc1.bias <- "):  # fmt: skip
        assert name in str(caught.value)


def test_quantised_weights_are_refused(stored):
    def change(tensors):
        name = "text_model.encoder.layers.0.mlp.fc1.weight"
        tensors[name] = tensors[name].astype(np.int8)

    with pytest.raises(WeightsError, match=r"quantised[\s\S]*fc1.weight: int8"):
        load_model(stored(change))


def test_a_tied_head_must_repeat_the_table(tmp_path):
    model = Qwen2ForCausalLM(config=QWEN)
    params = _random(QWEN2, model)
    save_model(tmp_path, model, params)
    tensors = load_file(tmp_path / FILE)
    head = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": head}, tmp_path / FILE)
    assert _equal(load_model(tmp_path)[1], params)
    save_file(tensors | {"lm_head.weight": head + 1}, tmp_path / FILE)
    with pytest.raises(WeightsError, match=r"lm_head.weight differs from model.embed_tokens"):
        load_model(tmp_path)


def test_parameters_lie_on_the_mesh_as_the_rules_say(clip, tmp_path):
    save_model(tmp_path, *clip)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    _, params = load_model(tmp_path, mesh=mesh, rules=DEFAULT_RULES)
    assert _equal(params, clip[1])
    layers = params["layers"]
    wanted = {
        "fc1": (layers["mlp"]["fc1"]["kernel"], PartitionSpec(None, "fsdp", "tensor"), (2, 4, 8)),
        "fc2": (layers["mlp"]["fc2"]["kernel"], PartitionSpec(None, "tensor", "fsdp"), (2, 8, 4)),
        "table": (
            params["token_embedding"]["embedding"], PartitionSpec("tensor", "fsdp"), (12, 4)
        ),
        "norm": (params["final_layer_norm"]["scale"], PartitionSpec(None), (8,)),
    }  # fmt: skip
    for name, (leaf, spec, shard) in wanted.items():
        assert leaf.sharding.is_equivalent_to(
            jax.sharding.NamedSharding(mesh, spec), leaf.ndim
        ), name
        assert {s.data.shape for s in leaf.addressable_shards} == {shard}, name
    with pytest.raises(ValueError, match="'mlp' has no rule"):
        load_model(tmp_path, mesh=mesh, rules={k: v for k, v in DEFAULT_RULES.items()
                                               if k != "mlp"})  # fmt: skip
    # Sharded parameters are written as others are.
    save_model(tmp_path / "out", clip[0], params)
    assert (tmp_path / "out" / FILE).read_bytes() == (tmp_path / FILE).read_bytes()


def test_a_mesh_without_rules_shards_by_size(clip, tmp_path):
    save_model(tmp_path, *clip)
    for shape in ({"fsdp": 8}, {"data": 8}):
        mesh = make_mesh(shape)
        _, params = load_model(tmp_path, mesh=mesh)
        assert _equal(params, clip[1])
        assert all(x.sharding.mesh.size == 8 for x in jax.tree.leaves(params))


def test_pipelines_are_dictionaries_of_their_sub_folders(clip, tmp_path):
    qwen = Qwen2ForCausalLM(config=QWEN)
    models = {"text_encoder": clip[0], "writer": qwen}
    params = {"text_encoder": clip[1], "writer": _random(QWEN2, qwen)}
    save_model(tmp_path, models, params)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "safety_checker": [None, None]}
    index |= {"requires_safety_checker": False}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    read, again = load_model(tmp_path, dtype=jnp.float32)
    assert {n: m.config for n, m in read.items()} == {"text_encoder": CLIP, "writer": QWEN}
    assert _equal(again["writer"], params["writer"])
    # An index that is there stays.
    save_model(tmp_path, models, params)
    assert json.loads((tmp_path / "model_index.json").read_text()) == index
    (tmp_path / "writer" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="incomplete: writer"):
        load_model(tmp_path)


def test_what_no_family_reads(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load_model(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"an adapter .* merge it into its base model"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(UnknownModelError, match=r"LlamaForCausalLM.*supported.*Qwen2"):
        load_model(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelConfigError, match=r"config\.json is not JSON"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelConfigError, match=r"config\.json holds no JSON object"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "hidden_act": "relu"}')
    with pytest.raises(ModelConfigError, match=r"config\.json: Qwen2: not supported .*relu"):
        load_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "model_index.json").write_text('{"unet": ["diffusers", "SD3Transformer2DModel"]}')
    with pytest.raises(UnknownModelError, match="SD3Transformer2DModel"):
        load_model(tmp_path)
    with pytest.raises(UnknownModelError, match="nothing"):
        find_family({})
    with pytest.raises(UnknownModelError, match="Other"):
        family_of(type("Other", (nn.Module,), {"__module__": "elsewhere.model"})())


def test_weights_that_are_pickles_are_refused(clip, tmp_path):
    save_model(tmp_path, *clip)
    (tmp_path / FILE).rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointFormatError, match="Pickle files can run code"):
        load_model(tmp_path)


def test_a_tree_that_is_not_the_models_is_not_written(clip, tmp_path):
    model, params = clip
    broken = {k: v for k, v in params.items() if k != "layers"}
    broken |= {"extra": {"bias": jnp.zeros(1)}}
    broken["final_layer_norm"] = {"scale": jnp.zeros(9), "bias": jnp.zeros(8)}
    with pytest.raises(WeightsError) as caught:
        save_model(tmp_path / "out", model, broken)
    wrong = "final_layer_norm/scale: (9,), not (8,)"
    for name in ("missing (", "layers/mlp/fc1/kernel", "extra/bias", wrong):
        assert name in str(caught.value)
    assert not (tmp_path / "out").exists()
