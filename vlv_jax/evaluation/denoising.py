"""The comparison that says what the bottleneck carries: one denoiser, four conditions.

The frozen denoiser looks at the same noisy latents at the same timesteps, told nothing, the true
caption, the image's caption embeddings, or another image's. If the embeddings give the lowest
loss, they carry at least what the caption carries.
"""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core_jax.evaluation.report import Report
from vlv_jax.encoding import (
    context_of,
    context_of_text,
    draw_latents,
    latent_moments,
)
from vlv_jax.evaluation.examples import columns_of, examples_file, save_examples
from vlv_jax.evaluation.heldout import Subject, collect, in_batches
from vlv_jax.evaluation.reconstruction import add_comparison
from vlv_jax.host_work import Progress
from vlv_jax.loading import text_ids
from vlv_jax.networks import Networks
from vlv_jax.stage1 import DenoisingConfig, Draws, denoising_losses


@functools.partial(jax.jit, static_argnames=("networks",))
def _moments(networks: Networks, params: Any, pixels: jax.Array):
    return latent_moments(networks, params, pixels)


@functools.partial(jax.jit, static_argnames=("networks",))
def _context_of(networks: Networks, params: Any, z: jax.Array):
    return context_of(networks, params, z)


@functools.partial(jax.jit, static_argnames=("networks",))
def _context_of_text(networks: Networks, params: Any, ids: jax.Array):
    return context_of_text(networks, params, ids)


@functools.partial(jax.jit, static_argnames=("networks", "num_strata"))
def stratum_draws(
    networks: Networks,
    key: jax.Array,
    index: jax.Array,
    mean: jax.Array,
    logvar: jax.Array,
    stratum: jax.Array,
    num_strata: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Latents x0 [B, h, w, c], timesteps [B] of one stratum, and noise [B, h, w, c].

    The timestep of stratum k of K is uniform in [k T / K, (k + 1) T / K). Everything follows from
    (key, sample index, stratum), so that every condition, and every model compared, meets the
    same noise.
    """
    steps = networks.schedule.num_train_timesteps

    def one(i):
        k_image, k_stratum = jax.random.split(jax.random.fold_in(key, i))
        k_t, k_noise = jax.random.split(jax.random.fold_in(k_stratum, stratum))
        low, high = stratum * steps // num_strata, (stratum + 1) * steps // num_strata
        return (
            jax.random.randint(k_t, (), low, high),
            jax.random.normal(k_noise, mean.shape[1:]),
            k_image,
        )

    timesteps, noise, keys = jax.vmap(one)(index)
    return draw_latents(networks, mean, logvar, keys), timesteps, noise


@functools.partial(jax.jit, static_argnames=("networks",))
def _losses(networks, params, latents, context, timesteps, noise):
    # The latents are drawn already; no condition is dropped.
    unused = jax.random.split(jax.random.key(0), len(timesteps))
    draws = Draws(timesteps, noise, unused, jnp.ones(timesteps.shape, bool))
    return denoising_losses(networks, params, latents, context, draws, DenoisingConfig())


def encode_examples(subject: Subject, count: int) -> dict[str, Any]:
    """Everything that the comparison needs of the first `count` images, on the host.

    Returns:
      `z` float32 [n, Q, E], `mean` and `logvar` of the VAE [n, h, w, c], `index` int32 [n],
      `caption` texts, `ids`.
    """
    auto = subject.autoencoder

    def compute(batch: Mapping[str, Any]) -> dict[str, Any]:
        moments = _moments(auto.networks, auto.params, jnp.asarray(batch["image"]))
        mean, logvar = jax.device_get(moments)
        return {
            "z": auto.encode_views(batch["florence_image"]), "mean": mean, "logvar": logvar,
            "ids": batch["ids"], "index": batch["index"], "caption": batch["caption"],
        }  # fmt: skip

    return collect(subject, count, compute)


def compare_conditions(subject: Subject, encoded: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Condition -> denoising loss of each image [n], averaged over its timesteps.

    'caption' is left out where an image has none, 'wrong_image' (the next image's embeddings)
    where there is one image only.
    """
    config, auto = subject.evaluation, subject.autoencoder
    networks, params = auto.networks, auto.params
    n, size = len(encoded["z"]), auto.sampling.batch_size
    key = jax.random.key(config.seed)
    length = networks.text_encoder.config.max_position_embeddings
    inputs = _condition_inputs(encoded, auto.pieces.text_tokenizer, length)

    def losses_of(rows: slice) -> dict[str, np.ndarray]:
        used = rows.stop - rows.start
        totals = {condition: np.zeros(used) for condition in inputs}
        index, mean, logvar = (
            jnp.asarray(auto.pad_batch(encoded[k][rows])) for k in ("index", "mean", "logvar")
        )
        contexts = {}
        for condition, values in inputs.items():
            padded = jnp.asarray(auto.pad_batch(values[rows]))
            encode = _context_of if values.ndim == 3 else _context_of_text
            contexts[condition] = encode(networks, params, padded)
        for stratum in range(config.timesteps_per_image):
            latents, timesteps, noise = stratum_draws(
                networks, key, index, mean, logvar, jnp.int32(stratum), config.timesteps_per_image
            )
            for condition, context in contexts.items():
                losses = _losses(networks, params, latents, context, timesteps, noise)
                totals[condition] += np.asarray(losses, np.float64)[:used]
        progress.add(used)
        return totals

    progress = Progress(n)
    parts = in_batches(n, size, losses_of)
    return {
        condition: np.concatenate([part[condition] for part in parts]) / config.timesteps_per_image
        for condition in inputs
    }


def _condition_inputs(encoded: Mapping[str, Any], tokenizer: Any, length: int):
    """Condition -> embeddings [n, Q, E] or token ids [n, T]."""
    z, captions = encoded["z"], encoded["caption"]
    inputs = {"vlv": z}
    if all(captions):
        inputs["caption"] = np.asarray(text_ids(tokenizer, list(captions), length), np.int32)
    empty = np.asarray(text_ids(tokenizer, [""], length), np.int32)
    inputs["none"] = np.repeat(empty, len(z), axis=0)
    if len(z) > 1:
        inputs["wrong_image"] = np.roll(z, -1, axis=0)
    return inputs


def report_denoising(
    report: Report, section: str, subject: Subject, count: int, out: pathlib.Path
) -> None:
    """Adds `stage1.denoising_loss.*` (`stage2.` for a stage-2 run) and their differences.

    The losses of every one of the `count` images are saved in `out`.
    """
    config, name = subject.evaluation, f"stage{subject.experiment.stage}.denoising_loss"
    encoded = encode_examples(subject, count)
    losses = compare_conditions(subject, encoded)
    columns = {f"{name}.{condition}": column for condition, column in losses.items()}
    save_examples(out / examples_file(group_of(subject)), columns_of(encoded["ids"], columns))
    settings = {
        "timesteps_per_image": config.timesteps_per_image,
        "noise_seed": config.seed,
        "bootstrap_samples": config.bootstrap_samples,
        "loss": "mean squared error of the UNet's prediction (noise or v), unweighted",
    }
    add_comparison(report, section, name, losses, options=subject.bootstrap, settings=settings)


def group_of(subject: Subject) -> str:
    """Both stages' losses can be in one section."""
    return f"stage{subject.experiment.stage}.denoising"
