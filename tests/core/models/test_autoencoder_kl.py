"""The image autoencoder against diffusers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core_jax.convert.rules import WeightsError, derive_entries
from core_jax.models import load_model, save_model
from core_jax.models.autoencoder_kl import (
    FAMILY,
    AutoencoderKL,
    AutoencoderKLConfig,
    sample_latents,
    scale_latents,
    unscale_latents,
)
from core_jax.ops.execution import Execution
from core_jax.partition import count_parameters, flatten
from tests.oracle import close, randomize, relative_error

TOLERANCE = 2e-5
CONFIGS = {
    "sd": dict(block_out_channels=(16, 32, 32), layers_per_block=2, norm_num_groups=8,
               latent_channels=4),
    "bare": dict(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
                 latent_channels=3, use_quant_conv=False, use_post_quant_conv=False,
                 mid_block_add_attention=False, scaling_factor=1.5, shift_factor=0.1),
    "small": dict(block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=4),
}  # fmt: skip
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", params=["sd", "bare"])
def twin(request, tmp_path_factory):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    fields = CONFIGS[request.param]
    levels = len(fields["block_out_channels"])
    torch.manual_seed(0)
    oracle = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        **fields,
    )
    oracle = randomize(oracle.eval())
    path = tmp_path_factory.mktemp("vae")
    oracle.save_pretrained(path)
    return oracle, path


def _images(height=16, width=24):
    x = np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3))
    return jnp.asarray(x, jnp.float32)


def _nchw(x):
    torch = pytest.importorskip("torch")

    return torch.tensor(np.array(x).transpose(0, 3, 1, 2))


def _nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def _posterior(oracle, images):
    torch = pytest.importorskip("torch")

    with torch.no_grad():
        posterior = oracle.encode(_nchw(images)).latent_dist
    return _nhwc(posterior.mean), _nhwc(posterior.logvar)


def _decoded(oracle, latents):
    torch = pytest.importorskip("torch")

    with torch.no_grad():
        return _nhwc(oracle.decode(_nchw(latents)).sample)


def test_encoding_and_decoding_equal_diffusers(twin):
    oracle, path = twin
    model, params = load_model(path)
    want_mean, want_logvar = _posterior(oracle, _images())
    encode = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode"))
    mean, logvar = encode(params, _images())
    assert close(mean, want_mean, TOLERANCE)
    assert close(logvar, want_logvar, TOLERANCE)
    want = _decoded(oracle, want_mean)
    decode = jax.jit(lambda p, z: model.apply({"params": p}, z, method="decode"))
    assert close(decode(params, jnp.asarray(want_mean)), want, TOLERANCE)

    other, _ = encode(params, _images()[:, ::-1])
    assert relative_error(other, want_mean) > 100 * TOLERANCE
    changed = jax.tree.map(lambda x: x, params)
    conv = changed["decoder"]["mid_block"]["resnets_0"]["conv1"]
    conv["kernel"] = conv["kernel"].swapaxes(0, 1)
    assert relative_error(decode(changed, jnp.asarray(want_mean)), want) > 100 * TOLERANCE


def test_the_log_variance_is_clipped_as_diffusers_clips_it(twin):
    torch = pytest.importorskip("torch")

    oracle, path = twin
    model, params = load_model(path)
    images = _images() * 1e3
    with torch.no_grad():
        mean = oracle.encode(_nchw(images)).latent_dist.mean
    bias = "quant_conv" if model.config.use_quant_conv else "conv_out"
    tree = params if bias == "quant_conv" else params["encoder"]
    half = model.config.latent_channels
    shift = jnp.zeros_like(tree[bias]["bias"]).at[half].set(1e3).at[half + 1].set(-1e3)
    tree[bias]["bias"] = tree[bias]["bias"] + shift
    got, logvar = model.apply({"params": params}, images, method="encode")
    assert close(got, _nhwc(mean), 1e-3)
    assert (logvar[..., 0] == 20).all()
    assert (logvar[..., 1] == -30).all()


@pytest.mark.parametrize("twin", ["bare"], indirect=True)
def test_small_activations_show_the_epsilon(twin, tmp_path, monkeypatch):
    import diffusers
    torch = pytest.importorskip("torch")

    import core_jax.models.autoencoder_kl.model as module

    oracle = diffusers.AutoencoderKL.from_pretrained(twin[1]).eval()
    with torch.no_grad():
        for parameter in oracle.encoder.conv_in.parameters():
            parameter.mul_(1e-3)
    oracle.save_pretrained(tmp_path)
    model, params = load_model(tmp_path)
    want, _ = _posterior(oracle, _images())

    def run():
        encode = jax.jit(lambda p: model.apply({"params": p}, _images(), method="encode"))
        return encode(params)[0]

    assert close(run(), want, TOLERANCE)
    monkeypatch.setattr(module, "_EPS", 1e-5)
    assert relative_error(run(), want) > 100 * TOLERANCE


def test_round_trip_is_bitwise_and_diffusers_reads_it(twin, tmp_path):
    import diffusers

    oracle, path = twin
    model, params = load_model(path)
    save_model(tmp_path / "out", model, params)
    stored, again = load_file(path / FILE), load_file(tmp_path / "out" / FILE)
    assert stored.keys() == again.keys()
    for name in stored:
        np.testing.assert_array_equal(stored[name], again[name])
    loaded = diffusers.AutoencoderKL.from_pretrained(tmp_path / "out").eval()
    for name in ("scaling_factor", "shift_factor", "latent_channels"):
        assert loaded.config[name] == oracle.config[name]
    np.testing.assert_array_equal(
        _posterior(loaded, _images())[0], _posterior(oracle, _images())[0]
    )


@pytest.mark.parametrize("twin", ["sd"], indirect=True)
def test_attention_names_of_old_files(tmp_path, twin):
    _, path = twin
    tensors = load_file(path / FILE)
    old = {}
    for name, array in tensors.items():
        for new_name, old_name in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"),
                                   ("to_out.0", "proj_attn")):  # fmt: skip
            name = name.replace(f"attentions.0.{new_name}.", f"attentions.0.{old_name}.")
        old[name] = array
    assert old.keys() != tensors.keys()
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    save_file(old, tmp_path / FILE)
    want, got = flatten(load_model(path)[1]), flatten(load_model(tmp_path)[1])
    for name in want:
        np.testing.assert_array_equal(want[name], got[name])
    twice = "encoder.mid_block.attentions.0.to_q.weight"
    save_file(old | {twice: tensors[twice]}, tmp_path / FILE)
    with pytest.raises(WeightsError, match=f"(?s)doubly used.*{twice}.*query.weight"):
        load_model(tmp_path)


def test_misfits_are_listed_together(tmp_path, twin):
    _, path = twin
    tensors = load_file(path / FILE)
    tensors["decoder.mystery.weight"] = tensors.pop("decoder.conv_out.weight")
    tensors["encoder.conv_in.bias"] = tensors["encoder.conv_in.bias"][:-1].copy()
    (tmp_path / "config.json").write_text((path / "config.json").read_text())
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(WeightsError) as error:
        load_model(tmp_path)
    for name in ("decoder.conv_out.weight", "decoder.mystery.weight", "encoder.conv_in.bias"):
        assert name in str(error.value)


def test_execution_changes_nothing_but_rounding():
    execution = Execution(conv="im2col", remat="full")
    config = AutoencoderKLConfig.from_hf(_raw(CONFIGS["small"]))
    params = FAMILY.init_params(AutoencoderKL(config), jax.random.key(0))

    def loss(params, execution):
        out = AutoencoderKL(config, execution).apply({"params": params}, _images(4, 6))
        return jnp.sum(out**2)

    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, Execution())
    value2, grads2 = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, execution)
    assert close(value2, value, 1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads))
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads2), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4 * scale)


def _raw(fields):
    levels = len(fields["block_out_channels"])
    return {
        "_class_name": "AutoencoderKL",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        **fields,
    }


def test_the_preset_is_the_released_network():
    model = AutoencoderKL(AutoencoderKLConfig.sd21())
    abstract = FAMILY.abstract_params(model)
    assert count_parameters(abstract) == 83_653_863
    shapes = {name: leaf.shape for name, leaf in flatten(abstract).items()}
    entries = {e.name: e.shape for e in derive_entries(shapes, FAMILY.rules(model.config))}
    assert len(entries) == 248
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")

    with torch.device("meta"):
        oracle = diffusers.AutoencoderKL.from_config(
            json.loads(json.dumps(model.config.to_hf()))
        )
    assert entries == {n: tuple(p.shape) for n, p in oracle.state_dict().items()}


@pytest.mark.parametrize("twin", ["bare"], indirect=True)
def test_bfloat16(twin):
    oracle, path = twin
    model, params = load_model(path, dtype=jnp.bfloat16)
    out = model.apply({"params": params}, _images())
    assert out.dtype == jnp.bfloat16
    want = _decoded(oracle, _posterior(oracle, _images())[0])
    assert relative_error(out.astype(jnp.float32), want) < 0.1


def test_sampling_and_scaling():
    config = AutoencoderKLConfig(scaling_factor=0.5, shift_factor=2.0)
    mean = jnp.full((4, 32, 32, 4), 3.0)
    draw = sample_latents(mean, jnp.full_like(mean, 2 * np.log(0.5)), jax.random.key(1))
    assert abs(float(draw.mean()) - 3.0) < 0.02
    assert abs(float(draw.std()) - 0.5) < 0.02
    scaled = scale_latents(draw, config)
    np.testing.assert_allclose(scaled, (draw - 2) * 0.5, rtol=1e-6)
    np.testing.assert_allclose(unscale_latents(scaled, config), draw, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(act_fn="gelu"), "act_fn"),
        (dict(latents_mean=[0.0] * 4), "latents_mean"),
        (dict(brand_new=1), "brand_new"),
        (dict(down_block_types=["AttnDownEncoderBlock2D"] * 3), "AttnDownEncoderBlock2D"),
        (dict(up_block_types=["UpDecoderBlock2D"]), "up_block_types has 1"),
        (dict(norm_num_groups=5), "does not divide into norm_num_groups"),
        (dict(norm_num_groups=None), "norm_num_groups"),
    ],
)
def test_unsupported_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        AutoencoderKLConfig.from_hf(_raw(CONFIGS["sd"]) | change)


def test_shapes_that_do_not_fit_are_errors():
    config = AutoencoderKLConfig.from_hf(_raw(CONFIGS["sd"]))
    model = AutoencoderKL(config)
    params = FAMILY.abstract_params(model)
    for images, message in (
        (jax.ShapeDtypeStruct((1, 16, 18, 3), jnp.float32), "16x18: .* multiples of 4"),
        (jax.ShapeDtypeStruct((1, 16, 16, 1), jnp.float32), "1 channels, the encoder takes 3"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.apply, {"params": params}, images)
