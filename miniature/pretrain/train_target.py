"""The vision-language stand-ins: Qwen2.5-VL and Gemma 3, with what they need to be loaded.

They answer in the 'default' author's words. First the tower learns what is in every cell, then all
learns to describe pictures and to answer questions about them. Qwen's language model starts from
`qwen2.5-medium`, as Qwen2.5-VL started from Qwen2.5; Gemma's learns here.
"""

import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core_jax.models import load_model, save_model
from core_jax.ops.losses import token_cross_entropy
from miniature.pretrain.fit import fit, index_batches
from miniature.pretrain.labels import background_labels, cell_labels
from miniature.pretrain.readers import Gemma3Reader, Qwen2_5_VLReader, Reader
from miniature.pretrain.scenes import images, scenes
from miniature.pretrain.towers import read_grid, train_tower
from miniature.world import Scene
from miniature.world.dialogues import description, interview

BATCH = 16
LENGTH = 136  # tokens of a conversation, the picture's included
PROBE_WEIGHT = 0.3  # keeps the tower's eye for detail while the rest is still finding its words
INTERVIEW_WEIGHT = 3.0  # of an answer's token: interviews have few


def train_qwen2_5_vl(
    out: pathlib.Path, workdir: pathlib.Path, *, tower_steps: int, steps: int, num_images: int
) -> None:
    """Qwen2.5-VL, its language model from the directory `qwen2.5-medium` beside `out`."""
    reader = Qwen2_5_VLReader.make(out)
    params = reader.family.init_params(reader.model, jax.random.key(7))
    _, language = load_model(out.parent / "qwen2.5-medium", dtype="float32")
    params |= {"language_model": _with_rows(language, params["language_model"])}
    _train(
        reader, params, ("visual",), out, workdir, tower_steps=tower_steps, steps=steps,
        num_images=num_images, learning_rate=3e-3,
    )  # fmt: skip
    ends = [
        reader.processor.config.text_config.eos_token_id,
        reader.processor.tokenizer.pad_token_id,
    ]
    _write_json(out / "generation_config.json", {"eos_token_id": ends})


def train_gemma_3(
    out: pathlib.Path, workdir: pathlib.Path, *, tower_steps: int, steps: int, num_images: int
) -> None:
    """Gemma 3."""
    reader = Gemma3Reader.make(out)
    params = reader.family.init_params(reader.model, jax.random.key(8))
    _train(
        reader, params, ("vision_tower",), out, workdir, tower_steps=tower_steps, steps=steps,
        num_images=num_images, learning_rate=6e-3,
    )  # fmt: skip
    ends = list(reader.model.config.eos_token_id)
    _write_json(out / "generation_config.json", {"eos_token_id": ends})


def _with_rows(params: Any, like: Any) -> Any:
    """A language model with the larger table of `like`."""
    table = params["embed_tokens"]["embedding"]
    rows = like["embed_tokens"]["embedding"].at[: len(table)].set(table)
    return {**params, "embed_tokens": {"embedding": rows}}


def _train(
    reader: Reader,
    params: Any,
    tower: tuple[str, ...],
    out: pathlib.Path,
    workdir: pathlib.Path,
    *,
    tower_steps: int,
    steps: int,
    num_images: int,
    learning_rate: float,
) -> None:
    pixels = images("train", 0, num_images, cache=workdir / "data")
    all_scenes = scenes("train", 0, num_images)
    labels = {"cells": cell_labels(all_scenes), "backgrounds": background_labels(all_scenes)}
    seen = train_tower(
        f"{out.name}-tower", {name: params[name] for name in tower}, reader.features,
        width=reader.model.config.vision_config.hidden_size, pixels=pixels, labels=labels,
        steps=tower_steps, workdir=workdir,
    )  # fmt: skip
    learned = fit(
        out.name, params={"model": params | seen["model"], "probe": seen["probe"]},
        loss=_loss(reader), make_batches=_batches(reader, pixels, all_scenes, labels), steps=steps,
        learning_rate=learning_rate, workdir=workdir, ema_decay=0.995, optimizer_name="muon",
    )  # fmt: skip
    save_model(out, reader.model, learned["model"], dtype="bfloat16")
    _write_json(out / "preprocessor_config.json", dict(reader.preprocessor))


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _loss(reader: Reader) -> Callable:
    def loss(params, frozen, batch, key):
        del frozen, key
        features = reader.features(params["model"], batch["image"])
        probe_value, metrics = read_grid(params["probe"], features, batch)
        logits = reader.logits(params["model"], features, batch)[:, :-1]
        targets, weights = batch["tokens"][:, 1:], batch["weights"][:, 1:]
        losses = token_cross_entropy(logits, targets)
        value = jnp.sum(losses * weights) / jnp.sum(weights)
        right = (jnp.argmax(logits, axis=-1) == targets).astype(jnp.float32)
        for name, weight in (("description", 1.0), ("interview", INTERVIEW_WEIGHT)):
            of = (weights == weight).astype(jnp.float32)
            metrics[f"{name}_tokens_right"] = jnp.sum(right * of) / jnp.maximum(jnp.sum(of), 1.0)
        metrics |= {"answers": value}
        return value + PROBE_WEIGHT * probe_value, metrics

    return loss


def _batches(
    reader: Reader, pixels: np.ndarray, all_scenes: list[Scene], labels: dict[str, np.ndarray]
) -> Callable[[int], Iterator[dict]]:
    def batches(start: int) -> Iterator[dict]:
        for step, rows in index_batches(len(pixels), BATCH, seed=9, start_step=start):
            order = np.sort(rows)  # reading a memory map in order is faster
            rng = np.random.default_rng((9, step))
            talk = _conversations(reader, [all_scenes[i] for i in order], rng)
            yield {
                "image": pixels[order],
                "cells": labels["cells"][order],
                "backgrounds": labels["backgrounds"][order],
                **talk,
            }

    return batches


def _conversations(reader: Reader, about: list[Scene], rng: np.random.Generator) -> dict:
    """Rows of tokens; two thirds describe, the rest answers questions."""
    ids = np.full((len(about), LENGTH), reader.processor.tokenizer.pad_token_id, np.int32)
    weights = np.zeros(ids.shape, np.float32)
    valid = np.zeros(ids.shape, bool)
    for row, scene in enumerate(about):
        seed = int(rng.integers(1000))
        describes = row % 3 < 2
        made = reader.tokens(description(scene, seed) if describes else interview(scene, seed))
        n = min(len(made.ids), LENGTH)
        ids[row, :n], valid[row, :n] = made.ids[:n], True
        weights[row, :n] = made.supervised[:n] * (1.0 if describes else INTERVIEW_WEIGHT)
    return {"tokens": ids, "weights": weights, **reader.places(ids, valid)}
