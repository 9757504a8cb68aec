"""A drafter as a directory for others.

"merger" and "gemma" without extra pooling become stock hub directories: tower, projector and
language model in the released layout, with the target's processor, template and generation
settings. transformers loads them, gives the same logits, and takes them as `assistant_model`. No
hub architecture computes the other kinds; they become MASSV directories (massv_jax.loading), and
their cards say so.
"""

import dataclasses
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from core_jax.models import save_model
from core_jax.models.gemma3 import Gemma3ForConditionalGeneration
from core_jax.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from massv_jax.card import drafter_card
from massv_jax.companions import copy_companions, load_tokenizer
from massv_jax.drafter import LANGUAGE_MODEL, PROJECTOR
from massv_jax.drafter_config import DrafterConfig
from massv_jax.loading import (
    CONFIG_FILE,
    DrafterParts,
    drafter_json,
    is_drafter,
    load_tower,
    save_drafter,
)


class ExportError(ValueError):
    """A drafter cannot be written there; the message has the remedy."""


def export_drafter(
    parts: DrafterParts,
    out: str | pathlib.Path,
    target_dir: str | pathlib.Path,
    *,
    pad_vocab_to_target: bool = True,
    dtype: Any = None,
    facts: Mapping[str, Any] | None = None,
    report: Mapping[str, Any] | None = None,
) -> bool:
    """Writes the directory; it appears under its name only when it is whole.

    Args:
      parts: the drafter.
      out: a new directory, or an earlier export, which is replaced.
      target_dir: its target, of which the tower and the processor are copied.
      pad_vocab_to_target: give the table as many rows as the target's (transformers refuses an
        assistant with another number). They repeat a row that no text uses, whose logit training
        has kept low: the last one without a token, or that of an `<unusedN>`.
      dtype: of the stored weights; each as it is held if None.
      facts: what else the card lists, such as the step.
      report: the content of report.json for the card.

    Returns:
      Whether it is a stock hub directory.

    Raises:
      ExportError: `out` holds something else.
    """
    out, target_dir = pathlib.Path(out), pathlib.Path(target_dir)
    if out.exists() and not is_drafter(out) and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} is there and is no drafter; name another directory")
    stock = parts.drafter.config.is_stock
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = pathlib.Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}-writing-"))
    try:
        if stock:
            _write_stock(parts, scratch, target_dir, pad_vocab_to_target, dtype)
        else:
            save_drafter(scratch, parts, dtype=dtype)
        card = drafter_card(parts, stock=stock, facts=facts or {}, report=report or {})
        (scratch / "README.md").write_text(card, encoding="utf-8")
        scratch.chmod(0o755)  # mkdtemp's are private
        if out.exists():
            shutil.rmtree(out)
        scratch.rename(out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return stock


def _write_stock(
    parts: DrafterParts, out: pathlib.Path, target_dir: pathlib.Path, pad: bool, dtype: Any
) -> None:
    config = parts.drafter.config
    rows = max(config.target_vocab_size, config.vocab_size) if pad else config.vocab_size
    language_model = pad_vocabulary(
        parts.params[LANGUAGE_MODEL], rows, like=unlikely_row(parts.companions, config.vocab_size)
    )
    save_model(
        out, *whole_model(config, parts.params[PROJECTOR], language_model, load_tower(target_dir)),
        dtype=dtype,
    )  # fmt: skip
    copy_companions(target_dir, out)
    content = drafter_json(parts, stock=True, vocab_size=rows)
    (out / CONFIG_FILE).write_text(json.dumps(content, indent=2) + "\n")


def whole_model(
    config: DrafterConfig, projector: Any, language_model: Any, tower: Any
) -> tuple[Any, dict[str, Any]]:
    """The hub's model of a stock drafter, and its parameters.

    Args:
      config: of the drafter; its language model's table may have been padded since.
      projector: its parameters.
      language_model: its parameters.
      tower: the target's.
    """
    rows = language_model["embed_tokens"]["embedding"].shape[0]
    whole = config.whole
    whole = dataclasses.replace(
        whole, text_config=dataclasses.replace(whole.text_config, vocab_size=rows)
    )
    if config.kind == "gemma":
        params = {"vision_tower": tower, "multi_modal_projector": projector}
        model: Any = Gemma3ForConditionalGeneration(config=whole)
    else:
        params = {"visual": {**tower, "merger": projector}}
        model = Qwen2_5_VLForConditionalGeneration(config=whole)
    return model, {**params, "language_model": language_model}


def pad_vocabulary(language_model: Mapping[str, Any], rows: int, *, like: int) -> dict[str, Any]:
    """A language model with `rows` rows in its table and head.

    With a tied head a zero row has logit 0, which is more than most real tokens have. So new rows
    repeat one that has learned to be unlikely.

    Args:
      language_model: parameters.
      rows: at least as many as there are.
      like: the row that is repeated.
    """
    padded = dict(language_model)
    for name in ("embed_tokens", "lm_head"):
        if name not in language_model:
            continue
        table = language_model[name]["embedding"]
        more = rows - table.shape[0]
        if more <= 0:
            continue
        rows_more = jnp.repeat(table[like : like + 1], more, axis=0)
        # Where the table lies: the host needs no copy of it.
        padded[name] = {"embedding": jnp.concatenate([table, rows_more])}
    return padded


def unlikely_row(companions: pathlib.Path, rows: int) -> int:
    """A row that no text has: the last one without a token, that of a token kept free, or padding.

    Raises:
      ExportError: there is none.
    """
    tokenizer = load_tokenizer(companions)
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) < rows - 1:
        return rows - 1
    free = [i for token, i in vocabulary.items() if re.fullmatch(r"<unused\d+>", token)]
    free = free or [tokenizer.pad_token_id]
    if free[-1] is None:
        raise ExportError(
            f"{companions}: no row of the table is free of text, so none can fill it up to the "
            "target's; give --nopad_vocab_to_target (transformers then refuses it as an assistant)"
        )
    return max(free)
