"""Drafters from hub directories, and drafter directories in and out.

A drafter directory holds what the drafter adds, and names its target by fingerprints:

massv_config.json       kind, pooling, what it was made for (massv_jax.binding)
projector.safetensors
language_model/         as transformers loads it, with tokenizer

An exported stock directory (massv_jax.exporting) is read as well: it has massv_config.json beside
the hub's own files.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from core_jax.convert.safetensors_io import TensorReader
from core_jax.convert.safetensors_write import write_tensors
from core_jax.decode.target import Target
from core_jax.models import load_model, save_model
from core_jax.models.auto import load_config
from core_jax.models.gemma3 import Gemma3Config
from core_jax.models.gemma3_text import Gemma3ForCausalLM, Gemma3TextConfig
from core_jax.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from core_jax.models.qwen2_5_vl import Qwen2_5_VLConfig
from core_jax.ops.execution import Execution
from core_jax.partition import flatten, unflatten
from massv_jax.binding import TOWERS, Binding, BindingError, bind, check_vocabularies
from massv_jax.companions import copy_companions, load_tokenizer
from massv_jax.drafter import LANGUAGE_MODEL, PROJECTOR, Drafter
from massv_jax.drafter_config import (
    DrafterConfig,
    DrafterError,
    Kind,
    PrefixConfig,
    TargetConfig,
)
from massv_jax.pixels import pixels_of
from massv_jax.projector import copy_merger, init_projector

CONFIG_FILE = "massv_config.json"
PROJECTOR_FILE = "projector.safetensors"
LM_FOLDER = "language_model"
TARGET_MERGER = "target_merger"
FORMAT = 1
_HUB_PROJECTORS = {"merger": ("visual", "merger"), "gemma": ("multi_modal_projector",)}


@dataclasses.dataclass(frozen=True)
class DrafterParts:
    """A drafter and what belongs to it.

    Attributes:
      drafter: pure functions.
      params: {"projector", "language_model"}, and "target_merger" for "mlp" (the target's own, not
        stored with the drafter).
      binding: the target it was made for.
      companions: directory with tokenizer files of the language model.
    """

    drafter: Drafter
    params: dict[str, Any]
    binding: Binding
    companions: pathlib.Path


def target_config(path: pathlib.Path, loaded: Target | None = None) -> TargetConfig:
    """Configuration of a target's directory.

    Args:
      path: the directory.
      loaded: the target, where it is loaded already.

    Raises:
      FileNotFoundError: there is no configuration.
      DrafterError: its model reads no images in a way that drafters know.
    """
    path = pathlib.Path(path)
    if (path / "config.json").is_file():
        config = load_config(path)[1]
        if not isinstance(config, Qwen2_5_VLConfig | Gemma3Config):
            raise DrafterError(
                f"{path} holds {type(config).__name__}, which sees no images; a target is a "
                "Qwen2.5-VL, a Gemma 3 with images, or a model that reads an image as a prefix"
            )
        return config
    return prefix_config(prefix_target(str(path)) if loaded is None else loaded)


@functools.lru_cache(maxsize=1)
def prefix_target(path: str) -> Any:
    """A target that reads an image as a prefix, loaded once (core_jax.decode.target.Target)."""
    from core_jax.decode.target import load_target

    return load_target(path)


def prefix_config(target: Any) -> PrefixConfig:
    """Of a target that reads an image as a prefix (core_jax.decode.target.Target)."""
    blank = np.zeros((64, 64, 3), np.uint8)
    images = target.frontend.prepare([""], [[blank]]).images
    vision = jax.eval_shape(target.decoder.encode_images, target.params, images)
    return PrefixConfig(
        num_embeddings=vision.shape[1], embed_dim=vision.shape[2], vocab_size=target.vocab_size
    )


def load_tower(path: pathlib.Path, **options: Any) -> dict[str, Any]:
    """Parameters of a target's frozen vision tower, without its projector.

    Args:
      path: the target's directory; nothing else of it is read.
      **options: `dtype`, `mesh` and `rules`, as `load_model` takes them.
    """
    family = load_config(path)[0].name
    _, params = load_model(path, only=(TOWERS[family],), **options)
    return next(iter(params.values()))


def load_merger(path: pathlib.Path, **options: Any) -> dict[str, Any]:
    """The merger of a Qwen2.5-VL."""
    _, params = load_model(path, only=(r"visual/merger/.*",), **options)
    return params["visual"]["merger"]


def shared_merger(
    path: pathlib.Path, loaded: Target | None = None, **options: Any
) -> dict[str, Any]:
    """`load_merger`, or the very arrays of a target that is loaded: on a device once."""
    if loaded is None:
        return load_merger(path, **options)
    return loaded.params["visual"]["merger"]


def make_drafter(
    target_dir: str | pathlib.Path,
    lm_dir: str | pathlib.Path,
    *,
    kind: Kind | None = None,
    pooling: int = 1,
    seed: int = 0,
    init_from_target: bool = True,
    execution: Execution | None = None,
    dtype: Any = None,
    mesh: Any = None,
    loaded: Target | None = None,
    limits: Mapping[str, int] | None = None,
) -> DrafterParts:
    """A fresh drafter for a target, from a small language model of its tokenizer's family.

    Args:
      target_dir: hub directory of a Qwen2.5-VL or Gemma 3, or of another target.
      lm_dir: hub directory of a Qwen2 or of a text-only Gemma 3.
      kind: form of the projector; the family's stock one if None.
      pooling: side of the squares of image tokens that it sees as one.
      seed: of the projector.
      init_from_target: start a "merger" from the target's normalisation and first layer.
      execution: backends and rematerialisation.
      dtype: of the language model; as stored if None. The projector is float32.
      mesh: where the language model is placed.
      loaded: the target, where it is loaded already: what is the target's own is not loaded again,
        and its limits of images count.
      limits: of images, where they are not those of the target's processor (massv_jax.pixels).

    Raises:
      BindingError: the language model has another tokenizer.
      DrafterError: the two do not go together.
    """
    target_dir, lm_dir = pathlib.Path(target_dir), pathlib.Path(lm_dir)
    config = DrafterConfig.for_pair(
        target_config(target_dir, loaded), load_config(lm_dir)[1], kind=kind, pooling=pooling
    )
    tokenizer = check_pair(config, target_dir, lm_dir)
    params: dict[str, Any] = {
        PROJECTOR: init_projector(config, jax.random.key(seed)),
        LANGUAGE_MODEL: load_model(lm_dir, dtype=dtype, mesh=mesh)[1],
    }
    if config.kind == "merger" and init_from_target:
        params[PROJECTOR] = copy_merger(params[PROJECTOR], load_merger(target_dir))
    if config.kind == "mlp":
        params[TARGET_MERGER] = shared_merger(target_dir, loaded, dtype=dtype, mesh=mesh)
    drafter = Drafter(config, Execution() if execution is None else execution)
    limits = limits if loaded is None else pixels_of(loaded)
    return DrafterParts(drafter, params, bind(target_dir, tokenizer, limits), lm_dir)


def check_pair(config: DrafterConfig, target_dir: pathlib.Path, lm_dir: pathlib.Path) -> Any:
    """The target's tokenizer, once it is known that the language model's agrees with it."""
    tokenizer = target_tokenizer(target_dir)
    hidden = () if config.image_token_id is None else (config.image_token_id,)
    check_vocabularies(
        tokenizer, load_tokenizer(lm_dir), vocab_size=config.vocab_size, hidden=hidden
    )
    return tokenizer


def target_tokenizer(path: pathlib.Path) -> Any:
    """Of a hub directory, or of a composite one's language model."""
    nested = pathlib.Path(path) / LM_FOLDER
    return load_tokenizer(nested if nested.is_dir() else path)


def language_model_of(config: DrafterConfig) -> Any:
    """The language model alone, as the hub knows it."""
    text = config.text
    if isinstance(text, Gemma3TextConfig):
        return Gemma3ForCausalLM(config=text)
    fields = {f.name: getattr(text, f.name) for f in dataclasses.fields(Qwen2Config)}
    return Qwen2ForCausalLM(config=Qwen2Config(**fields))


def drafter_json(parts: DrafterParts, *, stock: bool, vocab_size: int) -> dict[str, Any]:
    """The content of massv_config.json.

    Args:
      parts: the drafter.
      stock: whether the directory is a hub's own architecture.
      vocab_size: rows of the table that is stored.
    """
    config = parts.drafter.config
    return {
        "format": FORMAT,
        "kind": config.kind,
        "pooling": config.pooling,
        "stock": stock,
        "vocab_size": config.vocab_size,
        "stored_vocab_size": vocab_size,
        "target": dataclasses.asdict(parts.binding),
    }


def save_drafter(path: str | pathlib.Path, parts: DrafterParts, *, dtype: Any = None) -> None:
    """Writes a drafter directory (see the module).

    Args:
      path: created if needed.
      parts: the drafter.
      dtype: of the stored weights; each as it is held if None.
    """
    path = pathlib.Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = parts.drafter.config
    save_model(
        path / LM_FOLDER, language_model_of(config), parts.params[LANGUAGE_MODEL], dtype=dtype
    )
    copy_companions(parts.companions, path / LM_FOLDER)
    if parts.params[PROJECTOR]:
        tensors = (
            (name.replace("/", "."), np.asarray(leaf if dtype is None else leaf.astype(dtype)))
            for name, leaf in flatten(parts.params[PROJECTOR]).items()
        )
        write_tensors(path, tensors, file_name=PROJECTOR_FILE)
    content = drafter_json(parts, stock=False, vocab_size=config.vocab_size)
    (path / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def load_drafter(
    path: str | pathlib.Path,
    target_dir: str | pathlib.Path,
    *,
    execution: Execution | None = None,
    dtype: Any = None,
    mesh: Any = None,
    loaded: Target | None = None,
    limits: Mapping[str, int] | None = None,
) -> DrafterParts:
    """Reads a drafter directory, or an exported stock one.

    Args:
      path: the directory.
      target_dir: the target that it is to draft for.
      execution: backends and rematerialisation.
      dtype: of the parameters; as stored if None.
      mesh: where parameters are placed.
      loaded: the target, where it is loaded already: what is the target's own is not loaded again,
        and its limits of images count.
      limits: of images, where they are not those of the target's processor (massv_jax.pixels).

    Raises:
      FileNotFoundError: it is no drafter directory.
      BindingError: it was made for another target; everything that differs is named.
    """
    path, target_dir = pathlib.Path(path), pathlib.Path(target_dir)
    content = read_config(path)
    limits = limits if loaded is None else pixels_of(loaded)
    found = bind(target_dir, target_tokenizer(target_dir), limits)
    binding = Binding(**content["target"])
    binding.check(found, where=str(path))
    stock = content["stock"]
    lm_dir = path if stock else path / LM_FOLDER
    options = {"dtype": dtype, "mesh": mesh}
    text, params = (
        _load_stock(path, content, options) if stock else _load_own(path, content, options)
    )
    config = DrafterConfig.for_pair(
        target_config(target_dir, loaded), text, kind=content["kind"], pooling=content["pooling"]
    )
    if config.kind == "mlp":
        params[TARGET_MERGER] = shared_merger(target_dir, loaded, **options)
    drafter = Drafter(config, Execution() if execution is None else execution)
    return DrafterParts(drafter, params, binding, lm_dir)


def is_drafter(path: str | pathlib.Path) -> bool:
    """Whether a directory holds a drafter."""
    return (pathlib.Path(path) / CONFIG_FILE).is_file()


def read_config(path: pathlib.Path) -> Mapping[str, Any]:
    """massv_config.json.

    Raises:
      FileNotFoundError: it is missing.
      BindingError: a newer version wrote it.
    """
    file = path / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is missing, so nothing says what {path} was made for; export the drafter with "
            "python -m massv_jax.export"
        )
    content = json.loads(file.read_text())
    if content.get("format") != FORMAT:
        raise BindingError(
            f"{file} has format {content.get('format')}, this version reads {FORMAT}"
        )
    return content


def _load_own(path, content, options) -> tuple[Any, dict[str, Any]]:
    model, params = load_model(path / LM_FOLDER, **options)
    projector = {}
    if content["kind"] != "text":
        reader = TensorReader(path / PROJECTOR_FILE)
        flat = {n.replace(".", "/"): jax.numpy.asarray(reader.read(n)) for n in reader.shapes}
        projector = unflatten(flat)
    return model.config, {PROJECTOR: projector, LANGUAGE_MODEL: params}


def _load_stock(path, content, options) -> tuple[Any, dict[str, Any]]:
    """The drafter's share of a whole model; the table loses the rows that only pad it."""
    where = _HUB_PROJECTORS[content["kind"]]
    patterns = ("/".join(where) + "/.*", "language_model/.*")
    model, params = load_model(path, only=patterns, **options)
    projector = params
    for name in where:
        projector = projector[name]
    text, rows = model.config.text_config, content["vocab_size"]
    language_model = dict(params["language_model"])
    for name in ("embed_tokens", "lm_head"):
        if name in language_model:
            language_model[name] = {"embedding": language_model[name]["embedding"][:rows]}
    text = dataclasses.replace(text, vocab_size=rows)
    return text, {PROJECTOR: projector, LANGUAGE_MODEL: language_model}
