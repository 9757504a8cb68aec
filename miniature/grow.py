r"""A larger target with the same answers, to time decoding where reading weights is what costs.

    python -m miniature.grow --target miniature/checkpoints/qwen2.5-vl --out runs/grown \
        [--layers 16] [--intermediate_size 4096]

The language model gets further layers whose residual branches end in zeros, and wider MLPs whose
new columns do: it computes the same function at the cost of a model of that size (Chen et al.,
Net2Net, arXiv 1511.05641, do so to go on training). What is new is random where it does not
matter, so that nothing can be left out. A drafter of the small target serves the grown one as well
(`python -m massv_jax.rebind`).
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from core_jax.models import load_model, qwen2_5_vl, save_model
from core_jax.partition import count_parameters

_TARGET = flags.DEFINE_string("target", None, "Directory of a Qwen2.5-VL.", required=True)
_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True)
_LAYERS = flags.DEFINE_integer("layers", 16, "Layers of the grown language model.")
_INTERMEDIATE = flags.DEFINE_integer("intermediate_size", 4096, "Width of its MLPs.")
_STD = 0.02


def grow(
    model: qwen2_5_vl.Qwen2_5_VLForConditionalGeneration,
    params: Mapping[str, Any],
    *,
    layers: int,
    intermediate_size: int,
) -> tuple[qwen2_5_vl.Qwen2_5_VLForConditionalGeneration, Mapping[str, Any]]:
    """The larger model.

    Args:
      model: Qwen2.5-VL.
      params: its parameters.
      layers: of the grown language model.
      intermediate_size: of its MLPs.

    Returns:
      The grown model and its parameters; its logits are those of the small one.

    Raises:
      ValueError: a number is smaller than the model's own.
    """
    text = model.config.text_config
    if layers < text.num_hidden_layers or intermediate_size < text.intermediate_size:
        raise ValueError(
            f"{layers} layers of {intermediate_size} are fewer or narrower than the model's "
            f"{text.num_hidden_layers} of {text.intermediate_size}"
        )
    grown_text = dataclasses.replace(
        text, num_hidden_layers=layers, intermediate_size=intermediate_size
    )
    grown = model.clone(config=dataclasses.replace(model.config, text_config=grown_text))
    shapes = qwen2_5_vl.FAMILY.abstract_params(grown)["language_model"]["layers"]
    rng = np.random.default_rng(0)

    def fill(path, shape, old):
        at = [key.key for key in path]
        new = rng.normal(size=shape.shape, scale=_STD).astype(np.float32)
        if at[-2] in ("o_proj", "down_proj"):
            new[...] = 0
        if at[-1] == "scale":
            new[...] = 1
        new[tuple(slice(0, n) for n in old.shape)] = np.asarray(old, np.float32)
        return jnp.asarray(new)

    old = params["language_model"]["layers"]
    stacked = jax.tree_util.tree_map_with_path(fill, shapes, old)
    return grown, {**params, "language_model": {**params["language_model"], "layers": stacked}}


def main(argv: list[str]) -> None:
    """Entry point."""
    del argv
    target, out = pathlib.Path(_TARGET.value), pathlib.Path(_OUT.value)
    model, params = load_model(target, dtype="float32")
    if not isinstance(model, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
        raise SystemExit(f"error: {target} is not a Qwen2.5-VL")
    grown, larger = grow(model, params, layers=_LAYERS.value, intermediate_size=_INTERMEDIATE.value)
    out.mkdir(parents=True, exist_ok=True)
    for file in target.iterdir():
        if file.suffix in (".json", ".jinja", ".txt") and file.name != "config.json":
            shutil.copyfile(file, out / file.name)
    save_model(out, grown, larger)
    was, now = (count_parameters(p["language_model"]) for p in (params, larger))
    print(f"language model: {was:,} -> {now:,} parameters in {out}", flush=True)


if __name__ == "__main__":
    app.run(main)
