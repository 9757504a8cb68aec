"""Hub directories in, hub directories out: `load_model`, `save_model`."""

import functools
import importlib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from core_jax.convert.rules import (
    Assignment,
    WeightRules,
    WeightsError,
    assign,
    derive_entries,
    format_problems,
)
from core_jax.convert.safetensors_io import TensorReader
from core_jax.convert.safetensors_write import MAX_SHARD_BYTES, Outgoing, write_stream
from core_jax.convert.shards_in import read_leaf
from core_jax.convert.shards_out import host_pieces, is_spread, stored_blocks
from core_jax.models.family import Family
from core_jax.models.hf_config import build_config, read_json
from core_jax.partition import flatten, unflatten
from core_jax.sharding import fsdp_by_size, param_shardings

# Explicit, so that it can be read and searched; a family is imported when it is first needed.
# Identifiers are values of config.json's `_class_name`, `architectures` or `model_type`.
FAMILIES: Mapping[str, tuple[str, ...]] = {
    "core_jax.models.clip_text": (
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "clip_text_model",
    ),
    "core_jax.models.unet": ("UNet2DConditionModel",),
    "core_jax.models.autoencoder_kl": ("AutoencoderKL",),
    "core_jax.models.florence2": ("Florence2ForConditionalGeneration", "florence2"),
    "core_jax.models.qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "core_jax.models.gemma3": ("Gemma3ForConditionalGeneration", "gemma3"),
    "core_jax.models.gemma3_text": ("Gemma3ForCausalLM", "gemma3_text"),
    "core_jax.models.siglip": ("SiglipVisionModel", "siglip_vision_model"),
    "core_jax.models.qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", "qwen2_5_vl"),
}

STORED_TYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


class UnknownModelError(ValueError):
    """No family of ours reads this configuration."""


def find_family(config: Mapping[str, Any], *, where: str = "the configuration") -> Family:
    """The family that a config.json describes.

    Raises:
      UnknownModelError: none does; the message lists what is supported.
    """
    names = [config.get("_class_name"), *(config.get("architectures") or ())]
    names = [n for n in [*names, config.get("model_type")] if n]
    for name in names:
        for module, identifiers in FAMILIES.items():
            if name in identifiers:
                return importlib.import_module(module).FAMILY
    supported = sorted(i for identifiers in FAMILIES.values() for i in identifiers)
    raise UnknownModelError(
        f"{where} describes {names or 'nothing'}; supported are {', '.join(supported)}"
    )


def family_of(model: nn.Module) -> Family:
    """The family of a model that `load_model` returned or that was built by hand."""
    module = type(model).__module__.rpartition(".")[0]
    if module not in FAMILIES:
        raise UnknownModelError(f"{type(model).__name__} belongs to no family")
    return importlib.import_module(module).FAMILY


def load_config(path: str | os.PathLike) -> tuple[Family, Any]:
    """The family and the typed configuration of a hub directory.

    Raises:
      FileNotFoundError: there is no config.json, or only an adapter's.
      UnknownModelError: no family reads it.
      ModelConfigError: it is not JSON, or asks for something that the family lacks.
    """
    file = pathlib.Path(path) / "config.json"
    if not file.is_file() and (file.parent / "adapter_config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds an adapter (adapter_config.json), not a model: merge it into its base "
            "model first (peft's merge_and_unload, then save_pretrained), and name that directory"
        )
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; is {path} a hub model directory?")
    raw = read_json(file)
    family = find_family(raw, where=str(file))
    return family, build_config(family.config.from_hf, raw, file)


def load_model(
    path: str | os.PathLike,
    *,
    dtype: Any = None,
    mesh: Any = None,
    rules: Any = None,
    only: Sequence[str] | None = None,
) -> tuple[Any, Any]:
    """Reads a hub directory, tensor by tensor and straight into the parameters' shards.

    A process reads the bytes that its own devices hold; beside the parameters the host holds some
    megabytes. Only tensors that must repeat another, or be zero, are read whole by every process.

    Args:
      path: a model directory (config.json and safetensors), or a diffusers pipeline
        (model_index.json), whose supported sub-folders are then read.
      dtype: floating-point type of the parameters; the stored types if None.
      mesh: places parameters on this mesh; default device if None.
      rules: logical axis -> mesh axes for the family's parameters (core_jax.sharding).
      only: patterns of the parameter paths to read (a vision tower, say); the directory is checked
        as a whole all the same. Not for pipelines.

    Returns:
      (model, params): a Linen module and its tree for `model.apply({"params": params}, ...)`.
      For a pipeline both are dictionaries keyed by sub-folder.

    Raises:
      WeightsError: tensors are missing, unknown, doubly used or wrongly shaped (all are listed).
      CheckpointFormatError: no readable safetensors; pickles are refused.
      UnknownModelError: the architecture is not supported.
      ModelConfigError: a configuration is broken, or asks for something that is not supported.
      FileNotFoundError: no configuration.
    """
    path = pathlib.Path(path)
    if (path / "model_index.json").is_file() and not (path / "config.json").is_file():
        loaded = {
            p.name: load_model(p, dtype=dtype, mesh=mesh, rules=rules) for p in _components(path)
        }
        return {n: m for n, (m, _) in loaded.items()}, {n: p for n, (_, p) in loaded.items()}
    family, config = load_config(path)
    reader = TensorReader(path)
    if family.adapt is not None:
        config = family.adapt(config, reader.shapes)
    model = family.model(config=config)
    flat = flatten(family.abstract_params(model))
    weight_rules = family.rules(config)
    entries = derive_entries({p: x.shape for p, x in flat.items()}, weight_rules)
    assignments, aliases = assign(reader.shapes, entries, weight_rules)
    _check_types(reader, assignments)
    shardings: Mapping[str, Any] = {}
    if mesh is not None:
        shardings = flatten(model_shardings(family, unflatten(flat), mesh, rules))
    # So far only headers were read.
    _check_aliases(reader, aliases)
    _check_zeros(reader, weight_rules)
    if only is not None:
        assignments = _chosen(assignments, only)
    params = {
        name: read_leaf(
            reader, parts, flat[name].shape, _leaf_type(reader, parts, dtype), shardings.get(name)
        )
        for name, parts in _by_path(assignments).items()
    }
    return model, unflatten(params)


def _chosen(assignments: list[Assignment], patterns: Sequence[str]) -> list[Assignment]:
    chosen = [a for a in assignments if any(re.fullmatch(p, a.entry.path) for p in patterns)]
    if not chosen:
        raise ValueError(f"no parameter matches {list(patterns)}")
    return chosen


def _components(path: pathlib.Path) -> list[pathlib.Path]:
    index = read_json(path / "model_index.json")
    known = {i for identifiers in FAMILIES.values() for i in identifiers}
    classes = {k: v[-1] for k, v in index.items() if isinstance(v, list) and v}
    names = [k for k, v in classes.items() if v in known]
    if not names:
        raise UnknownModelError(
            f"{path / 'model_index.json'} names {classes or 'nothing'}; supported are "
            f"{', '.join(sorted(known))}"
        )
    missing = [n for n in names if not (path / n / "config.json").is_file()]
    if missing:
        raise FileNotFoundError(f"{path} is incomplete: {', '.join(missing)} missing")
    return [path / n for n in names]


def model_shardings(family: Family, abstract: Any, mesh: Any, rules: Any) -> Any:
    """Where `load_model` puts parameters; without rules, or a table of axes, by their size."""
    if rules is None or not family.param_axes:
        return fsdp_by_size(abstract, mesh)
    return param_shardings(abstract, family.param_axes, rules, mesh)


def _check_types(reader: TensorReader, assignments: list[Assignment]) -> None:
    """Integers in place of weights are a quantised checkpoint; their scales would be ignored."""
    wrong = [
        f"{a.stored_name}: {reader.dtypes[a.stored_name]}"
        for a in assignments
        if reader.dtypes[a.stored_name] not in (*STORED_TYPES, np.float64)
    ]
    if wrong:
        raise WeightsError(format_problems({"not floating-point (quantised?)": wrong}))


def _check_aliases(reader: TensorReader, aliases: list[tuple[str, str]]) -> None:
    differing = [
        f"{name} differs from {target}, which it should repeat (tied)"
        for name, target in aliases
        if reader.shapes[name] != reader.shapes[target]
        or not all(
            np.array_equal(one, other)
            for one, other in zip(reader.chunks(name), reader.chunks(target), strict=True)
        )
    ]
    if differing:
        raise WeightsError(format_problems({"tied but different": differing}))


def _check_zeros(reader: TensorReader, rules: WeightRules) -> None:
    nonzero = [
        name
        for name in reader.shapes
        if any(re.fullmatch(p, name) for p in rules.zeros)
        and any(chunk.any() for chunk in reader.chunks(name))
    ]
    if nonzero:
        raise WeightsError(format_problems({"not supported unless zero": nonzero}))


def _by_path(assignments: list[Assignment]) -> dict[str, list[Assignment]]:
    by_path: dict[str, list[Assignment]] = {}
    for a in assignments:
        by_path.setdefault(a.entry.path, []).append(a)
    return by_path


def _leaf_type(reader: TensorReader, parts: list[Assignment], dtype: Any) -> np.dtype:
    """The stored type; float32 for float64 and where a stack's layers have several types."""
    if dtype is not None:
        return np.dtype(dtype)
    stored = [reader.dtypes[a.stored_name] for a in parts]
    same = len(set(stored)) == 1 and stored[0] in STORED_TYPES  # float64 is not among them
    return stored[0] if same else np.dtype(np.float32)


def save_model(
    path: str | os.PathLike,
    model: Any,
    params: Any,
    *,
    dtype: Any = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Writes a hub directory in the family's canonical layout, some megabytes at a time.

    Args:
      path: created if needed; configuration and weights in it are replaced.
      model: Linen module of a family (or a dictionary of them for a pipeline's sub-folders, whose
        model_index.json is written unless there is one).
      params: its parameters, on the host or on any mesh. Where that spans processes all of them
        must call this; process 0 writes.
      dtype: type to store; each leaf's own if None.
      max_shard_bytes: see `write_stream`.

    Raises:
      WeightsError: the tree is not the model's.
    """
    path = pathlib.Path(path)
    if isinstance(model, Mapping):
        for name, part in model.items():
            save_model(path / name, part, params[name], dtype=dtype,
                       max_shard_bytes=max_shard_bytes)
        if not (path / "model_index.json").is_file():
            index = {n: _library_and_class(part) for n, part in model.items()}
            _write_json(path / "model_index.json", {"_class_name": "DiffusionPipeline", **index})
        return
    family = family_of(model)
    flat, wanted = flatten(params), flatten(family.abstract_params(model))
    problems = {
        "missing": [n for n in wanted if n not in flat],
        "unknown": [n for n in flat if n not in wanted],
        "wrong shape": [
            f"{n}: {flat[n].shape}, not {wanted[n].shape}"
            for n in wanted
            if n in flat and flat[n].shape != wanted[n].shape
        ],
    }
    if any(problems.values()):
        raise WeightsError(format_problems(problems))
    path.mkdir(parents=True, exist_ok=True)
    weight_rules = family.rules(model.config)
    entries = derive_entries({p: x.shape for p, x in flat.items()}, weight_rules)
    config = model.config.to_hf()
    if "model_type" in config:  # diffusers has no such key and warns about it
        config["dtype"] = _dtype_name(flat, dtype)
    outgoing = _outgoing(entries, weight_rules, flat, dtype)
    spread = any(is_spread(leaf) for leaf in flat.values())
    if spread and jax.process_index():
        _help_to_gather(entries, flat)
    else:
        write_stream(
            path, outgoing, file_name=family.file_name,
            max_shard_bytes=MAX_SHARD_BYTES if max_shard_bytes is None else max_shard_bytes,
        )  # fmt: skip
        _write_json(path / "config.json", config)
    if spread:
        multihost_utils.sync_global_devices(f"{path} is written")


def _write_json(file: pathlib.Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _library_and_class(model: nn.Module) -> list[str]:
    """As model_index.json names a component."""
    config = model.config.to_hf()
    if "_class_name" in config:
        return ["diffusers", config["_class_name"]]
    return ["transformers", config["architectures"][0]]


def _dtype_name(flat: Mapping[str, Any], dtype: Any) -> str:
    kinds = {np.dtype(dtype)} if dtype is not None else {np.dtype(x.dtype) for x in flat.values()}
    name = kinds.pop().name if len(kinds) == 1 else "float32"
    return re.sub(r"^bfloat16.*", "bfloat16", name)


def _outgoing(entries, rules, flat, dtype) -> list[Outgoing]:
    """What a file is to hold; a tensor's values are fetched when its turn comes."""
    tensors = []
    for name, values in rules.buffers:
        array = values().astype(np.float32 if dtype is None else dtype)
        tensors.append(Outgoing(name, array.shape, array.dtype, functools.partial(iter, (array,))))
    for e in entries:
        kind = np.dtype(flat[e.path].dtype if dtype is None else dtype)
        kind = kind if kind in STORED_TYPES else np.dtype(np.float32)
        blocks = functools.partial(stored_blocks, flat[e.path], e, kind)
        tensors.append(Outgoing(e.name, e.shape, kind, blocks))
    return tensors


def _help_to_gather(entries, flat) -> None:
    """The other processes' part while process 0 writes."""
    for e in entries:
        if is_spread(flat[e.path]):
            host_pieces(flat[e.path], e.layer)
