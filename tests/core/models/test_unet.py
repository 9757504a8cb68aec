"""The denoiser against diffusers."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from core_jax.convert.rules import derive_entries
from core_jax.models import load_model, save_model
from core_jax.models.unet import FAMILY, UNet2DConditionConfig, UNet2DConditionModel
from core_jax.ops.execution import Execution
from core_jax.partition import count_parameters, flatten
from tests.oracle import close, randomize, relative_error

TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
FILE = "diffusion_pytorch_model.safetensors"
SD21 = dict(block_out_channels=(8, 16, 16), norm_num_groups=4, layers_per_block=2,
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(1, 2, 4), cross_attention_dim=12,
            use_linear_projection=True)  # fmt: skip
SD15 = dict(block_out_channels=(8, 16), norm_num_groups=8, layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=2, cross_attention_dim=10)  # fmt: skip
ODD = dict(SD15, layers_per_block=(1, 2), transformer_layers_per_block=(2, 1),
           attention_head_dim=(2, 4), only_cross_attention=(True, False), in_channels=5,
           out_channels=3, mid_block_scale_factor=2, flip_sin_to_cos=False, freq_shift=1,
           downsample_padding=0, norm_eps=1e-3, upcast_attention=True, time_embedding_dim=24,
           resnet_time_scale_shift="scale_shift", use_linear_projection=True,
           down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
           up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip
SMALLEST = dict(SD15, mid_block_type=None, up_block_types=("UpBlock2D", "UpBlock2D"))
NO_MID = dict(SD15, mid_block_type=None)
BARE_MID = dict(SD15, mid_block_type="UNetMidBlock2D")
CONFIGS = {"sd21": SD21, "sd15": SD15, "odd": ODD, "no_mid": NO_MID, "bare_mid": BARE_MID}


def _oracle(fields):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return randomize(diffusers.UNet2DConditionModel(**fields).eval())


@pytest.fixture(scope="module", params=CONFIGS)
def twin(request, tmp_path_factory):
    oracle = _oracle(CONFIGS[request.param])
    path = tmp_path_factory.mktemp("unet")
    oracle.save_pretrained(path)
    return oracle, path


def _inputs(config, height=8, width=12):
    rng = np.random.default_rng(0)
    sample = rng.normal(size=(2, height, width, config.in_channels))
    context = rng.normal(size=(2, 7, config.per_block("cross_attention_dim")[0]))
    return (
        jnp.asarray(sample, jnp.float32),
        jnp.asarray([3, 951], jnp.int32),
        jnp.asarray(context, jnp.float32),
    )


def _weighting(shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def _expected(oracle, sample, timesteps, context):
    """Output, and the gradient of a weighted sum of it with respect to the context."""
    torch = pytest.importorskip("torch")

    context = torch.tensor(np.array(context), requires_grad=True)
    sample = torch.tensor(np.array(sample).transpose(0, 3, 1, 2))
    out = oracle(sample, torch.tensor(np.array(timesteps)), context).sample.permute(0, 2, 3, 1)
    (out * torch.tensor(_weighting(out.shape))).sum().backward()
    return out.detach().numpy(), context.grad.numpy()


def _forward_and_gradient(model):
    @jax.jit
    def run(params, sample, timesteps, context):
        def loss(context):
            out = model.apply({"params": params}, sample, timesteps, context)
            return jnp.sum(out * _weighting(out.shape)), out

        (_, out), grad = jax.value_and_grad(loss, has_aux=True)(context)
        return out, grad

    return run


def test_output_and_context_gradient_equal_diffusers(twin):
    oracle, path = twin
    model, params = load_model(path)
    inputs = _inputs(model.config)
    want, want_grad = _expected(oracle, *inputs)
    run = _forward_and_gradient(model)
    got, grad = run(params, *inputs)
    assert close(got, want, TOLERANCE)
    assert close(grad, want_grad, GRADIENT_TOLERANCE)

    sample, timesteps, context = inputs
    other, other_grad = run(params, sample, timesteps + 20, context)
    assert relative_error(other, want) > 100 * TOLERANCE
    assert relative_error(other_grad, want_grad) > 100 * GRADIENT_TOLERANCE
    other, _ = run(params, sample, timesteps, context[:, ::-1] * 1.5)
    assert relative_error(other, want) > 100 * TOLERANCE


def test_fractional_timesteps_equal_diffusers(tmp_path):
    oracle = _oracle(SMALLEST)
    config = UNet2DConditionConfig.from_hf(SMALLEST)
    sample, _, context = _inputs(config)
    timesteps = jnp.asarray([0.25, 517.75], jnp.float32)
    want, _ = _expected(oracle, sample, timesteps, context)
    oracle.save_pretrained(tmp_path)
    model, params = load_model(tmp_path)
    got = jax.jit(model.apply)({"params": params}, sample, timesteps, context)
    assert close(got, want, TOLERANCE)
    got = jax.jit(model.apply)({"params": params}, sample, jnp.round(timesteps), context)
    assert relative_error(got, want) > 100 * TOLERANCE


def test_small_activations_show_every_epsilon(tmp_path, monkeypatch):
    """With activations of unit variance an epsilon of 1e-5 for one of 1e-6 would pass."""
    torch = pytest.importorskip("torch")

    import core_jax.models.unet.model as module

    oracle = _oracle(SMALLEST)
    with torch.no_grad():
        first = oracle.down_blocks[0]
        for part in (oracle.conv_in, first.resnets[0].conv2, first.attentions[0].proj_in):
            for parameter in part.parameters():
                parameter.mul_(1e-3)
    oracle.save_pretrained(tmp_path)
    model, params = load_model(tmp_path)
    inputs = _inputs(model.config, 4, 6)
    want, _ = _expected(oracle, *inputs)

    def run():
        return jax.jit(lambda p: model.apply({"params": p}, *inputs))(params)

    assert close(run(), want, 5e-6)
    for name, wrong in (("_TRANSFORMER_GROUP_NORM_EPS", 1e-5), ("_LAYER_NORM_EPS", 1e-6)):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, wrong)
            assert relative_error(run(), want) > 100 * 5e-6


def test_round_trip_is_bitwise_and_diffusers_reads_it(twin, tmp_path):
    import diffusers

    oracle, path = twin
    model, params = load_model(path)
    save_model(tmp_path / "out", model, params)
    stored, again = load_file(path / FILE), load_file(tmp_path / "out" / FILE)
    assert stored.keys() == again.keys()
    for name in stored:
        np.testing.assert_array_equal(stored[name], again[name])
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "out").eval()
    inputs = _inputs(model.config)
    np.testing.assert_array_equal(_expected(loaded, *inputs)[0], _expected(oracle, *inputs)[0])


@pytest.mark.parametrize(
    "execution",
    [Execution(conv="im2col"), Execution(remat="full"), Execution(remat="dots")],
    ids=["im2col", "remat", "dots"],
)
def test_execution_changes_nothing_but_rounding(execution, plain_result):
    config, params, want = plain_result
    run = _forward_and_gradient(UNet2DConditionModel(config, execution))
    for a, b in zip(run(params, *_inputs(config, 4, 6)), want, strict=True):
        assert close(a, b, 1e-5)


@pytest.fixture(scope="module")
def plain_result():
    config = UNet2DConditionConfig.from_hf(SMALLEST)
    model = UNet2DConditionModel(config)
    params = FAMILY.init_params(model, jax.random.key(0))
    return config, params, _forward_and_gradient(model)(params, *_inputs(config, 4, 6))


def test_remat_wraps_each_residual_block_and_transformer():
    config = UNet2DConditionConfig.from_hf(SD15)
    params = FAMILY.abstract_params(UNet2DConditionModel(config))

    def count(execution):
        model = UNet2DConditionModel(config, execution)
        jaxpr = jax.make_jaxpr(model.apply)({"params": params}, *_inputs(config))
        return sum(eqn.primitive.name in ("checkpoint", "remat2") for eqn in jaxpr.eqns)

    # Residual blocks 1 + 1 down, 2 in the middle, 2 + 2 up; transformers 1 down, 1 middle, 2 up.
    assert count(Execution(remat="full")) == 8 + 4
    assert count(Execution()) == 0


@pytest.mark.parametrize(
    ("preset", "parameters"), [("sd21_base", 865_910_724), ("sd15", 859_520_964)]
)
def test_presets_are_the_released_networks(preset, parameters):
    model = UNet2DConditionModel(getattr(UNet2DConditionConfig, preset)())
    abstract = FAMILY.abstract_params(model)
    assert count_parameters(abstract) == parameters
    shapes = {name: leaf.shape for name, leaf in flatten(abstract).items()}
    entries = {e.name: e.shape for e in derive_entries(shapes, FAMILY.rules(model.config))}
    assert len(entries) == 686
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")

    with torch.device("meta"):
        oracle = diffusers.UNet2DConditionModel.from_config(
            json.loads(json.dumps(model.config.to_hf()))
        )
    assert entries == {n: tuple(p.shape) for n, p in oracle.state_dict().items()}


@pytest.mark.parametrize("twin", ["sd15"], indirect=True)
def test_bfloat16(twin):
    oracle, path = twin
    model, params = load_model(path, dtype=jnp.bfloat16)
    inputs = _inputs(model.config)
    out = jax.jit(model.apply)({"params": params}, *inputs)
    assert out.dtype == jnp.bfloat16
    assert relative_error(out.astype(jnp.float32), _expected(oracle, *inputs)[0]) < 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(class_embed_type="timestep"), "class_embed_type"),
        (dict(addition_embed_type="text", dropout=0.1), "addition_embed_type.*dropout"),
        (dict(dual_cross_attention=True), "dual_cross_attention"),
        (dict(act_fn="gelu"), "act_fn"),
        (dict(time_embedding_type="fourier"), "time_embedding_type"),
        (dict(encoder_hid_dim=8), "encoder_hid_dim"),
        (dict(num_attention_heads=8), "num_attention_heads"),
        (dict(brand_new="x"), "brand_new"),
        (dict(cross_attention_dim=None), "cross_attention_dim"),
        (dict(cross_attention_dim=[8, 10]), "cross_attention_dim"),
        (dict(transformer_layers_per_block=[[1], [1]]), "nested"),
        (dict(attention_head_dim=[2, 2, 2]), "attention_head_dim has 3"),
        (dict(attention_head_dim=3), "3 heads"),
        (dict(norm_num_groups=5), "does not divide into norm_num_groups"),
        (dict(mid_block_type="UNetMidBlock2DSimpleCrossAttn"), "mid_block_type"),
        (dict(down_block_types=["AttnDownBlock2D", "DownBlock2D"]), "AttnDownBlock2D"),
        (dict(up_block_types=["UpBlock2D"]), "up_block_types has 1"),
        (dict(resnet_time_scale_shift="spatial"), "resnet_time_scale_shift"),
    ],
)
def test_unsupported_configurations_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        UNet2DConditionConfig.from_hf(SD15 | change)


def test_shapes_that_do_not_fit_are_errors():
    config = UNet2DConditionConfig.from_hf(SD21)
    model = UNet2DConditionModel(config)
    params = FAMILY.abstract_params(model)
    for sample, context, message in (
        ((1, 8, 6, 4), (1, 7, 12), "8x6: .* multiples of 4"),
        ((1, 8, 8, 3), (1, 7, 12), "3 channels, the U-Net takes 4"),
        ((1, 8, 8, 4), (1, 7, 10), "10 features, the U-Net takes 12"),
    ):
        inputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in (sample, (1,), context)]
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(model.apply, {"params": params}, *inputs)
