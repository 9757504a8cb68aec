"""The Qwen2.5 stand-ins: language models of the miniature world's text, pictures unseen.

What a language model of the hub can do before it sees a picture, these learn too: to write a
caption as each of the three authors would, to say one author's caption in another's words, and to
answer questions about a caption. Nothing in it knows of embeddings that stand for a picture.
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
from miniature.world import STYLES, Scene, describe, sample_scene

BATCH = 32
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
    """Texts of one step: half questions, three eighths paraphrases, an eighth captions.

    An answer's tokens count as much as ten others: they are few.
    """
    rng = np.random.default_rng((6, step))
    tokens = np.full((BATCH, LENGTH), tokenizer.pad_token_id, np.int32)
    weights = np.zeros((BATCH, LENGTH - 1), np.float32)
    for row in range(BATCH):
        scene = sample_scene(0, int(rng.integers(SCENES)), "train")
        if row % 2:
            pieces = _dialogue(scene, rng)
        elif row % 8:
            pieces = [(f"Image: {_caption(scene, rng)}\nIn other words: {_caption(scene, rng)}", 1)]
        else:
            pieces = [(_caption(scene, rng), 1)]
        ids, weight = _tokenize(tokenizer, pieces)
        n = min(len(ids), LENGTH)
        tokens[row, :n] = ids[:n]
        weights[row, : n - 1] = weight[1:n]
    return {"tokens": tokens, "weights": weights}


def _tokenize(tokenizer, pieces: list[tuple[str, float]]) -> tuple[list[int], list[float]]:
    """Ids of the joined text and the end token, and each one's weight: its first letter's."""
    text = "".join(piece for piece, _ in pieces)
    of_letter = [weight for piece, weight in pieces for _ in piece]
    encoded = tokenizer(text, return_offsets_mapping=True)
    weights = [of_letter[start] for start, _ in encoded["offset_mapping"]]
    return [*encoded["input_ids"], tokenizer.eos_token_id], [*weights, of_letter[-1]]


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    style = STYLES[int(rng.integers(len(STYLES)))]
    return describe(scene, int(rng.integers(1000)), style)


def _dialogue(scene: Scene, rng: np.random.Generator) -> list[tuple[str, float]]:
    """A caption, then questions and answers until the row is full: (text, weight) pieces."""
    pairs = question_texts(scene, int(rng.integers(1000)))
    pieces = [(f"Image: {_caption(scene, rng)}", 1.0)]
    for i in rng.permutation(len(pairs)):
        question, answer = pairs[i]
        pieces += [(f"\nQuestion: {question}\nAnswer:", 0.2), (f" {answer}", 10.0)]
    return pieces
