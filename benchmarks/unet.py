"""The denoising U-Net against diffusers: forward, and forward + backward to the context.

    python -m benchmarks.unet [--size=middle|full|mini] [--conv=im2col|xla] [--dtype=float32]

The gradient goes to the context only, which is what stage 1 trains through; the U-Net is frozen.
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.alternate import Arguments, Benchmark, main
from benchmarks.timing import Measured

FORWARD, BACKWARD = "forward", "forward+backward"
CONTEXT_LENGTH = 77


@dataclasses.dataclass(frozen=True)
class Size:
    """Batch, and side of the latents (48 is VLV's 384 pixels)."""

    batch: int
    side: int


SIZES = {
    "tiny": Size(2, 8),
    "mini": Size(8, 16),
    "middle": Size(4, 32),
    "full": Size(1, 48),
}


def unet_config(size: str) -> Any:
    """The architecture of a size; "middle" is Stable Diffusion's in a fifth of the channels."""
    from core_jax.models.unet import UNet2DConditionConfig

    if size == "full":
        return UNet2DConditionConfig.sd21_base()
    if size == "mini":
        from miniature.standins import unet_config as mini

        return mini()
    if size == "middle":
        return dataclasses.replace(
            UNet2DConditionConfig.sd21_base(), sample_size=32, cross_attention_dim=128,
            block_out_channels=(64, 128, 256, 256), attention_head_dim=(1, 2, 4, 4),
        )  # fmt: skip
    return UNet2DConditionConfig(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        cross_attention_dim=16, attention_head_dim=(1, 2), use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), mid_block_type=None,
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def unet_inputs(config: Any, batch: int, side: int) -> dict[str, Any]:
    """Latents, timesteps, context, and what the output's gradient is."""
    rng = np.random.default_rng(0)
    width = config.per_block("cross_attention_dim")[0]
    shape = (batch, side, side, config.in_channels)
    return {
        "sample": rng.standard_normal(shape, np.float32),
        "timesteps": np.linspace(1, 999, batch).astype(np.int32),
        "context": rng.standard_normal((batch, CONTEXT_LENGTH, width), np.float32),
        "cotangent": rng.standard_normal((*shape[:3], config.out_channels), np.float32),
    }


def functions(model: Any, inputs: Mapping[str, np.ndarray], dtype: Any) -> tuple[Any, Any]:
    """(forward, forward+backward), both functions of the parameters and the context."""
    import jax
    import jax.numpy as jnp

    sample, cotangent = (jnp.asarray(inputs[n], dtype) for n in ("sample", "cotangent"))
    timesteps = jnp.asarray(inputs["timesteps"])

    def predict(params, context):
        return model.apply({"params": params}, sample, timesteps, context)

    def both(params, context):
        prediction, pullback = jax.vjp(lambda c: predict(params, c), context)
        return prediction, pullback(cotangent)[0]

    return predict, both


def time_ours(
    measured: Measured, model, params, inputs, dtype, *, repeats: int, prefix: str = ""
) -> None:
    """Adds both measures of this project."""
    import jax
    import jax.numpy as jnp

    context = jnp.asarray(inputs["context"], dtype)
    forward, both = (jax.jit(f) for f in functions(model, inputs, dtype))
    prediction = measured.time(
        prefix + FORWARD, lambda: jax.block_until_ready(forward(params, context)), repeats=repeats
    )
    _, gradient = measured.time(
        prefix + BACKWARD, lambda: jax.block_until_ready(both(params, context)), repeats=repeats
    )
    measured.outputs[FORWARD] = np.asarray(prediction, np.float32)
    measured.outputs[BACKWARD] = np.asarray(gradient, np.float32)


def time_peer(
    measured: Measured, model, inputs, dtype, device: str, *, repeats: int, prefix: str = ""
) -> None:
    """Adds both measures of a diffusers model, run eagerly."""
    import torch

    from benchmarks.torch_peer import tensor, to_numpy

    model.requires_grad_(False)
    sample, timesteps, context, cotangent = (
        tensor(inputs[n], dtype, device) for n in ("sample", "timesteps", "context", "cotangent")
    )

    def wait(result):
        if device == "cuda":
            torch.cuda.synchronize()
        return result

    def forward():
        with torch.inference_mode():
            return wait(model(sample, timesteps, context).sample)

    def both():
        leaf = context.detach().requires_grad_(True)
        model(sample, timesteps, leaf).sample.backward(cotangent)
        return wait(leaf.grad)

    prediction = measured.time(prefix + FORWARD, forward, repeats=repeats)
    gradient = measured.time(prefix + BACKWARD, both, repeats=repeats)
    measured.outputs[FORWARD] = to_numpy(prediction)
    measured.outputs[BACKWARD] = to_numpy(gradient)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=tuple(SIZES), default="middle")
    parser.add_argument("--conv", choices=("xla", "im2col"), default="im2col")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, help="images a call; the size's own by default")


def _prepare(arguments: Arguments, folder: pathlib.Path) -> Mapping[str, Any]:
    from benchmarks.random_weights import random_params
    from core_jax.models import save_model
    from core_jax.models.unet import UNet2DConditionModel
    from core_jax.partition import count_parameters

    config, size = unet_config(arguments.size), SIZES[arguments.size]
    model = UNet2DConditionModel(config=config)
    params = random_params(model)
    save_model(folder / "unet", model, params, dtype=arguments.dtype)
    batch = arguments.batch or size.batch
    np.savez(folder / "inputs.npz", **unet_inputs(config, batch, size.side))
    return {
        "parameters": count_parameters(params), "batch": batch,
        "latents": f"{size.side}x{size.side}",
        "context": f"{CONTEXT_LENGTH}x{config.per_block('cross_attention_dim')[0]}",
    }  # fmt: skip


def _ours(arguments: Arguments, folder: pathlib.Path) -> Measured:
    from core_jax.models import load_model
    from core_jax.ops.execution import Execution

    model, params = load_model(folder / "unet", dtype=arguments.dtype)
    model = model.clone(execution=Execution(conv=arguments.conv))
    measured = Measured()
    inputs = dict(np.load(folder / "inputs.npz"))
    time_ours(measured, model, params, inputs, arguments.dtype, repeats=arguments.repeats)
    return measured


def _theirs(arguments: Arguments, folder: pathlib.Path) -> Measured:
    from benchmarks.torch_peer import load_class, load_torch

    torch = load_torch(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = load_class("diffusers", "UNet2DConditionModel").from_pretrained(
        folder / "unet", torch_dtype=dtype, local_files_only=True
    )
    measured = Measured(facts={"threads": torch.get_num_threads()})
    inputs = dict(np.load(folder / "inputs.npz"))
    time_peer(measured, model.eval(), inputs, dtype, "cpu", repeats=arguments.repeats)
    return measured


BENCHMARK = Benchmark(
    module="benchmarks.unet",
    peer="diffusers, PyTorch eager",
    add_arguments=_add_arguments,
    name=lambda a: f"unet-{a.size}-{a.conv}-{a.dtype}" + (f"-batch{a.batch}" if a.batch else ""),
    prepare=_prepare,
    ours=_ours,
    theirs=_theirs,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
