"""The small language models that drafters are made of: they chat, pictures unseen.

As the released small models have read what the large ones have, these have read the world's text:
descriptions by all authors, and questions about a description that stands in the question.
"""

import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer

from core_jax.data.llava import Turn
from core_jax.data.llava_tokens import chat_tokens, text_answer
from core_jax.models import gemma3_text, load_model, qwen2, save_model
from core_jax.models.family import Family
from core_jax.ops.execution import Execution
from core_jax.ops.losses import token_cross_entropy
from miniature import standins
from miniature.pretrain.fit import fit
from miniature.pretrain.made_ahead import made_ahead
from miniature.world import STYLES, describe, sample_scene
from miniature.world.dialogues import Turns, description, interview

BATCH = 32
LENGTH = 136
SCENES = 20_000


def train_qwen2_5_text(out: pathlib.Path, workdir: pathlib.Path, *, steps: int) -> None:
    """`qwen2.5-small`, in the directory beside `out`, learns to chat."""
    model, params = load_model(out.parent / "qwen2.5-small", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(out)
    ends = [tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id]
    _train(qwen2.FAMILY, model, params, tokenizer, out, workdir, steps, ends)


def train_gemma_3_text(out: pathlib.Path, workdir: pathlib.Path, *, steps: int) -> None:
    """From the start."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = gemma3_text.Gemma3ForCausalLM(config=standins.gemma_3_text_config(tokenizer))
    params = gemma3_text.FAMILY.init_params(model, jax.random.key(11))
    ends = list(standins.gemma_ends(tokenizer))
    _train(gemma3_text.FAMILY, model, params, tokenizer, out, workdir, steps, ends)


def _train(
    family: Family,
    model: Any,
    params: Any,
    tokenizer: Any,
    out: pathlib.Path,
    workdir: pathlib.Path,
    steps: int,
    ends: list[int],
) -> None:
    model = model.clone(execution=Execution(unroll=8))

    def loss(params, frozen, batch, key):
        del frozen, key
        tokens, weights = batch["tokens"], batch["weights"][:, 1:]
        losses = token_cross_entropy(model.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:])
        return jnp.sum(losses * weights) / jnp.sum(weights), {}

    def batches(start: int) -> Iterator[dict]:
        return made_ahead(functools.partial(_batch, tokenizer), start)

    learned = fit(
        out.name, params=params, loss=loss, make_batches=batches, steps=steps, learning_rate=6e-3,
        workdir=workdir, optimizer_name="muon",
    )  # fmt: skip
    save_model(out, model, learned, dtype="bfloat16")
    content = json.dumps({"eos_token_id": ends}, indent=2)
    (out / "generation_config.json").write_text(content + "\n")


def _batch(tokenizer: Any, step: int) -> dict[str, np.ndarray]:
    """Rows of tokens; half describe, half answer questions about a description."""
    rng = np.random.default_rng((10, step))
    tokens = np.full((BATCH, LENGTH), tokenizer.pad_token_id, np.int32)
    weights = np.zeros(tokens.shape, np.float32)

    def render(messages, **options):
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)

    for row in range(BATCH):
        turns = _turns(rng, describes=row % 2 == 0)
        questions = [Turn((question,), answer) for question, answer in turns]
        answers = [text_answer(tokenizer, answer) for _, answer in turns]
        made = chat_tokens(render, tokenizer, questions, answers)
        n = min(len(made.ids), LENGTH)
        tokens[row, :n], weights[row, :n] = made.ids[:n], made.supervised[:n]
    return {"tokens": tokens, "weights": weights}


def _turns(rng: np.random.Generator, *, describes: bool) -> Turns:
    scene = sample_scene(0, int(rng.integers(SCENES)), "train")
    seed, style = int(rng.integers(1000)), STYLES[int(rng.integers(len(STYLES)))]
    if describes:
        return description(scene, seed, style)
    caption = describe(scene, seed, style)
    (question, answer), *rest = interview(scene, seed)
    return [(f"{caption} {question}", answer), *rest]
