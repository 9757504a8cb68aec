"""Full size on a GPU, in bfloat16, with random weights that are made on the device.

    python -m benchmarks.gpu [--size=full|tiny] [--only=unet,stage1,generation]

- "unet": Stable Diffusion 2.1's U-Net, forward and forward + backward to the context, and the
  share of the device's peak that it reaches.
- "stage1": the training step of configs/vlv_stage1.py and its model FLOP utilisation (MFU).
- "generation": Qwen2.5-1.5B and 3B, greedily, against the memory bandwidth: a token cannot take
  less than reading all weights and the cache once.

The peer (diffusers and transformers, PyTorch eager) takes part where a torch with CUDA is
installed; its weights are random, too, but others. "tiny" runs anywhere and proves nothing but
that this script works.
"""

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks import generation, unet
from benchmarks.alternate import Arguments, Benchmark, main
from benchmarks.timing import Measured

PARTS = ("unet", "stage1", "generation")
STAGE1 = "stage-1 step"
UNET = "unet "
# Language models, new tokens a call, pictures of a training step and of a call of the U-Net.
SIZES = {
    "full": (("1.5b", "3b"), 256, 16, 8),
    "tiny": (("tiny",), 8, 1, 2),
}
# Bytes a second from the vendors' data sheets; a part of `device_kind`, longer names first.
HBM_BANDWIDTH: tuple[tuple[str, float], ...] = (
    ("gb200", 8.0e12),
    ("b200", 8.0e12),
    ("h200", 4.8e12),
    ("h100 pcie", 2.0e12),
    ("h100 nvl", 3.9e12),
    ("h100", 3.35e12),
    ("a100-sxm4-40gb", 1.555e12),
    ("a100-pcie-40gb", 1.555e12),
    ("a100", 2.0e12),
    ("a10g", 0.6e12),
    ("l40s", 0.864e12),
    ("l4", 0.3e12),
    ("v100", 0.9e12),
    ("t4", 0.3e12),
)


def bandwidth(kind: str) -> float | None:
    """Peak memory bandwidth of a device by its kind, or None if it is not in the table."""
    return next((rate for name, rate in HBM_BANDWIDTH if name in kind.lower()), None)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=tuple(SIZES), default="full")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--attention", choices=("xla", "cudnn"), default="xla")
    parser.add_argument("--remat", choices=("full", "dots", "none"), default="full")
    parser.add_argument("--batch", type=int, help="pictures a device in the stage-1 step")
    parser.add_argument("--rows", type=int, default=1, help="prompts that are continued at once")


def parts_of(arguments: Arguments) -> list[str]:
    """The parts that were asked for.

    Raises:
      SystemExit: one is unknown.
    """
    parts = [p for p in arguments.only.split(",") if p]
    if unknown := sorted(set(parts) - set(PARTS)):
        raise SystemExit(f"error: --only={','.join(unknown)} is unknown; known: {', '.join(PARTS)}")
    return parts


def _dtype(arguments: Arguments) -> str:
    return "bfloat16" if arguments.size == "full" else "float32"


def _greedy(name: str) -> str:
    return f"greedy {name}"


def _prepare(arguments: Arguments, folder: pathlib.Path) -> Mapping[str, Any]:
    """Architectures as the peer reads them."""
    parts_of(arguments)
    size = "full" if arguments.size == "full" else "tiny"
    configs = {name: generation.qwen2_config(name).to_hf() for name in SIZES[size][0]}
    configs["unet"] = unet.unet_config(size).to_hf()
    (folder / "configs.json").write_text(json.dumps(configs))
    return {}


def _unet_part(arguments: Arguments, measured: Measured) -> None:
    import jax

    from benchmarks.random_weights import random_params
    from core_jax.flops import count_flops
    from core_jax.models.unet import UNet2DConditionModel
    from core_jax.ops.execution import Execution
    from core_jax.train.hardware import peak_flops

    config, batch = unet.unet_config(arguments.size), SIZES[arguments.size][3]
    plain = UNet2DConditionModel(config=config)
    model = plain.clone(execution=Execution(attention=arguments.attention))
    params = random_params(model, on_device=True, dtype=_dtype(arguments))
    side = config.sample_size
    inputs = unet.unet_inputs(config, batch, side)
    unet.time_ours(
        measured, model, params, inputs, _dtype(arguments),
        repeats=arguments.repeats, prefix=UNET,
    )  # fmt: skip
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    traced = unet.functions(plain, inputs, _dtype(arguments))
    context = jax.ShapeDtypeStruct(inputs["context"].shape, _dtype(arguments))
    measured.facts["unet batch, latents"] = f"{batch}, {side}x{side}"
    for name, function in zip((unet.FORWARD, unet.BACKWARD), traced, strict=True):
        flops = count_flops(function, shapes, context)
        _add_utilization(measured, UNET + name, flops, peak_flops(), devices=1)


def _add_utilization(
    measured: Measured, label: str, flops: float, peak: float | None, *, devices: int
) -> None:
    seconds = statistics.median(measured.seconds[label])
    measured.facts[f"{label} TFLOP/s a device"] = flops / seconds / devices / 1e12
    # A device that is not in the table has no known peak, so no utilisation.
    measured.facts[f"{label} MFU"] = flops / seconds / devices / peak if peak else None


def _stage1_part(arguments: Arguments, measured: Measured) -> None:
    from benchmarks.stage1_step import build
    from core_jax.ops.execution import Execution
    from core_jax.train.hardware import peak_flops

    execution = Execution(attention=arguments.attention, remat=arguments.remat)
    step = build(arguments.size, arguments.batch or SIZES[arguments.size][2], execution)
    measured.time(STAGE1, step.call, repeats=arguments.repeats)
    measured.facts |= {f"{STAGE1} {k}": v for k, v in step.facts.items()}
    measured.facts[f"{STAGE1} TFLOP"] = step.flops / 1e12
    counted = step.compiler_flops
    measured.facts[f"{STAGE1} TFLOP, compiler's count"] = (
        None if counted is None else counted * step.devices / 1e12
    )
    rate = step.facts["batch"] / statistics.median(measured.seconds[STAGE1])
    measured.facts[f"{STAGE1} images/s"] = rate
    _add_utilization(measured, STAGE1, step.flops, peak_flops(), devices=step.devices)
    _add_roofline(measured, step)


def _add_roofline(measured: Measured, step: Any) -> None:
    """The step's time against the longer of arithmetic and reading the arguments once."""
    import jax

    from core_jax.train.hardware import peak_flops

    peak, rate = peak_flops(), bandwidth(jax.devices()[0].device_kind)
    if peak is None or rate is None:
        return
    held = 1e9 * sum(step.facts[f"GB of {part}"] for part in ("state", "frozen weights"))
    least = max(step.flops / peak, held / rate) / step.devices
    seconds = statistics.median(measured.seconds[STAGE1])
    measured.facts[f"{STAGE1} least seconds by roofline"] = least
    measured.facts[f"{STAGE1} share of the roofline"] = least / seconds


def _generation_part(arguments: Arguments, measured: Measured) -> None:
    import jax

    from benchmarks.random_weights import random_params
    from core_jax.models.qwen2 import Qwen2ForCausalLM

    sizes, new_tokens, *_ = SIZES[arguments.size]
    rate = bandwidth(jax.devices()[0].device_kind)
    for size in sizes:
        config = generation.qwen2_config(size)
        model, name = Qwen2ForCausalLM(config=config), _greedy(size)
        params = random_params(model, on_device=True, dtype=_dtype(arguments))
        ids = generation.prompt_ids(config, arguments.rows, 32)
        for label, count in ((f"{name}, half", new_tokens // 2), (name, new_tokens)):
            call = generation.make_call(model, params, ids, count)
            measured.time(label, call, repeats=arguments.repeats)
        # The difference of two lengths is decoding alone: no prefill, no start.
        whole, half = (
            statistics.median(measured.seconds[x]) for x in (name, f"{name}, half")
        )
        per_token = (whole - half) / (new_tokens - new_tokens // 2)
        if per_token <= 0:  # noise: a model this small says nothing
            continue
        read = bytes_read(config, params, arguments.rows, 32 + new_tokens)
        measured.facts |= {
            f"{name} tokens/s": arguments.rows / per_token,
            f"{name} GB read a step": read / 1e9,
            f"{name} share of the bandwidth": read / rate / per_token if rate else None,
        }
        del params, call


def bytes_read(config: Any, params: Mapping[str, Any], rows: int, slots: int) -> int:
    """Bytes that one decoding step cannot avoid reading: the weights and the whole cache.

    A tied token table is the output head, so all of it is read; an untied one is looked up.
    """
    import jax

    from core_jax.partition import flatten

    weights = sum(x.nbytes for x in jax.tree.leaves(params))
    table = flatten(params)["embed_tokens/embedding"]
    if not config.tie_word_embeddings:
        weights -= table.nbytes
    cached = 2 * config.num_hidden_layers * rows * slots * config.kv_heads * config.head_size
    return weights + cached * table.dtype.itemsize


def _ours(arguments: Arguments, folder: pathlib.Path) -> Measured:
    import jax

    measured = Measured()
    device = jax.devices()[0]
    measured.facts |= {"device": device.device_kind, "devices": jax.device_count()}
    steps = {"unet": _unet_part, "stage1": _stage1_part, "generation": _generation_part}
    for part in parts_of(arguments):
        steps[part](arguments, measured)
    measured.outputs = {}  # the peer's weights are others
    return measured


def _theirs(arguments: Arguments, folder: pathlib.Path) -> Measured:
    from benchmarks.torch_peer import load_class, load_torch

    torch = load_torch(arguments.threads, cuda=True)
    dtype = getattr(torch, _dtype(arguments))
    configs = json.loads((folder / "configs.json").read_text())
    measured = Measured(facts={"device": torch.cuda.get_device_name()})
    if "unet" in parts_of(arguments):
        cls = load_class("diffusers", "UNet2DConditionModel")
        model = cls.from_config(configs["unet"]).to("cuda", dtype).eval()
        config = unet.unet_config(arguments.size)
        inputs = unet.unet_inputs(config, SIZES[arguments.size][3], config.sample_size)
        unet.time_peer(
            measured, model, inputs, dtype, "cuda", repeats=arguments.repeats, prefix=UNET
        )
        del model
    if "generation" in parts_of(arguments):
        sizes, new_tokens, *_ = SIZES[arguments.size]
        config_class = load_class("transformers", "Qwen2Config")
        cls = load_class("transformers", "Qwen2ForCausalLM")
        for size in sizes:
            with torch.device("cuda"):
                model = cls(config_class.from_dict(configs[size])).to(dtype).eval()
            ids = generation.prompt_ids(generation.qwen2_config(size), arguments.rows, 32)
            call = generation.make_peer_call(model, ids, new_tokens, "cuda")
            measured.time(_greedy(size), call, repeats=arguments.repeats)
            del model, call
    measured.outputs = {}
    return measured


def _rates(arguments: Arguments) -> dict[str, tuple[str, float]]:
    sizes, new_tokens, *_ = SIZES[arguments.size]
    return {_greedy(s): ("tokens/s", float(arguments.rows * new_tokens)) for s in sizes}


def _name(arguments: Arguments) -> str:
    parts = parts_of(arguments)
    which = "" if len(parts) == len(PARTS) else "-" + "-".join(parts)
    return f"gpu-{arguments.size}-{arguments.attention}-remat-{arguments.remat}{which}"


BENCHMARK = Benchmark(
    module="benchmarks.gpu",
    peer="diffusers and transformers, PyTorch eager",
    add_arguments=_add_arguments,
    name=_name,
    prepare=_prepare,
    ours=_ours,
    theirs=_theirs,
    results="gpu",
    rounds=2,
    repeats=10,
    environment={},
    rates=_rates,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
