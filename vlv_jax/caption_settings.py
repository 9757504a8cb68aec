"""What captions follow from beside the image, as it is noted beside them."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from core_jax.partition import tree_hash
from vlv_jax.batches import ImageViews
from vlv_jax.inference import Captioner
from vlv_jax.networks import PROJECTOR, VAE

_SAMPLING = ("num_beams", "temperature", "top_k", "top_p", "max_new_tokens", "seed")
_VIEWS = ("size", "crop", "resample", "native_crops")
_PROCESSOR = ("size", "crop", "resample")


def whole_views(captioner: Captioner) -> ImageViews:
    """The captioner's views; a caption of a random part, as in training, would be no caption."""
    views = captioner.views
    return dataclasses.replace(views, crop="center") if views.crop == "random" else views


def caption_settings(captioner: Captioner) -> dict[str, Any]:
    """Everything that decides on a caption, as JSON has it (lists, no tuples).

    The batch's size, threads and how networks are executed are not among it: with them results
    differ by rounding alone.
    """
    views, networks = whole_views(captioner), captioner.networks
    used = {name: tree for name, tree in captioner.params.items() if name != VAE}
    settings = {
        # The projector is small, and every captioner trains it.
        "weights": tree_hash(captioner.params[PROJECTOR]),
        "dtype": "+".join(sorted({str(leaf.dtype) for leaf in jax.tree.leaves(used)})),
        "prompt_ids": networks.prompt_ids,
        **{f"views.{name}": getattr(views, name) for name in _VIEWS},
        **{f"processor.{name}": getattr(views.processor, name) for name in _PROCESSOR},
        "image_mean": networks.image_mean,
        "image_std": networks.image_std,
        **{f"limits.{k}": v for k, v in dataclasses.asdict(captioner.limits).items()},
        **{name: getattr(captioner.sampling, name) for name in _SAMPLING},
    }
    return json.loads(json.dumps(settings))


def replacement_name(settings: Mapping[str, Any], inputs: Sequence[str]) -> str:
    """Tells replacements apart, so that only the same command goes on with a part."""
    return hashlib.sha256(json.dumps([settings, list(inputs)]).encode()).hexdigest()[:8]
