"""Vision towers learn to say what is in every cell, before anything learns words."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from miniature.pretrain.fit import fit, index_batches
from miniature.pretrain.labels import (
    GridProbe,
    background_labels,
    cell_labels,
    hide_colours,
    init_probe,
    probe_loss,
    recolour,
)
from miniature.world import render, sample_crowd

BATCH = 32
# (parameters, pixels of 0..255 [B, 64, 64, 3]) -> features [B, h, w, D]
Features = Callable[[Any, jax.Array], jax.Array]


def train_tower(
    name: str,
    params: Any,
    features: Features,
    *,
    width: int,
    pixels: np.ndarray,
    labels: dict[str, np.ndarray],
    steps: int,
    workdir: pathlib.Path,
) -> dict[str, Any]:
    """The tower and a probe of its features, trained together.

    Args:
      name: of the run.
      params: of the tower.
      features: what the probe reads.
      width: D, of the features.
      pixels: uint8 [n, 64, 64, 3].
      labels: cells and backgrounds of these pictures, see `labels`.
      steps: of training.
      workdir: where the run is kept.

    Returns:
      {"model": the tower's parameters, "probe": the probe's}.
    """
    probe = GridProbe()
    probe_params = init_probe(probe, (3, 3, width), jax.random.key(3))
    return fit(
        name, params={"model": params, "probe": probe_params}, loss=_loss(features),
        make_batches=_batches(pixels, labels), steps=steps, learning_rate=1e-2, workdir=workdir,
        ema_decay=0.99, optimizer_name="muon",
    )  # fmt: skip


def read_grid(probe_params: Any, features: jax.Array, batch: Any) -> tuple[jax.Array, dict]:
    """The probe's loss on a grid of features, and its metrics."""
    logits = GridProbe().apply({"params": probe_params}, features)
    return probe_loss(logits, batch["cells"], batch["backgrounds"])  # pyright: ignore[reportArgumentType]


def _loss(features: Features) -> Callable:
    """A third of the pictures come in false colours, so that a shape is known by its outline.

    Some combinations of shape, colour and size are never seen in training; a tower that has only
    seen true colours takes a colour as a hint of the shapes it goes with. False colours are not
    asked for.
    """

    def loss(params, frozen, batch, key):
        del frozen
        false = jnp.arange(batch["image"].shape[0]) % 3 == 2
        x = jnp.where(false[:, None, None, None], recolour(batch["image"], key), batch["image"])
        found = features(params["model"], x)
        return read_grid(params["probe"], found, hide_colours(batch, false))

    return loss


def _batches(pixels: np.ndarray, labels: dict[str, np.ndarray]) -> Callable[[int], Iterator[dict]]:
    """Three quarters are crowds that are drawn as they are needed and never come again."""
    crowds = BATCH * 3 // 4

    def batches(start: int) -> Iterator[dict]:
        for step, rows in index_batches(len(pixels), BATCH - crowds, seed=2, start_step=start):
            crowd = [sample_crowd(0, step * crowds + i) for i in range(crowds)]
            order = np.random.default_rng((2, step)).permutation(BATCH)
            yield {
                name: np.concatenate([drawn, kept[rows]])[order]
                for name, drawn, kept in (
                    ("image", np.stack([render(scene) for scene in crowd]), pixels),
                    ("cells", cell_labels(crowd), labels["cells"]),
                    ("backgrounds", background_labels(crowd), labels["backgrounds"]),
                )
            }

    return batches
