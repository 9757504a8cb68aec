"""The autoencoder of the text-to-image stand-in."""

import pathlib
from collections.abc import Iterator

import jax
import numpy as np

from core_jax.models import save_model
from core_jax.models.autoencoder_kl import FAMILY, AutoencoderKL
from miniature import standins
from miniature.pretrain.fit import fit, index_batches
from miniature.pretrain.scenes import images
from miniature.pretrain.text_to_image import make_vae_loss

BATCH = 32
CROP = 32  # pixels; most steps see crops, which cost a quarter, the last ones whole pictures
WHOLE_FRACTION = 0.08


def train_vae(out: pathlib.Path, workdir: pathlib.Path, *, steps: int, num_images: int) -> None:
    """Trains the VAE, sets its scaling factor to 1 / std of the latents, and saves it."""
    pixels = images("train", 0, num_images, cache=workdir / "data")
    model = AutoencoderKL(config=standins.vae_config())

    def batches(start: int) -> Iterator[dict]:
        for step, rows in index_batches(num_images, BATCH, seed=0, start_step=start):
            whole = pixels[np.sort(rows)]
            if step >= steps * (1 - WHOLE_FRACTION):
                yield {"image": whole}
                continue
            top, left = np.random.default_rng((7, step)).integers(0, whole.shape[1] - CROP + 1, 2)
            yield {"image": whole[:, top : top + CROP, left : left + CROP]}

    params = fit(
        "vae", params=FAMILY.init_params(model, jax.random.key(0)), loss=make_vae_loss(model),
        make_batches=batches, steps=steps, learning_rate=3e-3, workdir=workdir, ema_decay=0.995,
        weight_decay=0.0,
    )  # fmt: skip
    mean, _ = encode_all(model, params, pixels[:512])
    config = standins.vae_config(scaling_factor=float(1.0 / np.std(mean)))
    save_model(out / "vae", AutoencoderKL(config=config), params, dtype="bfloat16")


def encode_all(
    model: AutoencoderKL, params, pixels: np.ndarray, batch: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior means and log variances of many images, float32."""

    @jax.jit
    def encode(x):
        x = x.astype("float32") / 127.5 - 1.0
        return model.apply({"params": params}, x, method="encode")

    means, logvars = [], []
    for i in range(0, len(pixels), batch):
        part = np.asarray(pixels[i : i + batch])
        padded = np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])
        mean, logvar = jax.device_get(encode(padded))
        means.append(mean[: len(part)])
        logvars.append(logvar[: len(part)])
    return np.concatenate(means), np.concatenate(logvars)
