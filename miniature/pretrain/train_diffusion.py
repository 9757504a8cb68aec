"""Text encoder and UNet of the text-to-image stand-in, and the whole pipeline around them."""

import json
import pathlib
import shutil
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer

from core_jax.models import clip_text, load_model, save_model, unet
from core_jax.models.autoencoder_kl import AutoencoderKL
from core_jax.ops.execution import Execution
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
from miniature.pretrain.text_to_image import make_diffusion_loss
from miniature.pretrain.train_vae import encode_all
from miniature.world import Scene

BATCH = 32
WORDINGS = 4  # of every scene, so that wording is not a property of the picture
_MODEL_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDPMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def train_diffusion(
    pipeline: pathlib.Path,
    workdir: pathlib.Path,
    *,
    text_steps: int,
    steps: int,
    num_images: int,
) -> None:
    """Trains on captioned scenes and writes a diffusers pipeline directory.

    First the text encoder learns to tell what a caption says of every cell, then the UNet learns
    to denoise given what it says.
    """
    tokenizer = AutoTokenizer.from_pretrained(pipeline / "tokenizer")
    length = standins.text_encoder_config(1, 0, 0, 0).max_position_embeddings
    mean, logvar, scaling_factor = _moments(pipeline, workdir, num_images)
    all_scenes = scenes("train", 0, num_images)
    arrays = {
        "token_ids": _caption_ids(tokenizer, all_scenes, length),
        "latent_mean": mean,
        "latent_logvar": logvar,
        "cells": cell_labels(all_scenes),
        "backgrounds": background_labels(all_scenes),
    }
    empty = tuple(_tokenize(tokenizer, [""], length)[0].tolist())
    text_encoder = clip_text.CLIPTextModel(
        config=standins.text_encoder_config(
            len(tokenizer), tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id
        )
    )
    denoiser = unet.UNet2DConditionModel(config=standins.unet_config(), execution=Execution())
    key_unet, key_text = jax.random.split(jax.random.key(1))
    schedule = standins.noise_schedule()
    probe = TextProbe()
    text = fit(
        "text-encoder",
        params={
            "model": clip_text.FAMILY.init_params(text_encoder, key_text),
            "probe": init_probe(probe, (1, standins.CONTEXT_DIM), jax.random.key(4)),
        },
        loss=_text_loss(text_encoder, probe),
        make_batches=_batches(arrays, ("token_ids", "cells", "backgrounds"), seed=6),
        steps=text_steps, learning_rate=1.5e-3, workdir=workdir, ema_decay=0.99,
    )  # fmt: skip
    params = fit(
        "diffusion",
        params=unet.FAMILY.init_params(denoiser, key_unet),
        frozen=text["model"],
        loss=make_diffusion_loss(
            denoiser, text_encoder, schedule, scaling_factor=scaling_factor, empty_ids=empty
        ),
        make_batches=_batches(arrays, ("token_ids", "latent_mean", "latent_logvar"), seed=1),
        steps=steps, learning_rate=1e-3, workdir=workdir, ema_decay=0.998,
    )  # fmt: skip
    save_model(pipeline / "unet", denoiser, params, dtype="bfloat16")
    save_model(pipeline / "text_encoder", text_encoder, text["model"], dtype="bfloat16")
    (pipeline / "scheduler").mkdir(exist_ok=True)
    _write_json(pipeline / "scheduler" / "scheduler_config.json", schedule.to_hf())
    _write_json(pipeline / "model_index.json", _MODEL_INDEX)


def _text_loss(text_encoder: clip_text.CLIPTextModel, probe: TextProbe) -> Callable:
    def loss(params, frozen, batch, key):
        del frozen, key
        states = text_encoder.apply(
            {"params": params["model"]}, batch["token_ids"].astype(jnp.int32)
        )
        logits = probe.apply({"params": params["probe"]}, states)
        return probe_loss(logits, batch["cells"], batch["backgrounds"])  # pyright: ignore[reportArgumentType]

    return loss


def _batches(
    arrays: dict[str, np.ndarray], names: tuple[str, ...], *, seed: int
) -> Callable[[int], Iterator[dict]]:
    size = len(arrays["latent_mean"])

    def batches(start: int) -> Iterator[dict]:
        for step, rows in index_batches(size, BATCH, seed=seed, start_step=start):
            wording = np.random.default_rng((seed, step)).integers(0, WORDINGS, len(rows))
            ids = arrays["token_ids"][wording, rows]
            yield {n: ids if n == "token_ids" else arrays[n][rows] for n in names}

    return batches


def _write_json(path: pathlib.Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _moments(pipeline: pathlib.Path, workdir: pathlib.Path, num_images: int):
    """The VAE's posteriors of all training pictures, computed once."""
    file = workdir / "data" / f"moments-{num_images}.npz"
    model, params = load_model(pipeline / "vae", dtype="float32")
    if not file.exists():
        pixels = images("train", 0, num_images, cache=workdir / "data")
        model = AutoencoderKL(config=model.config, execution=Execution())
        mean, logvar = encode_all(model, params, pixels)
        partial = file.with_suffix(".partial.npz")
        np.savez(partial, mean=mean, logvar=logvar)
        shutil.move(partial, file)
    stored = np.load(file)
    return stored["mean"], stored["logvar"], model.config.scaling_factor


def _caption_ids(tokenizer, all_scenes: list[Scene], length: int) -> np.ndarray:
    """Token ids int16 [WORDINGS, num_images, length]."""
    return np.stack([
        _tokenize(tokenizer, captions(all_scenes, style="default", seed=wording), length)
        for wording in range(WORDINGS)
    ])  # fmt: skip


def _tokenize(tokenizer, texts: list[str], length: int) -> np.ndarray:
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length)
    return np.asarray(encoded["input_ids"], np.int16)
