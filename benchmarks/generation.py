"""Greedy generation with Qwen2 against transformers: prompts of 32 tokens, 64 new ones.

    python -m benchmarks.generation [--size=mini|small|0.5b] [--dtype=float32] [--batch=1]

"mini" is the miniature's largest language model. A call is the whole of it: prefill, 64 tokens,
and the tokens back on the host. Nothing ends early.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.alternate import Arguments, Benchmark, main
from benchmarks.timing import Measured

MEASURE = "greedy"
SIZES = ("tiny", "mini", "small", "0.5b")


def qwen2_config(size: str) -> Any:
    """The architecture of a size; without an end token, so that every row gets all its tokens."""
    import dataclasses

    from core_jax.models.qwen2 import Qwen2Config

    if size == "mini":
        from miniature.standins import language_model_config

        config = language_model_config("qwen2.5-large", vocab_size=712, eos_id=704, pad_id=704)
    elif size == "small":
        config = Qwen2Config(
            vocab_size=8192, hidden_size=512, intermediate_size=2048, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=2, rope_theta=1e6,
            tie_word_embeddings=True, max_position_embeddings=1024,
        )  # fmt: skip
    elif size == "tiny":
        config = Qwen2Config(
            vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        )  # fmt: skip
    else:
        presets = {
            "0.5b": Qwen2Config.qwen2p5_0p5b, "1.5b": Qwen2Config.qwen2p5_1p5b,
            "3b": Qwen2Config.qwen2p5_3b,
        }  # fmt: skip
        config = presets[size]()
    return dataclasses.replace(config, bos_token_id=None, eos_token_id=None, pad_token_id=None)


def prompt_ids(config: Any, batch: int, length: int) -> np.ndarray:
    """Random tokens, int32 [batch, length]."""
    return np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), np.int32)


def make_call(model: Any, params: Any, ids: np.ndarray, new_tokens: int) -> Any:
    """A call that returns the new tokens, int32 [B, new_tokens], on the host."""
    import jax
    import jax.numpy as jnp

    from core_jax.decode import generate
    from core_jax.decode.adapters import CausalDecoder, TokenPrefix

    decoder, prefix = CausalDecoder(model), TokenPrefix(jnp.asarray(ids))

    def call():
        return jax.device_get(
            generate(decoder, params, prefix, max_new_tokens=new_tokens).tokens
        )

    return call


def make_peer_call(model: Any, ids: np.ndarray, new_tokens: int, device: str) -> Any:
    """The same from a transformers model."""
    import torch

    from benchmarks.torch_peer import tensor

    prompt = tensor(ids, device=device)
    mask = torch.ones_like(prompt)

    def call():
        with torch.inference_mode():
            out = model.generate(
                input_ids=prompt, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens
            )
        return out[:, ids.shape[1] :].cpu().numpy()

    return call


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=SIZES, default="mini")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=1, help="prompts a call")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens to generate")


def _prepare(arguments: Arguments, folder: pathlib.Path) -> Mapping[str, Any]:
    from benchmarks.random_weights import random_params
    from core_jax.models import save_model
    from core_jax.models.qwen2 import Qwen2ForCausalLM
    from core_jax.partition import count_parameters

    config = qwen2_config(arguments.size)
    model = Qwen2ForCausalLM(config=config)
    params = random_params(model)
    save_model(folder / "qwen2", model, params, dtype=arguments.dtype)
    np.save(folder / "prompt.npy", prompt_ids(config, arguments.batch, arguments.prompt))
    return {"parameters": count_parameters(params)}


def _ours(arguments: Arguments, folder: pathlib.Path) -> Measured:
    from core_jax.models import load_model

    model, params = load_model(folder / "qwen2", dtype=arguments.dtype)
    call = make_call(model, params, np.load(folder / "prompt.npy"), arguments.new)
    measured = Measured()
    tokens = measured.time(MEASURE, call, repeats=arguments.repeats)
    measured.outputs[MEASURE] = tokens
    measured.facts["distinct_tokens"] = len(np.unique(tokens))
    return measured


def _theirs(arguments: Arguments, folder: pathlib.Path) -> Measured:
    from benchmarks.torch_peer import load_class, load_torch

    torch = load_torch(arguments.threads)
    model = load_class("transformers", "Qwen2ForCausalLM").from_pretrained(
        folder / "qwen2", dtype=getattr(torch, arguments.dtype), local_files_only=True
    )
    call = make_peer_call(model.eval(), np.load(folder / "prompt.npy"), arguments.new, "cpu")
    measured = Measured(facts={"threads": torch.get_num_threads()})
    measured.outputs[MEASURE] = measured.time(MEASURE, call, repeats=arguments.repeats)
    return measured


BENCHMARK = Benchmark(
    module="benchmarks.generation",
    peer="transformers, PyTorch eager",
    add_arguments=_add_arguments,
    name=lambda a: f"generation-{a.size}-{a.dtype}-batch{a.batch}",
    prepare=_prepare,
    ours=_ours,
    theirs=_theirs,
    rates=lambda a: {MEASURE: ("tokens/s", float(a.batch * a.new))},
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
