"""Names of Gemma 3 and SigLIP checkpoints: all layouts, both ways; released sizes; verify."""

import json
import re
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core_jax import verify
from core_jax.convert.rules import WeightsError, derive_entries
from core_jax.models import load_model, save_model
from core_jax.models.auto import load_config
from core_jax.models.gemma3 import FAMILY, Gemma3Config, Gemma3ForConditionalGeneration
from core_jax.models.gemma3_text import FAMILY as TEXT_FAMILY
from core_jax.models.gemma3_text import Gemma3ForCausalLM, Gemma3TextConfig
from core_jax.models.siglip import SiglipVisionModel
from core_jax.partition import count_parameters, flatten
from core_jax.sharding import DEFAULT_RULES, make_mesh, param_shardings
from tests.core.models.gemma3_twin import (
    TEXT,
    VISION,
    image_twin,
    oracle_inputs,
    oracle_logits,
    pixels,
    prompt,
    text_ids,
    text_twin,
)
from tests.oracle import close, randomize

NAMES = list(TEXT)


def _released(name):
    """A name that transformers 5 writes for a fresh model -> the released one."""
    return re.sub(r"^vision_tower\.(?=[eph])", "vision_tower.vision_model.", name)


def _internal(name):
    """... -> the name within transformers 5."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    name = name.removeprefix("language_model.model.")
    return f"model.{name}" if not name.startswith(("embed", "layers", "norm")) else (
        f"model.language_model.{name}"
    )  # fmt: skip


def _copy(path, target, tensors):
    target.mkdir()
    shutil.copy(path / "config.json", target)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def _assert_same(params, want):
    params, want = flatten(params), flatten(want)
    assert params.keys() == want.keys()
    for name, leaf in params.items():
        np.testing.assert_array_equal(leaf, want[name], err_msg=name)


@pytest.mark.parametrize("kind", ["released", "internal", "with the head"])
def test_every_layout_is_read_and_the_released_one_is_written(kind, tmp_path):
    twin = image_twin("remainder")
    tensors = load_file(twin.path / "model.safetensors")
    released = {_released(n): t for n, t in tensors.items()}
    assert "vision_tower.vision_model.embeddings.patch_embedding.weight" in released
    stored = released
    if kind == "internal":
        stored = {_internal(n): t for n, t in tensors.items()}
        assert "model.language_model.layers.5.mlp.up_proj.weight" in stored
        assert "model.vision_tower.encoder.layers.0.mlp.fc1.weight" in stored
    if kind == "with the head":
        table = released["language_model.model.embed_tokens.weight"]
        stored = released | {"language_model.lm_head.weight": table.copy()}
    model, params = load_model(_copy(twin.path, tmp_path / "in", stored))
    _assert_same(params, twin.params)
    save_model(tmp_path / "out", model, params)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == released.keys()
    for name, tensor in written.items():
        np.testing.assert_array_equal(tensor, released[name])


@pytest.mark.parametrize("name", NAMES)
def test_pytorch_reads_what_is_written(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    twin, ids, images = image_twin(name), prompt(name, 2, 40), pixels(name, 2)
    save_model(tmp_path, twin.model, twin.params)
    assert load_config(tmp_path)[1] == twin.model.config
    again, info = transformers.Gemma3ForConditionalGeneration.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        got = again.eval()(**oracle_inputs(name, ids, images)).logits.numpy()
    np.testing.assert_array_equal(got, oracle_logits(twin, **oracle_inputs(name, ids, images)))


@pytest.mark.parametrize("tied", [True, False])
def test_the_text_model_round_trips(tied, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    twin = text_twin("whole")
    if not tied:
        config = transformers.Gemma3TextConfig.from_dict(
            {**twin.oracle.config.to_dict(), "tie_word_embeddings": False}
        )
        oracle = randomize(transformers.Gemma3ForCausalLM(config).eval(), std=0.5)
        oracle.save_pretrained(tmp_path / "in")
        model, params = load_model(tmp_path / "in")
        assert "lm_head" in params
    else:
        oracle, model, params = twin.oracle, twin.model, twin.params
    save_model(tmp_path / "out", model, params)
    model, again = load_model(tmp_path / "out")
    _assert_same(again, params)
    loaded, info = transformers.Gemma3ForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = text_ids(1, 24)
    with torch.no_grad():
        want, got = (
            m.eval()(torch.tensor(ids.astype(np.int64))).logits.numpy() for m in (oracle, loaded)
        )
    np.testing.assert_array_equal(got, want)
    assert close(model.apply({"params": again}, jnp.asarray(ids)), want, 1e-5)
    # A bare language model has no prefix.
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    bare = {n.removeprefix("model."): t for n, t in tensors.items()}
    _assert_same(load_model(_copy(tmp_path / "out", tmp_path / "bare", bare))[1], params)


@pytest.mark.parametrize("head", [True, False])
def test_the_tower_alone(head, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")

    config = transformers.SiglipVisionConfig(vision_use_head=head, **VISION["remainder"])
    oracle = randomize(transformers.SiglipVisionModel(config).eval(), std=0.5)
    oracle.save_pretrained(tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    images = pixels("remainder", 2)
    with torch.no_grad():
        want = oracle(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state.numpy()
    hub = {f"vision_model.{n}": t for n, t in tensors.items()}
    for path in (tmp_path / "in", _copy(tmp_path / "in", tmp_path / "hub", hub)):
        model, params = load_model(path)
        assert isinstance(model, SiglipVisionModel)
        got = np.array(model.apply({"params": params}, jnp.asarray(images)))
        assert close(got.reshape(want.shape), want, 1e-5)
    save_model(tmp_path / "out", model, params)
    loaded, info = transformers.SiglipVisionModel.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        again = loaded.eval()(torch.tensor(images.transpose(0, 3, 1, 2))).last_hidden_state
    np.testing.assert_array_equal(again.numpy(), want)


def test_every_wrong_tensor_is_listed(tmp_path):
    twin = image_twin("remainder")
    tensors = {_released(n): t for n, t in load_file(twin.path / "model.safetensors").items()}
    missing = "language_model.model.layers.7.mlp.up_proj.weight"
    shaped = "multi_modal_projector.mm_input_projection_weight"
    del tensors[missing]
    tensors["vision_tower.vision_model.head.probe"] = np.ones(3, np.float32)
    tensors["model.language_model.norm.weight"] = tensors["language_model.model.norm.weight"].copy()
    tensors[shaped] = tensors[shaped].T.copy()
    with pytest.raises(WeightsError) as error:
        load_model(_copy(twin.path, tmp_path / "in", tensors))
    for name in (missing, "head.probe", "language_model.model.norm.weight <- ", shaped):
        assert name in str(error.value)


def _meta_shapes(cls, config):
    """Names and shapes of the released layout, from transformers without memory."""
    torch = pytest.importorskip("torch")

    with torch.device("meta"):
        model = cls(config)
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    count = sum(int(np.prod(s)) for s in shapes.values())
    names = {}
    for name, shape in shapes.items():
        new = name.replace("model.language_model.", "language_model.model.")
        new = re.sub(r"^model\.vision_tower\.", "vision_tower.vision_model.", new)
        names[new.replace("model.multi_modal", "multi_modal")] = shape
    return names, count


PRESETS = {
    "gemma3_4b": 4_300_079_472,
    "gemma3_12b": 12_187_325_040,
    "gemma3_27b": 27_432_406_640,
    "gemma3_1b": 999_885_952,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_released_sizes_and_names(preset):
    transformers = pytest.importorskip("transformers")
    if preset == "gemma3_1b":
        config, model_class, family = Gemma3TextConfig.gemma3_1b(), Gemma3ForCausalLM, TEXT_FAMILY
        theirs = (transformers.Gemma3ForCausalLM, transformers.Gemma3TextConfig)
    else:
        config, model_class = getattr(Gemma3Config, preset)(), Gemma3ForConditionalGeneration
        family = FAMILY
        theirs = (transformers.Gemma3ForConditionalGeneration, transformers.Gemma3Config)
    written = json.loads(json.dumps(config.to_hf()))
    assert type(config).from_hf(written) == config
    abstract = family.abstract_params(model_class(config))
    assert count_parameters(abstract) == PRESETS[preset]
    shapes = {n: x.shape for n, x in flatten(abstract).items()}
    entries = derive_entries(shapes, family.rules(config))
    want, count = _meta_shapes(theirs[0], theirs[1].from_dict(written))
    assert {e.name: e.shape for e in entries} == want
    assert count == PRESETS[preset]
    # Every parameter has a row of logical axes, and the rows' mesh axes divide it.
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    param_shardings(abstract, family.param_axes, DEFAULT_RULES, mesh)


def test_released_configurations_say_little_and_mean_the_presets():
    vision = {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
              "model_type": "siglip_vision_model", "num_attention_heads": 16,
              "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False}  # fmt: skip
    text = {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
            "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "sliding_window": 1024}  # fmt: skip
    released = {  # google/gemma-3-4b-it
        "architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
        "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144,
        "initializer_range": 0.02, "mm_tokens_per_image": 256, "model_type": "gemma3",
        "text_config": text, "vision_config": vision, "torch_dtype": "bfloat16",
    }  # fmt: skip
    assert Gemma3Config.from_hf(released) == Gemma3Config.gemma3_4b()
    drafter = Gemma3Config.drafter_1b()
    assert drafter.image_token_index >= drafter.text_config.vocab_size


def test_verify_compares_every_kind(tmp_path, capsys):
    twin = image_twin("whole")
    report = verify.verify(twin.path)
    assert not report.errors
    assert [d.output for d in report.differences] == ["vision_features", "image_tokens", "logits"]
    assert max(d.relative for d in report.differences) < 1e-5
    tensors = load_file(twin.path / "model.safetensors")
    tensors["language_model.model.layers.6.self_attn.k_norm.weight"] += 0.5
    other = _copy(twin.path, tmp_path / "other", tensors)
    *_, logits = verify.verify(twin.path, reference=other).differences
    assert logits.relative > 100 * verify.TOLERANCE
    assert verify.main([str(text_twin("remainder").path)]) == 0
    tower, params = SiglipVisionModel(twin.model.config.vision_config), twin.params["vision_tower"]
    save_model(tmp_path / "tower", tower, params)
    assert verify.main([str(tmp_path / "tower")]) == 0
    out = capsys.readouterr().out
    assert "vision_features" in out
    assert "logits" in out
