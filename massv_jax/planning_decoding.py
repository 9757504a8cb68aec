"""Distillation and decoding as shapes: the very programs that `SpeculativeDecoder` runs.

    start (the prompts, the tower)  ->  advance (rounds until all rows have ended)

The second takes the first one's result where that program's compiler left it. Prompts are planned
as long, and images as large, as the config allows; the device is given one image a prompt.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from core_jax.abstract import AbstractProgram
from core_jax.config import ConfigError
from core_jax.decode.gemma3 import Gemma3Decoder, Gemma3Prompt
from core_jax.decode.qwen2_5_vl import ImagePrompt, ImageTextDecoder
from core_jax.decode.sampling import SamplingRule
from core_jax.models.auto import model_shardings
from core_jax.models.gemma3 import Gemma3Config
from core_jax.models.presets import abstract_model, find_config
from core_jax.models.qwen2_5_vl.packing import ImageBatch, num_windows, row_windows
from core_jax.partition import cast_floating
from core_jax.sharding import DEFAULT_RULES, abstract_like
from massv_jax.drafter import LANGUAGE_MODEL, PROJECTOR, Drafter
from massv_jax.drafter_config import DrafterConfig
from massv_jax.experiment import Experiment
from massv_jax.placing import data_parallel
from massv_jax.planning import abstract_config
from massv_jax.projector import init_projector
from massv_jax.speculative.drafting import NetworkProposer
from massv_jax.speculative.loop import Params, Program, Request, advance, start
from massv_jax.speculative.options import DecodeOptions

# Of generation_config.json and tokenizer in the released families: (ends of an answer, padding).
# They are constants of the program, which is as large with any others.
_ENDS: Mapping[str, tuple[tuple[int, ...], int]] = {
    "qwen2_5_vl": ((151645, 151643), 151643),
    "gemma3": ((1, 106), 0),
}


def abstract_decoding(experiment: Experiment, mesh: Mesh) -> AbstractProgram:
    """The rounds of a batch, and before them its prompts, on a mesh of any devices.

    A config of the task "distill" is planned with sampled answers, which compute more than greedy
    ones, and with a drafter if `model.drafter` names one; of "eval" with the decoding that
    `massv_jax.generate` does, and with a drafter of the config's kind, held in `frozen_dtype` as
    an export is.

    Raises:
      UnknownPresetError: a network is neither on this machine nor known by its name.
      ConfigError: the target is of a kind that plans are not made for, or the drafter is.
    """
    config = abstract_config(experiment)
    family = find_config(experiment.model.target)[0].name
    distills = experiment.task == "distill"
    drafts = not distills or experiment.model.drafter not in ("", "none")
    if experiment.model.drafter in ("text", "lookup") or (drafts and config.kind == "text"):
        raise ConfigError(
            "plans of decoding are made with drafters that see images; leave model.drafter a "
            "directory's name and model.kind 'auto'"
        )
    one_device = mesh.size == 1
    params = Params(
        _target_params(experiment, None if one_device else mesh),
        _drafter_params(experiment, config, None if one_device else mesh) if drafts else None,
    )
    rows = _rows(experiment, mesh)
    options = _options(experiment, config, family, drafts)
    drafter = Drafter(config, experiment.model.execution)
    program = Program(
        _decoder(experiment),
        NetworkProposer(drafter.decoder, config.vocab_size, drafter.sees_images)
        if drafts else None,
        options,
    )  # fmt: skip
    request = _request(experiment, config, rows, options, drafts)
    around = None if one_device else mesh
    prompts = AbstractProgram(
        fn=start, arguments=(program, params, request), mesh=around, rows=rows,
        parts={"frozen": params, "batch": request},
    )  # fmt: skip
    with jax.set_mesh(mesh):
        state = jax.eval_shape(lambda p, r: start(program, p, r), params, request)
    state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    return AbstractProgram(
        fn=advance, arguments=(program, params, state, jax.ShapeDtypeStruct((), jnp.int32)),
        options={"gamma": options.max_gamma}, mesh=around, rows=rows,
        parts={"frozen": params, "cache": state}, before=prompts, place=2,
    )  # fmt: skip


def _rows(experiment: Experiment, mesh: Mesh) -> int:
    if experiment.task == "distill":
        return experiment.distill.batch_size * data_parallel(mesh)
    return experiment.decoding.batch_size


def _options(
    experiment: Experiment, config: DrafterConfig, family: str, drafts: bool
) -> DecodeOptions:
    distill, decoding = experiment.distill, experiment.decoding
    values: Any = distill if experiment.task == "distill" else decoding
    ends, padding = _ENDS[family]
    accept = decoding.accept
    if experiment.task == "distill":
        accept = "on_policy" if distill.on_policy else "coupled"
    return DecodeOptions(
        max_new_tokens=values.max_new_tokens, max_gamma=decoding.gamma if drafts else 0,
        vocab_size=config.target_vocab_size, eos_ids=ends, pad_id=padding, accept=accept,
        rule=SamplingRule(
            temperature=values.temperature, top_k=values.top_k, top_p=values.top_p
        ),
        min_confidence=0.0 if values is distill else decoding.min_confidence,
    )  # fmt: skip


def _decoder(experiment: Experiment) -> Any:
    model = abstract_model(experiment.model.target)[0]
    model = model.clone(execution=experiment.model.execution)
    if isinstance(model.config, Gemma3Config):
        return Gemma3Decoder(model)
    return ImageTextDecoder(model)


def _target_params(experiment: Experiment, mesh: Mesh | None) -> Any:
    """As `core_jax.decode.target.load_target` places them."""
    path = experiment.model.target
    family, _ = find_config(path)
    shapes = abstract_model(path)[1]
    # What massv_jax.placing.target_options says wherever the directory is there.
    shardings = mesh and model_shardings(family, shapes, mesh, DEFAULT_RULES)
    return _placed(shapes, experiment.model.frozen_dtype, shardings)


def _drafter_params(experiment: Experiment, config: DrafterConfig, mesh: Mesh | None) -> Any:
    """As `massv_jax.loading.load_drafter` places them: a projector lies on no mesh."""
    family, _ = find_config(experiment.model.language_model)
    shapes = abstract_model(experiment.model.language_model)[1]
    dtype = experiment.model.frozen_dtype
    shardings = mesh and model_shardings(family, shapes, mesh, None)
    projector = jax.eval_shape(lambda: init_projector(config, jax.random.key(0)))
    return {
        PROJECTOR: _placed(projector, dtype, None),
        LANGUAGE_MODEL: _placed(shapes, dtype, shardings),
    }


def _placed(shapes: Any, dtype: Any, shardings: Any) -> Any:
    cast = jax.eval_shape(lambda p: cast_floating(p, dtype), shapes)
    return cast if shardings is None else abstract_like(cast, shardings)


def _request(
    experiment: Experiment, config: DrafterConfig, rows: int, options: DecodeOptions, drafts: bool
) -> Request:
    values: Any = experiment.distill if experiment.task == "distill" else experiment.decoding
    length = max(values.prompt_lengths)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    valid = jax.ShapeDtypeStruct((rows, length), jnp.bool_)
    prompt: Any
    if isinstance(config.target, Gemma3Config):
        prompt_type: Any = Gemma3Prompt
        prompt = prompt_type(ids, valid)
        side = config.target.vision_config.image_size
        images: Any = jax.ShapeDtypeStruct((rows, side, side, 3), jnp.float32)
    else:
        image_prompt: Any = ImagePrompt
        prompt = image_prompt(
            ids=ids, positions=jax.ShapeDtypeStruct((3, rows, length), jnp.int32),
            next_positions=jax.ShapeDtypeStruct((rows,), jnp.int32),
            image_slots=ids, valid=valid,
        )  # fmt: skip
        images = _packed(experiment, config, rows)
    key = jax.eval_shape(lambda: jax.random.key(0)) if options.samples else None
    of_rows: Any = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return Request(
        prompt=prompt, images=images, draft_prompt=prompt if drafts else None, key=key,
        row_seeds=of_rows, limits=of_rows,
    )  # fmt: skip


def _packed(experiment: Experiment, config: DrafterConfig, rows: int) -> ImageBatch:
    """Square images of `data.max_pixels`, one a row."""
    vision = config.target.vision_config
    merged = vision.patch_size * vision.spatial_merge_size
    pixels = experiment.data.max_pixels or 1280 * merged**2  # as released processors have it
    side = math.isqrt(pixels) // merged * vision.spatial_merge_size
    need = num_windows((1, side, side), vision)
    windows = next(n for n in row_windows() if n >= need)
    slots = windows * vision.window_patches
    return ImageBatch(
        patches=jax.ShapeDtypeStruct((rows, slots, vision.patch_values), jnp.float32),
        positions=jax.ShapeDtypeStruct((rows, slots, 2), jnp.int32),
        segments=jax.ShapeDtypeStruct((rows, slots), jnp.int32),
    )
