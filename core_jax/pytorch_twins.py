"""The PyTorch twin of every family: what to feed both, and what must come out equal.

torch, transformers' networks and diffusers are imported inside functions only: they are oracles,
never a part of what runs (core_jax.verify).
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]


class NotComparableError(RuntimeError):
    """PyTorch is missing, or cannot read the directory; the message has the remedy."""


def require_torch() -> None:
    """Raises NotComparableError with the remedy if PyTorch cannot be imported."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise NotComparableError(
            "PyTorch is not installed, so there is nothing to compare with. Install the "
            "comparison's packages: pip install torch==2.13.0, then pip install 'diffusers>=0.42'"
        ) from error


def _read_with(library: str, class_name: str, path: pathlib.Path) -> Any:
    """A PyTorch model in float32, all of whose tensors came from the directory."""
    import importlib

    import torch

    try:
        cls = getattr(importlib.import_module(library), class_name)
    except (ImportError, AttributeError) as error:
        raise NotComparableError(
            f"{library}.{class_name} is not available ({error}); pip install -U {library}"
        ) from error
    kind = "torch_dtype" if library == "diffusers" else "dtype"
    try:
        model, info = cls.from_pretrained(
            path, output_loading_info=True, local_files_only=True, **{kind: torch.float32}
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise NotComparableError(f"{library} cannot read {path}: {error}") from error
    if absent := sorted(info["missing_keys"]):
        # It fills them with random numbers and goes on.
        raise NotComparableError(
            f"{library} misses {len(absent)} tensors in {path}: {', '.join(absent[:5])}"
            f"{', ...' if len(absent) > 5 else ''}"
        )
    return model.eval()


def _torch(array: np.ndarray) -> Any:
    """A tensor; images and latents channels first."""
    import torch

    array = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
    return torch.tensor(np.array(array, np.int64 if array.dtype.kind == "i" else None))


def _numpy(tensor: Any) -> np.ndarray:
    array = tensor.detach().float().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def _apply(model: Any, params: Any, *args: Any, method: str | None = None) -> Any:
    return jax.jit(lambda p, *a: model.apply({"params": p}, *a, method=method))(
        params, *(jnp.asarray(a) for a in args)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Twin:
    """How a family is compared.

    Attributes:
      inputs: (config, generator) -> named inputs, channels last; not square.
      ours: (model, params, inputs) -> named outputs.
      theirs: (directory, inputs) -> the same outputs from PyTorch.
    """

    inputs: Callable[[Any, np.random.Generator], Arrays]
    ours: Callable[[Any, Any, Arrays], Mapping[str, Any]]
    theirs: Callable[[pathlib.Path, Arrays], Arrays]


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _ids(rng: np.random.Generator, vocab_size: int, *shape: int) -> np.ndarray:
    return rng.integers(0, vocab_size, shape).astype(np.int32)


def _clip_text_inputs(config, rng):
    return {"ids": _ids(rng, config.vocab_size, 2, config.max_position_embeddings)}


def _clip_text_theirs(path, inputs):
    model = _read_with("transformers", "CLIPTextModel", path)
    return {"last_hidden_state": _numpy(model(_torch(inputs["ids"])).last_hidden_state)}


def _unet_inputs(config, rng):
    side = 2 * config.downsampling
    return {
        "sample": _normal(rng, 2, 2 * side, side, config.in_channels),
        "timesteps": np.asarray([7, 901], np.int32),
        "context": _normal(rng, 2, 77, config.per_block("cross_attention_dim")[0]),
    }


def _unet_theirs(path, inputs):
    model = _read_with("diffusers", "UNet2DConditionModel", path)
    return {"prediction": _numpy(model(*(_torch(x) for x in inputs.values())).sample)}


def _vae_inputs(config, rng):
    side = 4 * config.downsampling
    images = np.tanh(_normal(rng, 2, 2 * side, side, config.in_channels))
    return {"images": images, "latents": _normal(rng, 2, 8, 4, config.latent_channels)}


def _vae_ours(model, params, inputs):
    mean, logvar = _apply(model, params, inputs["images"], method="encode")
    decoded = _apply(model, params, inputs["latents"], method="decode")
    return {"mean": mean, "logvar": logvar, "decoded": decoded}


def _vae_theirs(path, inputs):
    model = _read_with("diffusers", "AutoencoderKL", path)
    posterior = model.encode(_torch(inputs["images"])).latent_dist
    decoded = model.decode(_torch(inputs["latents"])).sample
    return {
        "mean": _numpy(posterior.mean),
        "logvar": _numpy(posterior.logvar),
        "decoded": _numpy(decoded),
    }


_PROMPT_LENGTH = 6


def _florence2_inputs(config, rng):
    vision, text = config.vision_config, config.text_config
    stride = math.prod(vision.patch_stride)
    # As large as the tables of positions allow, up to about the released 24 x 24.
    rows = min(vision.max_position_embeddings, 20)
    room = text.max_position_embeddings - _PROMPT_LENGTH - 1
    rows = min(rows, math.isqrt(room))
    columns = max(rows - 1, 1)
    return {
        "images": _normal(rng, 1, rows * stride, columns * stride, vision.in_channels),
        "prompt": _ids(rng, text.vocab_size, 1, _PROMPT_LENGTH),
        "decoder_ids": _ids(rng, text.vocab_size, 1, min(20, text.max_position_embeddings)),
    }


def _florence2_ours(model, params, inputs):
    grid = _apply(model, params, inputs["images"], method="vision_features")
    tokens = _apply(model, params, grid, method="project_features")
    logits = _apply(model, params, *inputs.values())
    return {"vision_features": grid, "image_tokens": tokens, "logits": logits}


def _florence2_theirs(path, inputs):
    import torch

    model = _read_with("transformers", "Florence2ForConditionalGeneration", path)
    image = model.get_image_features(_torch(inputs["images"]))
    prompt = model.get_input_embeddings()(_torch(inputs["prompt"]))
    # Embeddings, not placeholders: microsoft's table has no row for the placeholder's id.
    embeds = torch.cat([image.pooler_output, prompt], dim=1)
    out = model(inputs_embeds=embeds, decoder_input_ids=_torch(inputs["decoder_ids"]))
    return {
        "vision_features": _numpy(image.last_hidden_state),
        "image_tokens": _numpy(image.pooler_output),
        "logits": _numpy(out.logits),
    }


def _qwen2_inputs(config, rng):
    return {"ids": _ids(rng, config.vocab_size, 2, min(64, config.max_position_embeddings))}


def _qwen2_theirs(path, inputs):
    model = _read_with("transformers", "Qwen2ForCausalLM", path)
    return {"logits": _numpy(model(_torch(inputs["ids"])).logits)}


def _qwen2_5_vl_inputs(config, rng):
    tower, special = config.vision_config, config.image_token_id
    m, side = tower.spatial_merge_size, tower.window_side
    # Two images that are not square; neither fills whole windows.
    grids = np.asarray([(1, (side + 1) * m, (2 * side + 1) * m), (1, 3 * m, m)], np.int32)
    tokens = [int(np.prod(g)) // tower.merge_unit for g in grids]
    text = _ids(rng, min(config.image_token_id, config.video_token_id), 3, 20)
    ids = [text[0], [special] * tokens[0], text[1], [special] * tokens[1], text[2]]
    patches = _normal(rng, sum(tokens) * tower.merge_unit, tower.patch_values)
    return {"ids": np.concatenate(ids)[None].astype(np.int32), "patches": patches, "grids": grids}


def _qwen2_5_vl_ours(model, params, inputs):
    from core_jax.models.qwen2_5_vl import pack_images, place_prompts

    grids = inputs["grids"]
    images = np.split(inputs["patches"], np.cumsum(grids.prod(1))[:-1])
    packed = pack_images(images, grids, model.config.vision_config, rows=1)
    places = place_prompts(inputs["ids"], None, packed, model.config)
    batch = (packed.batch.patches, packed.batch.positions, packed.batch.segments)
    tokens = _apply(model, params, *batch, method="image_tokens")
    tokens = tokens.reshape(-1, tokens.shape[-1])[np.concatenate(packed.token_slots)]
    logits = _apply(model, params, inputs["ids"], places.positions, places.image_slots, *batch)
    return {"image_tokens": tokens, "logits": logits}


def _qwen2_5_vl_theirs(path, inputs):
    import torch

    model = _read_with("transformers", "Qwen2_5_VLForConditionalGeneration", path)
    ids, patches, grids = (_torch(x) for x in inputs.values())
    features = model.get_image_features(patches, grids).pooler_output
    kinds = (ids == model.config.image_token_id).int()  # without it positions are those of text
    out = model(input_ids=ids, pixel_values=patches, image_grid_thw=grids, mm_token_type_ids=kinds)
    return {"image_tokens": _numpy(torch.cat(list(features))), "logits": _numpy(out.logits)}


def _siglip_inputs(config, rng):
    return {"images": _normal(rng, 2, config.image_size, config.image_size, config.num_channels)}


def _siglip_theirs(path, inputs):
    model = _read_with("transformers", "SiglipVisionModel", path)
    return {"vision_features": _grid(model(_torch(inputs["images"])).last_hidden_state)}


def _grid(patches: Any) -> np.ndarray:
    """[B, h * w, D] -> [B, h, w, D]."""
    array = _numpy(patches)
    side = math.isqrt(array.shape[1])
    return array.reshape(array.shape[0], side, side, -1)


def _gemma3_text_inputs(config, rng):
    # Longer than the window of the local layers, where that is possible in reasonable time.
    length = min(config.sliding_window + 32, config.max_position_embeddings, 1100)
    return {"ids": _ids(rng, config.vocab_size, 1, length)}


def _gemma3_text_theirs(path, inputs):
    model = _read_with("transformers", "Gemma3ForCausalLM", path)
    return {"logits": _numpy(model(_torch(inputs["ids"])).logits)}


def _gemma3_inputs(config, rng):
    """Two images in one prompt."""
    ids = _gemma3_text_inputs(config.text_config, rng)["ids"][0]
    ids = np.where(ids == config.image_token_index, 0, ids)
    run = [config.boi_token_index, *[config.image_token_index] * config.mm_tokens_per_image,
           config.eoi_token_index]  # fmt: skip
    prompt = np.concatenate([ids[:4], run, ids[4:9], run, ids[9:]]).astype(np.int32)
    return {"ids": prompt[None], **_siglip_inputs(config.vision_config, rng)}


def _gemma3_ours(model, params, inputs):
    grid = _apply(model, params, inputs["images"], method="vision_features")
    tokens = _apply(model, params, grid, method="project_features")
    logits = _apply(model, params, inputs["ids"], inputs["images"])
    return {"vision_features": grid, "image_tokens": tokens, "logits": logits}


def _gemma3_theirs(path, inputs):
    model = _read_with("transformers", "Gemma3ForConditionalGeneration", path)
    images, ids = _torch(inputs["images"]), _torch(inputs["ids"])
    features = model.get_image_features(images)
    # Without the types it forgets that an image's tokens see one another, and says nothing.
    types = (ids == model.config.image_token_index).long()
    out = model(input_ids=ids, pixel_values=images, token_type_ids=types)
    return {
        "vision_features": _grid(features.last_hidden_state),
        "image_tokens": _numpy(features.pooler_output),
        "logits": _numpy(out.logits),
    }


def _whole(output: str) -> Callable[[Any, Any, Arrays], Mapping[str, Any]]:
    """The model's `__call__` on all inputs, in order."""
    return lambda model, params, inputs: {output: _apply(model, params, *inputs.values())}


TWINS: Mapping[str, Twin] = {
    "clip_text": Twin(
        inputs=_clip_text_inputs, ours=_whole("last_hidden_state"), theirs=_clip_text_theirs
    ),
    "unet": Twin(inputs=_unet_inputs, ours=_whole("prediction"), theirs=_unet_theirs),
    "autoencoder_kl": Twin(inputs=_vae_inputs, ours=_vae_ours, theirs=_vae_theirs),
    "florence2": Twin(
        inputs=_florence2_inputs, ours=_florence2_ours, theirs=_florence2_theirs
    ),
    "qwen2": Twin(inputs=_qwen2_inputs, ours=_whole("logits"), theirs=_qwen2_theirs),
    "siglip": Twin(inputs=_siglip_inputs, ours=_whole("vision_features"), theirs=_siglip_theirs),
    "gemma3_text": Twin(
        inputs=_gemma3_text_inputs, ours=_whole("logits"), theirs=_gemma3_text_theirs
    ),
    "gemma3": Twin(inputs=_gemma3_inputs, ours=_gemma3_ours, theirs=_gemma3_theirs),
    "qwen2_5_vl": Twin(
        inputs=_qwen2_5_vl_inputs, ours=_qwen2_5_vl_ours, theirs=_qwen2_5_vl_theirs
    ),
}
