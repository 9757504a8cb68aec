"""Florence-2's image tower (DaViT) against transformers: the forward pass, normalised pixels in.

    python -m benchmarks.davit [--size=mini|base|large] [--depthwise=shifts|xla] [--conv=im2col]

The tower is frozen in both stages, so there is no backward pass to measure.
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

MEASURE = "tower"
# Size -> images a call, side in pixels.
SIZES = {"tiny": (1, 64), "mini": (8, 64), "base": (1, 768), "large": (1, 768)}


def florence2_config(size: str) -> Any:
    """The tower of a size. What is behind it is not measured, and as small as can be."""
    from core_jax.models.florence2 import BartConfig, Florence2Config

    if size == "mini":
        from miniature.standins import florence2_config as mini

        config = mini(128, 127)
    else:
        config = {
            "tiny": Florence2Config.tiny, "base": Florence2Config.base,
            "large": Florence2Config.large,
        }[size]()  # fmt: skip
    text = BartConfig(
        vocab_size=128, d_model=32, max_position_embeddings=128, encoder_layers=1,
        encoder_attention_heads=1, encoder_ffn_dim=32, decoder_layers=1,
        decoder_attention_heads=1, decoder_ffn_dim=32,
    )  # fmt: skip
    vision = dataclasses.replace(config.vision_config, projection_dim=32)
    return Florence2Config(vision_config=vision, text_config=text, image_token_id=127)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=tuple(SIZES), default="mini")
    parser.add_argument("--depthwise", choices=("shifts", "xla"), default="shifts")
    parser.add_argument("--conv", choices=("xla", "im2col"), default="im2col")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, help="images a call; the size's own by default")


def _batch(arguments: Arguments) -> int:
    return arguments.batch or SIZES[arguments.size][0]


def _prepare(arguments: Arguments, folder: pathlib.Path) -> Mapping[str, Any]:
    from benchmarks.random_weights import random_params
    from core_jax.models import save_model
    from core_jax.models.florence2 import Florence2
    from core_jax.partition import count_parameters

    model = Florence2(config=florence2_config(arguments.size))
    params = random_params(model)
    save_model(folder / "florence2", model, params, dtype=arguments.dtype)
    side = SIZES[arguments.size][1]
    shape = (_batch(arguments), side, side, 3)
    np.save(folder / "pixels.npy", np.random.default_rng(0).standard_normal(shape, np.float32))
    return {
        "parameters": count_parameters(params["vision_tower"]),
        "images": "x".join(map(str, shape[:3])),
    }


def _ours(arguments: Arguments, folder: pathlib.Path) -> Measured:
    import jax
    import jax.numpy as jnp

    from core_jax.models import load_model
    from core_jax.ops.execution import Execution

    model, params = load_model(folder / "florence2", dtype=arguments.dtype)
    model = model.clone(
        execution=Execution(conv=arguments.conv, depthwise_conv=arguments.depthwise)
    )
    pixels = jnp.asarray(np.load(folder / "pixels.npy"), arguments.dtype)
    tower = jax.jit(lambda p, x: model.apply({"params": p}, x, method="vision_features"))
    measured = Measured()
    grid = measured.time(
        MEASURE, lambda: jax.block_until_ready(tower(params, pixels)), repeats=arguments.repeats
    )
    measured.outputs[MEASURE] = np.asarray(grid, np.float32)
    return measured


def _theirs(arguments: Arguments, folder: pathlib.Path) -> Measured:
    from benchmarks.torch_peer import load_class, load_torch, tensor, to_numpy

    torch = load_torch(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = load_class("transformers", "Florence2ForConditionalGeneration").from_pretrained(
        folder / "florence2", dtype=dtype, local_files_only=True
    )
    tower = model.eval().model.vision_tower
    pixels = tensor(np.load(folder / "pixels.npy"), dtype)

    def call():
        with torch.inference_mode():
            return tower(pixels).last_hidden_state

    measured = Measured(facts={"threads": torch.get_num_threads()})
    measured.outputs[MEASURE] = to_numpy(measured.time(MEASURE, call, repeats=arguments.repeats))
    return measured


BENCHMARK = Benchmark(
    module="benchmarks.davit",
    peer="transformers, PyTorch eager",
    add_arguments=_add_arguments,
    name=lambda a: f"davit-{a.size}-{a.depthwise}-{a.conv}-{a.dtype}"
    + (f"-batch{a.batch}" if a.batch else ""),
    prepare=_prepare,
    ours=_ours,
    theirs=_theirs,
    rates=lambda a: {MEASURE: ("images/s", float(_batch(a)))},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
