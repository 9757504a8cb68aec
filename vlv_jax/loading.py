"""From a config's paths, or an exported directory, to networks and parameters."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from core_jax.config import ConfigError
from core_jax.data.processors import ImageProcessor
from core_jax.diffusion.schedule import NoiseSchedule
from core_jax.models import load_model
from core_jax.models.hf_config import build_config, read_json
from core_jax.partition import cast_floating
from vlv_jax import networks as names
from vlv_jax.bridge import Bridge, CaptionProjector, init_bridge, init_projector
from vlv_jax.experiment import ModelConfig
from vlv_jax.networks import Networks


@dataclasses.dataclass(frozen=True)
class Pieces:
    """What is on the host beside the networks.

    Attributes:
      processor: Florence-2's image preprocessing.
      text_tokenizer: of the diffusion pipeline.
      lm_tokenizer: of the language model; None in stage 1.
    """

    processor: ImageProcessor
    text_tokenizer: PreTrainedTokenizerBase
    lm_tokenizer: PreTrainedTokenizerBase | None


def load_tokenizer(path: pathlib.Path) -> PreTrainedTokenizerBase:
    """A tokenizer from a local directory; no code of the repository is run.

    Raises:
      FileNotFoundError: the directory has no tokenizer.
    """
    if not any(
        (path / f).is_file() for f in ("tokenizer.json", "vocab.json", "tokenizer_config.json")
    ):
        raise FileNotFoundError(f"{path} has no tokenizer (tokenizer.json or vocab.json)")
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def load_processor(path: pathlib.Path) -> ImageProcessor:
    """Florence-2's preprocessor_config.json.

    Raises:
      FileNotFoundError: it is missing.
      ModelConfigError: it is broken, or asks for what is not supported.
    """
    file = path / "preprocessor_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; copy it from the hub repository")
    config = read_json(file)
    # A processor file of the whole Florence-2 nests the image processor.
    return build_config(ImageProcessor.from_hf, config.get("image_processor", config), file)


def pad_empty(tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[int, ...]:
    """The empty caption as the diffusion pipeline feeds it: BOS, EOS, padding."""
    return tuple(text_ids(tokenizer, [""], length)[0])


def text_ids(
    tokenizer: PreTrainedTokenizerBase, captions: list[str], length: int
) -> list[list[int]]:
    """Captions as the diffusion pipeline tokenises them: cut and padded to `length`."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, max_length=length)
    return encoded["input_ids"]


def load_networks(
    config: ModelConfig,
    *,
    with_decoder: bool = True,
    with_language_model: bool | None = None,
    seed: int = 0,
    mesh: Any = None,
) -> tuple[Networks, dict[str, Any], Pieces]:
    """Networks with the hub's weights, and fresh ones for what VLV adds.

    Args:
      config: paths and precision.
      with_decoder: also UNet and VAE.
      with_language_model: also psi and the language model; by default where one is named.
      seed: of the fresh parameters.
      mesh: where the hub's weights are placed, sharded by size.

    Returns:
      networks, parameters by name (vlv_jax.networks), and the host's pieces. All are float32 as
      far as stored so; `cast_frozen` comes later, when it is known what is trained.
    """
    florence_dir, pipeline = pathlib.Path(config.florence2), pathlib.Path(config.diffusion)
    with_lm = bool(config.language_model) if with_language_model is None else with_language_model
    parts: dict[str, tuple[Any, Any]] = {
        names.FLORENCE2: load_model(florence_dir, mesh=mesh),
        names.TEXT_ENCODER: load_model(pipeline / "text_encoder", mesh=mesh),
    }
    if with_decoder:
        parts[names.UNET] = load_model(pipeline / "unet", mesh=mesh)
        parts[names.VAE] = load_model(pipeline / "vae", mesh=mesh)
    if with_lm:
        parts[names.LANGUAGE_MODEL] = load_model(config.language_model, mesh=mesh)
    params = {n: p for n, (_, p) in parts.items()}
    tokenizer = load_tokenizer(florence_dir)
    text_tokenizer = load_tokenizer(pipeline / "tokenizer")
    processor = load_processor(florence_dir)
    text_length = parts[names.TEXT_ENCODER][0].config.max_position_embeddings
    networks = compose(
        config,
        {n: m for n, (m, _) in parts.items()},
        schedule=load_schedule(pipeline),
        prompt_ids=tuple(tokenizer(config.task_prompt)["input_ids"]),
        empty_ids=pad_empty(text_tokenizer, text_length),
        image_mean=tuple(processor.mean),
        image_std=tuple(processor.std),
    )
    params |= init_added(networks, seed)
    lm_tokenizer = load_tokenizer(pathlib.Path(config.language_model)) if with_lm else None
    return networks, params, Pieces(processor, text_tokenizer, lm_tokenizer)


def compose(config: ModelConfig, modules: Mapping[str, Any], **constants: Any) -> Networks:
    """The pretrained networks with what VLV adds between them; no parameters.

    Args:
      config: sizes and execution.
      modules: by name (vlv_jax.networks).
      **constants: the other fields of `Networks`.

    Raises:
      ConfigError: more queries than the text encoder has positions.
    """
    modules = {n: m.clone(execution=config.execution) for n, m in modules.items()}
    text = modules[names.TEXT_ENCODER].config
    if config.num_queries > text.max_position_embeddings:
        raise ConfigError(
            f"model.num_queries is {config.num_queries}, but the text encoder has only "
            f"{text.max_position_embeddings} positions"
        )
    lm = modules.get(names.LANGUAGE_MODEL)
    return Networks(
        florence2=modules[names.FLORENCE2],
        bridge=Bridge(
            config.num_queries,
            modules[names.FLORENCE2].config.text_config.d_model,
            text.hidden_size,
        ),
        text_encoder=modules[names.TEXT_ENCODER],
        unet=modules.get(names.UNET),
        vae=modules.get(names.VAE),
        projector=None if lm is None else CaptionProjector(lm.config.hidden_size),
        language_model=lm,
        **constants,
    )


def init_added(networks: Networks, seed: int) -> dict[str, Any]:
    """Fresh parameters of what VLV adds to the pretrained networks."""
    key_bridge, key_projector = jax.random.split(jax.random.key(seed))
    added = {names.BRIDGE: init_bridge(networks.bridge, key_bridge)}
    if networks.projector is not None:
        width = networks.text_encoder.config.hidden_size
        added[names.PROJECTOR] = init_projector(networks.projector, width, key_projector)
    return added


def load_schedule(pipeline: pathlib.Path) -> NoiseSchedule:
    """The pipeline's scheduler_config.json, whichever scheduler it names."""
    file = pipeline / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; the pipeline directory is incomplete")
    return build_config(NoiseSchedule.from_hf, read_json(file), file)


def cast_frozen(frozen: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Frozen parameters in the precision they are held in; the VAE has its own."""
    return {
        name: cast_floating(tree, config.vae_dtype if name == names.VAE else config.frozen_dtype)
        for name, tree in frozen.items()
    }
