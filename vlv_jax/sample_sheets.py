"""Pictures of progress: original | redrawn | caption, for the same images and seeds each time."""

import io
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from core_jax.data.pipeline import evaluation_batches
from core_jax.data.sources import open_source
from core_jax.files import write_whole
from core_jax.gathering import fetch
from core_jax.partition import merge
from core_jax.sharding import mesh_of
from vlv_jax.batches import make_transform, policy_of, views_of
from vlv_jax.captioning import decode_texts, generate_captions
from vlv_jax.encoding import caption_embeddings, context_of, image_features
from vlv_jax.experiment import Experiment
from vlv_jax.loading import Pieces
from vlv_jax.networks import Networks
from vlv_jax.redrawing import redraw
from vlv_jax.stage2 import prefix_embeddings

_CELL, _TEXT, _GAP = 128, 420, 6  # pixels


def draw_sheet(
    originals: np.ndarray, redrawn: np.ndarray, captions: Sequence[str] | None
) -> Image.Image:
    """One row an image."""
    rows = len(originals)
    width = 2 * _CELL + 3 * _GAP + (_TEXT if captions else 0)
    sheet = Image.new("RGB", (width, rows * (_CELL + _GAP) + _GAP), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(rows):
        top = _GAP + i * (_CELL + _GAP)
        for column, pixels in enumerate((originals[i], redrawn[i])):
            picture = Image.fromarray(pixels).resize((_CELL, _CELL), Image.Resampling.LANCZOS)
            sheet.paste(picture, (_GAP + column * (_CELL + _GAP), top))
        if captions:
            text = "\n".join(textwrap.wrap(captions[i], 66)[:9])
            draw.text((2 * _CELL + 3 * _GAP, top), text, fill="black")
    return sheet


def _sheet_file(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return workdir / "samples" / f"step-{step}.png"


def has_sheet(workdir: pathlib.Path, step: int) -> bool:
    """Whether the sheet of a step is there."""
    return _sheet_file(workdir, step).is_file()


def make_sample_hook(
    experiment: Experiment,
    networks: Networks,
    frozen: Mapping[str, Any],
    pieces: Pieces,
    workdir: pathlib.Path,
) -> Callable:
    """A hook that writes `samples/step-N.png`; the images are the first ones of the held-out
    source (of the training source where there is none).
    """  # noqa: D205
    sampling = experiment.sampling
    held_out = experiment.evaluation
    source = held_out.source if held_out and held_out.has_source else experiment.data.source
    with evaluation_batches(
        open_source(source),
        batch_size=sampling.num_samples,
        transform=make_transform(views_of(experiment.data, pieces.processor)),
        policy=policy_of(experiment.data, require_caption=False),
    ) as batches:
        batch = next(iter(batches))
    originals, views = np.asarray(batch["image"]), jnp.asarray(batch["florence_image"])
    factor = networks.vae.config.downsampling
    size = (originals.shape[1] // factor, originals.shape[2] // factor)
    dtype = experiment.model.compute_dtype

    @jax.jit
    def contexts(params):
        z = caption_embeddings(networks, params, image_features(networks, params, views))
        context = context_of(networks, params, z)
        if networks.projector is None:
            return context, None
        return context, prefix_embeddings(networks, params, context)

    def save(step: int, params: Any) -> None:
        context, prefix = contexts(params)
        key = jax.random.key(sampling.seed)
        redrawn = fetch(
            redraw(networks, params, context, key, sampling, latent_size=size)
        )  # fmt: skip
        captions = None
        if prefix is not None:
            tokenizer = pieces.lm_tokenizer
            generated = generate_captions(
                networks, params, prefix, sampling, key=key,
                eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id or 0,
            )  # fmt: skip
            captions = decode_texts(tokenizer, fetch(generated))
        if jax.process_index() == 0:
            file = _sheet_file(workdir, step)
            file.parent.mkdir(parents=True, exist_ok=True)
            png = io.BytesIO()
            draw_sheet(originals, redrawn, captions).save(png, "PNG")
            write_whole(file, png.getvalue())

    def hook(step: int, state: Any) -> None:
        trainable = state.params if state.ema is None else state.ema
        with mesh_of(trainable):
            save(step, merge(jax.tree.map(lambda x: x.astype(dtype), trainable), frozen))

    return hook
