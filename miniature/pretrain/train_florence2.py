"""The Florence-2 stand-in: it captions pictures in words that are not VLV's.

Its captions are the 'terse' author's, as the real Florence-2's are not those that VLV is trained
on; what VLV takes over is the tower and a BART that knows what there is to say.
"""

import json
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer

from core_jax.data.processors import ImageProcessor
from core_jax.models import florence2, save_model
from core_jax.ops.execution import Execution
from core_jax.ops.losses import token_cross_entropy
from miniature import standins
from miniature.pretrain.fit import fit, index_batches
from miniature.pretrain.scenes import captions, images, scenes

BATCH = 64
LENGTH = 80  # tokens of a caption, start and end included
PROMPT = "Describe with a paragraph what is shown in the image."
WORDINGS = 4


def train_florence2(
    out: pathlib.Path, workdir: pathlib.Path, *, steps: int, num_images: int
) -> None:
    """Trains tower, projection, encoder and decoder together on (picture, caption) pairs."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    processor = ImageProcessor.from_hf(standins.FLORENCE2_PREPROCESSOR)
    pixels = images("train", 0, num_images, cache=workdir / "data")
    config = standins.florence2_config(
        len(tokenizer), tokenizer.convert_tokens_to_ids("<image>")
    )
    model = florence2.Florence2(config=config, execution=Execution(depthwise_conv="shifts"))
    prompt = tokenizer(PROMPT)["input_ids"]
    labels = _labels(tokenizer, num_images)

    def loss(params, frozen, batch, key):
        del frozen, key
        mean, std = (jnp.asarray(v)[None, None, None] for v in (processor.mean, processor.std))
        x = (batch["image"].astype(jnp.float32) / 255.0 - mean) / std
        targets = batch["labels"]
        B = targets.shape[0]
        start = jnp.full((B, 1), config.text_config.decoder_start_token_id, jnp.int32)
        inputs = jnp.concatenate([start, targets[:, :-1]], axis=1)
        ids = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32)[None], (B, len(prompt)))
        logits = model.apply({"params": params}, x, ids, inputs)
        mask = (targets != config.text_config.pad_token_id).astype(jnp.float32)
        losses = token_cross_entropy(logits, targets) * mask
        right = (jnp.argmax(logits, -1) == targets) * mask
        return losses.sum() / mask.sum(), {"token_accuracy": right.sum() / mask.sum()}

    def batches(start: int) -> Iterator[dict]:
        for step, rows in index_batches(num_images, BATCH, seed=3, start_step=start):
            wording = np.random.default_rng((4, step)).integers(0, WORDINGS, len(rows))
            order = np.argsort(rows)  # reading a memory map in order is faster
            yield {
                "image": pixels[rows[order]],
                "labels": labels[wording, rows[order]].astype(np.int32),
            }

    params = fit(
        "florence2", params=florence2.FAMILY.init_params(model, jax.random.key(2)), loss=loss,
        make_batches=batches, steps=steps, learning_rate=1e-3, workdir=workdir, ema_decay=0.998,
    )  # fmt: skip
    save_model(out, model, params, dtype="bfloat16")
    content = json.dumps(standins.FLORENCE2_PREPROCESSOR, indent=2)
    (out / "preprocessor_config.json").write_text(content + "\n")


def _labels(tokenizer, num_images: int) -> np.ndarray:
    """<s> caption </s> and padding, uint16 [WORDINGS, num_images, LENGTH]."""
    all_scenes = scenes("train", 0, num_images)
    out = np.full((WORDINGS, num_images, LENGTH), tokenizer.pad_token_id, np.uint16)
    for wording in range(WORDINGS):
        texts = captions(all_scenes, style="terse", seed=wording)
        for row, ids in zip(out[wording], tokenizer(texts)["input_ids"], strict=True):
            row[: min(len(ids), LENGTH)] = ids[:LENGTH]
    return out
