"""The captioner that the paper's authors released, from safetensors.

Its state dict is that of their `CLIPDecoder` (models/VLV_stage2.py):

    qwen2_model.*                 Qwen2, tied head stored twice
    VLV_model.model.*             Florence-2, remote-code layout
    VLV_model.text_encoder.*      the text encoder of Stable Diffusion 2.1
    VLV_model.language_proj.{0,2} phi        VLV_model.query_embed   [1, Q, D]
    mlp.layers.{0,2}              psi

Which prefix the published file carries could not be seen, so each group is found by a tensor that
only it has, and what stands before that is taken off. UNet and VAE are not in it.
"""

import contextlib
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from core_jax.convert.rules import WeightsError, format_problems
from core_jax.convert.safetensors_io import TensorReader
from core_jax.convert.safetensors_write import Outgoing, write_stream
from vlv_jax import networks as names
from vlv_jax.experiment import Experiment
from vlv_jax.exporting import Exportable, copy_companions, with_model, write_pipeline_files
from vlv_jax.loading import load_networks
from vlv_jax.workdir import WorkdirError, overlay

# Group -> endings of names that only it has; what stands before the ending is its prefix.
_ANCHORS: Mapping[str, tuple[str, ...]] = {
    "queries": ("query_embed",),
    "phi": ("language_proj.0.weight",),
    "psi": ("mlp.layers.0.weight",),
    "language_model": ("model.layers.0.input_layernorm.weight",),
    "text_encoder": ("text_model.embeddings.position_embedding.weight",),
    "florence2": (
        "model.vision_tower.convs.0.conv.weight",  # transformers' own layout
        "vision_tower.convs.0.proj.weight",  # remote code
    ),
}
_CONTENT: Mapping[str, tuple[str, ...]] = {
    "queries": ("query_embed",),
    "phi": ("language_proj.",),
    "psi": ("mlp.layers.",),
    "language_model": ("model.", "lm_head."),
    "text_encoder": ("text_model.",),
    "florence2": ("",),
}


def group_tensors(stored: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """Sorts names into groups.

    Args:
      stored: every tensor's name.

    Returns:
      group -> its own name of a tensor -> the stored name.

    Raises:
      WeightsError: a group is not there or there twice, or a tensor belongs to none; all names
        are listed.
    """
    problems: dict[str, list[str]] = {"missing": [], "doubly used": [], "unknown": []}
    prefixes: dict[str, str] = {}
    for group, endings in _ANCHORS.items():
        found = _find_anchor(stored, endings)
        if not found:
            problems["missing"].append(f"{group}: no tensor ends in {' or '.join(endings)}")
        elif len(found) > 1:
            problems["doubly used"].append(f"{group}: {', '.join(name for name, _ in found)}")
        else:
            prefixes[group] = found[0][1]
    groups: dict[str, dict[str, str]] = {group: {} for group in prefixes}
    for name in stored:
        group = _group_of(name, prefixes)
        if group is None:
            problems["unknown"].append(name)
        else:
            groups[group][name.removeprefix(prefixes[group])] = name
    if any(problems.values()):
        raise WeightsError(format_problems(problems))
    return groups


def _find_anchor(stored: Mapping[str, object], endings: tuple[str, ...]) -> list[tuple[str, str]]:
    for ending in endings:
        found = [
            (name, name.removesuffix(ending))
            for name in stored
            if name == ending or name.endswith("." + ending)
        ]
        if found:
            return found
    return []


def _group_of(name: str, prefixes: Mapping[str, str]) -> str | None:
    """The group with the longest matching prefix: Florence-2's content may be anything."""
    matching = [
        group
        for group, prefix in prefixes.items()
        if name.startswith(tuple(prefix + content for content in _CONTENT[group]))
    ]
    return max(matching, key=lambda g: (len(prefixes[g]), _CONTENT[g] != ("",)), default=None)


def exportable_release(experiment: Experiment, source: pathlib.Path) -> Exportable:
    """The released captioner as a model that `vlv_jax.exporting.write_export` writes.

    Args:
      experiment: a stage-2 config. Its hub directories give configurations, tokenizers, UNet and
        VAE; the language model's size must be the release's.
      source: a safetensors file, or a directory of them.

    Raises:
      CheckpointFormatError: a pickle (the message has the remedy), or nothing readable.
      WeightsError: tensors are missing, unknown, doubly used or misshaped; all are listed.
      WorkdirError: the config names no language model.
    """
    if not experiment.model.language_model:
        raise WorkdirError(
            "the released captioner has a language model and the config names none; use a stage-2 "
            "config such as configs/vlv_stage2.py:3b"
        )
    reader = TensorReader(source)
    groups = group_tensors(reader.shapes)
    queries = reader.read(groups["queries"]["query_embed"])
    queries = queries.reshape(-1, queries.shape[-1])  # stored with a leading axis of one
    own = with_model(experiment, num_queries=len(queries))
    with _as_hub(own, reader, groups) as paths:
        networks, params, _ = load_networks(with_model(own, **paths).model)
    fresh = {names.BRIDGE: params[names.BRIDGE], names.PROJECTOR: params[names.PROJECTOR]}
    kind = jnp.asarray(queries).dtype
    fresh = jax.tree.map(lambda x: x.astype(kind), fresh)
    added = _added_parameters(reader, groups, queries)
    params |= overlay(fresh, added, where=str(source))
    return Exportable(
        experiment=own,
        networks=networks,
        params=params,
        origin="The captioner that the paper's authors released, converted.",
        facts={"file": source.name},
    )


def _added_parameters(reader: TensorReader, groups, queries: np.ndarray) -> dict:
    """Queries, phi and psi under our names; torch stores a Linear as [out, in]."""

    def linear(group: str, name: str) -> dict:
        stored = groups[group]
        return {
            "kernel": jnp.asarray(np.ascontiguousarray(reader.read(stored[f"{name}.weight"]).T)),
            "bias": jnp.asarray(reader.read(stored[f"{name}.bias"])),
        }

    expected = {
        "queries": {"query_embed"},
        "phi": {f"language_proj.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")},
        "psi": {f"mlp.layers.{i}.{p}" for i in (0, 2) for p in ("weight", "bias")},
    }
    problems = {
        "missing": [n for g, want in expected.items() for n in sorted(want - groups[g].keys())],
        "unknown": [groups[g][n] for g, want in expected.items() for n in groups[g].keys() - want],
    }
    if any(problems.values()):
        raise WeightsError(format_problems(problems))
    bridge = {"query_embed": jnp.asarray(queries)}
    bridge |= {f"language_proj_{i}": linear("phi", f"language_proj.{i}") for i in (0, 2)}
    projector = {f"layers_{i}": linear("psi", f"mlp.layers.{i}") for i in (0, 2)}
    return {names.BRIDGE: bridge, names.PROJECTOR: projector}


@contextlib.contextmanager
def _as_hub(
    experiment: Experiment, reader: TensorReader, groups: Mapping[str, Mapping[str, str]]
) -> Iterator[dict[str, str]]:
    """The released networks as hub directories, which the ordinary strict loader then reads."""
    model = experiment.model
    with tempfile.TemporaryDirectory(prefix="vlv-release-") as scratch:
        root = pathlib.Path(scratch)
        pipeline, source = root / "stable-diffusion", pathlib.Path(model.diffusion)
        write_pipeline_files(source, pipeline)
        for part in ("unet", "vae"):
            (pipeline / part).symlink_to((source / part).absolute(), target_is_directory=True)
        parts = {
            "florence2": (pathlib.Path(model.florence2), root / "florence2"),
            "text_encoder": (source / "text_encoder", pipeline / "text_encoder"),
            "language_model": (pathlib.Path(model.language_model), root / "language_model"),
        }
        for group, (hub, target) in parts.items():
            copy_companions(hub, target)
            shutil.copyfile(hub / "config.json", target / "config.json")
            tensors = [
                Outgoing(
                    own, reader.shapes[stored], reader.dtypes[stored],
                    functools.partial(reader.chunks, stored),
                )
                for own, stored in groups[group].items()
            ]  # fmt: skip
            write_stream(target, tensors, file_name="model.safetensors")
        yield {
            "florence2": str(root / "florence2"), "diffusion": str(pipeline),
            "language_model": str(root / "language_model"),
        }  # fmt: skip
