"""Targets made of the networks in core_jax.models: entry points of `core_jax.targets`."""

import os
import pathlib
from typing import Any

import numpy as np

from core_jax.data.gemma3_processor import Gemma3Processor
from core_jax.data.prompts import read_chat_template
from core_jax.data.qwen2_5_vl_processor import Qwen2_5_VLProcessor
from core_jax.decode.adapters import CausalDecoder, TokenPrefix
from core_jax.decode.frontends import (
    Gemma3Frontend,
    Qwen2_5_VLFrontend,
    TextFrontend,
    end_ids,
    load_tokenizer,
    padding_id,
)
from core_jax.decode.gemma3 import Gemma3Decoder, Gemma3Prompt
from core_jax.decode.qwen2_5_vl import ImageTextDecoder
from core_jax.decode.target import Frontend, Target, WindowDecoder
from core_jax.models import load_model
from core_jax.ops.execution import Execution

Path = str | os.PathLike


def token_prefix(ids: np.ndarray, valid: np.ndarray) -> TokenPrefix:
    """A language model's prompt."""
    return TokenPrefix(ids, valid)  # type: ignore[arg-type]


def gemma_prompt(ids: np.ndarray, valid: np.ndarray) -> Gemma3Prompt:
    """A text-only prompt of Gemma 3."""
    return Gemma3Prompt(ids, valid)  # type: ignore[arg-type]


def load_qwen2(path: Path, **options: Any) -> Target:
    """Qwen2 and Qwen2.5: text only. Options are `load_target`'s."""
    model, params = _load(path, **options)
    frontend = TextFrontend(load_tokenizer(path), token_prefix, read_chat_template(_at(path)))
    return _target("qwen2", path, CausalDecoder(model), params, frontend, model.config)


def load_gemma3_text(path: Path, **options: Any) -> Target:
    """Gemma 3 without a vision tower (1B). Options are `load_target`'s."""
    model, params = _load(path, **options)
    frontend = TextFrontend(load_tokenizer(path), gemma_prompt, read_chat_template(_at(path)))
    return _target("gemma3_text", path, Gemma3Decoder(model), params, frontend, model.config)


def load_qwen2_5_vl(path: Path, **options: Any) -> Target:
    """Qwen2.5-VL. Options are `load_target`'s."""
    model, params = _load(path, **options)
    frontend = Qwen2_5_VLFrontend(Qwen2_5_VLProcessor.from_pretrained(path, model.config))
    decoder = ImageTextDecoder(model)
    return _target("qwen2_5_vl", path, decoder, params, frontend, model.config.text_config)


def load_gemma3(path: Path, **options: Any) -> Target:
    """Gemma 3 with images. Options are `load_target`'s."""
    model, params = _load(path, **options)
    frontend = Gemma3Frontend(Gemma3Processor.from_pretrained(path, model.config))
    return _target(
        "gemma3", path, Gemma3Decoder(model), params, frontend, model.config.text_config,
        model.config,
    )  # fmt: skip


def _at(path: Path) -> pathlib.Path:
    return pathlib.Path(path)


def _load(
    path: Path,
    *,
    dtype: Any = None,
    mesh: Any = None,
    rules: Any = None,
    execution: Execution | None = None,
) -> tuple[Any, Any]:
    model, params = load_model(path, dtype=dtype, mesh=mesh, rules=rules)
    return model if execution is None else model.clone(execution=execution), params


def _target(
    model_type: str,
    path: Path,
    decoder: WindowDecoder,
    params: Any,
    frontend: Frontend,
    text_config: Any,
    *configs: Any,
) -> Target:
    ends = end_ids(_at(path), *configs, text_config, frontend.tokenizer)
    return Target(
        model_type=model_type,
        decoder=decoder,
        params=params,
        frontend=frontend,
        vocab_size=text_config.vocab_size,
        max_positions=text_config.max_position_embeddings,
        eos_ids=ends,
        pad_id=padding_id(frontend.tokenizer, ends),
        directory=_at(path),
    )
