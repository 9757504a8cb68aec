"""The Qwen2.5 stand-ins: language models of the miniature world's text, pictures unseen.

Half of the text is captions by all three authors; the other half is a caption, a question about
it and the answer, so that the largest can read answers out of a true caption.
"""

import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer

from core_jax.models import qwen2, save_model
from core_jax.ops.losses import token_cross_entropy
from miniature import standins
from miniature.pretrain.fit import fit
from miniature.pretrain.scenes import question_texts
from miniature.world import STYLES, describe, sample_scene

BATCH = 48
LENGTH = 112
SCENES = 20_000
# The prompt of vlv_jax.evaluation.vqa.PromptFormat without an instruction.
QUESTION_FORMAT = "Image: {caption}\nQuestion: {question}\nAnswer: {answer}"


def train_language_model(out: pathlib.Path, workdir: pathlib.Path, *, steps: int) -> None:
    """Trains one size; its name is the directory's."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    config = standins.language_model_config(
        out.name, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    model = qwen2.Qwen2ForCausalLM(config=config)

    def loss(params, frozen, batch, key):
        del frozen, key
        tokens = batch["tokens"]
        logits = model.apply({"params": params}, tokens[:, :-1])
        losses = token_cross_entropy(logits, tokens[:, 1:])
        weights = batch["weights"]
        return jnp.sum(losses * weights) / jnp.sum(weights), {}

    def batches(start: int) -> Iterator[dict]:
        step = start
        while True:
            yield _batch(tokenizer, step)
            step += 1

    params = fit(
        out.name, params=qwen2.FAMILY.init_params(model, jax.random.key(5)), loss=loss,
        make_batches=batches, steps=steps, learning_rate=2e-3, workdir=workdir,
    )  # fmt: skip
    save_model(out, model, params, dtype="bfloat16")


def _batch(tokenizer, step: int) -> dict[str, np.ndarray]:
    """Texts of one step. An answer's tokens count as much as ten others: they are few."""
    rng = np.random.default_rng((6, step))
    tokens = np.full((BATCH, LENGTH), tokenizer.pad_token_id, np.int32)
    weights = np.zeros((BATCH, LENGTH - 1), np.float32)
    for row in range(BATCH):
        scene = sample_scene(0, int(rng.integers(SCENES)), "train")
        style = STYLES[int(rng.integers(len(STYLES)))]
        caption = describe(scene, int(rng.integers(1000)), style)
        if row % 2:
            pairs = question_texts(scene, int(rng.integers(1000)))
            question, answer = pairs[int(rng.integers(len(pairs)))]
            prompt = QUESTION_FORMAT.format(caption=caption, question=question, answer="").rstrip()
            head = tokenizer(prompt)["input_ids"]
            ids = [*tokenizer(f"{prompt} {answer}")["input_ids"], tokenizer.eos_token_id][:LENGTH]
        else:
            ids = [*tokenizer(caption)["input_ids"], tokenizer.eos_token_id][:LENGTH]
            head = ids
        tokens[row, : len(ids)] = ids
        weights[row, : len(ids) - 1] = 1.0
        weights[row, len(head) - 1 : len(ids) - 1] = 10.0
    return {"tokens": tokens, "weights": weights}
