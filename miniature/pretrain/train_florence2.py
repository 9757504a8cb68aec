"""The Florence-2 stand-in: it captions pictures in words that are not VLV's.

Its captions are the 'terse' author's, as the real Florence-2's are not those that VLV is trained
on; what VLV takes over is the tower and a BART that knows what there is to say.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterator

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
from miniature.pretrain.labels import (
    TextProbe,
    background_labels,
    cell_labels,
    init_probe,
    probe_loss,
)
from miniature.pretrain.scenes import captions, images, scenes
from miniature.pretrain.towers import read_grid, train_tower
from miniature.world import Scene

BATCH = 32
LENGTH = 56  # tokens of a caption, start and end included
PROMPT = "Describe with a paragraph what is shown in the image."
WORDINGS = 4
PROBE_WEIGHT = 0.3  # keeps the tower's eye for detail while BART is still finding its words
NUM_QUERIES = 77  # random vectors that the decoder hears in place of words
QUERY_WEIGHT = 0.5


def train_florence2(
    out: pathlib.Path, workdir: pathlib.Path, *, tower_steps: int, steps: int, num_images: int
) -> None:
    """First the tower on what is in every cell, then everything on (picture, caption) pairs."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    pixels = images("train", 0, num_images, cache=workdir / "data")
    config = standins.florence2_config(len(tokenizer), tokenizer.convert_tokens_to_ids("<image>"))
    execution = Execution(depthwise_conv="shifts", unroll=8)
    model = florence2.Florence2(config=config, execution=execution)
    all_scenes = scenes("train", 0, num_images)
    arrays = {
        "cells": cell_labels(all_scenes),
        "backgrounds": background_labels(all_scenes),
        "labels": _labels(tokenizer, all_scenes),
    }
    params = florence2.FAMILY.init_params(model, jax.random.key(2))
    tower = train_tower(
        "florence2-tower",
        {"vision_tower": params["vision_tower"]},
        lambda tower, x: model.apply({"params": tower}, _normalized(x), method="vision_features"),
        width=config.vision_config.embed_dim[-1], pixels=pixels, labels=arrays, steps=tower_steps,
        workdir=workdir,
    )  # fmt: skip
    query_probe = TextProbe()
    query_probe_params = init_probe(query_probe, (1, config.text_config.d_model), jax.random.key(5))
    learned = fit(
        "florence2",
        params={
            "model": params | tower["model"], "probe": tower["probe"],
            "query_probe": query_probe_params,
        },
        loss=_caption_loss(model, query_probe, tokenizer(PROMPT)["input_ids"]),
        make_batches=_batches(pixels, arrays, seed=3),
        steps=steps, learning_rate=5e-3, workdir=workdir, ema_decay=0.995, optimizer_name="muon",
    )  # fmt: skip
    save_model(out, model, learned["model"], dtype="bfloat16")
    content = json.dumps(standins.FLORENCE2_PREPROCESSOR, indent=2)
    (out / "preprocessor_config.json").write_text(content + "\n")


def _normalized(images: jax.Array) -> jax.Array:
    processor = ImageProcessor.from_hf(standins.FLORENCE2_PREPROCESSOR)
    mean, std = (jnp.asarray(v)[None, None, None] for v in (processor.mean, processor.std))
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def _caption_loss(
    model: florence2.Florence2, query_probe: TextProbe, prompt: list[int]
) -> Callable:
    """Captions; and whatever 77 vectors the decoder hears instead of words, it tells the scene.

    The second part rehearses what the real decoder, a hundred times larger, learns from VLV's 40
    million images: to answer queries that are not words. The queries are drawn anew in each step.
    """
    config = model.config.text_config

    def loss(params, frozen, batch, key):
        del frozen
        apply = functools.partial(model.apply, {"params": params["model"]})
        features = apply(_normalized(batch["image"]), method="vision_features")
        probe_value, metrics = read_grid(params["probe"], features, batch)
        targets = batch["labels"].astype(jnp.int32)
        B = targets.shape[0]
        ids = jnp.broadcast_to(jnp.asarray(prompt, jnp.int32)[None], (B, len(prompt)))
        start = jnp.full((B, 1), config.decoder_start_token_id, jnp.int32)
        inputs = jnp.concatenate([start, targets[:, :-1]], axis=1)
        image = apply(features, method="project_features")
        words = apply(ids, method="embed_tokens")
        states = apply(jnp.concatenate([image, words], axis=1), method="encode")
        hidden = apply(apply(inputs, method="embed_tokens"), states, method="decode")
        logits = apply(hidden, method="logits")
        mask = (targets != config.pad_token_id).astype(jnp.float32)
        losses = token_cross_entropy(logits, targets) * mask
        caption = losses.sum() / mask.sum()
        queries = jax.random.normal(key, (1, NUM_QUERIES, config.d_model))
        answers = apply(jnp.broadcast_to(queries, (B, *queries.shape[1:])), states, method="decode")
        logits = query_probe.apply({"params": params["query_probe"]}, answers)
        query_value, told = probe_loss(logits, batch["cells"], batch["backgrounds"])  # pyright: ignore[reportArgumentType]
        metrics |= {"caption": caption, "objects_told": told["objects_right"]}
        return caption + PROBE_WEIGHT * probe_value + QUERY_WEIGHT * query_value, metrics

    return loss


def _batches(
    pixels: np.ndarray, arrays: dict[str, np.ndarray], *, seed: int
) -> Callable[[int], Iterator[dict]]:
    def batches(start: int) -> Iterator[dict]:
        for step, rows in index_batches(len(pixels), BATCH, seed=seed, start_step=start):
            wording = np.random.default_rng((4, step)).integers(0, WORDINGS, len(rows))
            order = np.sort(rows)  # reading a memory map in order is faster
            yield {
                "image": pixels[order],
                "labels": arrays["labels"][wording, order],
                "cells": arrays["cells"][order],
                "backgrounds": arrays["backgrounds"][order],
            }

    return batches


def _labels(tokenizer, all_scenes: list[Scene]) -> np.ndarray:
    """<s> caption </s> and padding, int16 [WORDINGS, num_images, LENGTH]."""
    out = np.full((WORDINGS, len(all_scenes), LENGTH), tokenizer.pad_token_id, np.int16)
    for wording in range(WORDINGS):
        texts = captions(all_scenes, style="terse", seed=wording)
        for row, ids in zip(out[wording], tokenizer(texts)["input_ids"], strict=True):
            row[: min(len(ids), LENGTH)] = ids[:LENGTH]
    return out
