"""What the processors of image prompts share: the hub's files beside a tokenizer, and padding."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def read_image_processor_config(path: pathlib.Path) -> Mapping[str, Any]:
    """From processor_config.json (transformers 5) or a file of its own (older ones).

    Raises:
      FileNotFoundError: there is neither.
    """
    nested = path / "processor_config.json"
    if nested.is_file() and "image_processor" in (config := json.loads(nested.read_text())):
        return config["image_processor"]
    file = path / "preprocessor_config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; copy it from the released checkpoint")
    return json.loads(file.read_text())


def read_chat_template(path: pathlib.Path) -> str | None:
    """The processor's own template; transformers prefers it to the tokenizer's."""
    if (file := path / "chat_template.jinja").is_file():
        return file.read_text()
    if (file := path / "chat_template.json").is_file():
        return json.loads(file.read_text())["chat_template"]
    return None


def check_tokens(rows: Sequence[Sequence[int]]) -> None:
    """Raises unless every prompt has a token to continue from.

    Args:
      rows: token ids of each prompt.

    Raises:
      ValueError: naming the rows without one.
    """
    if empty := [i for i, row in enumerate(rows) if not len(row)]:
        raise ValueError(f"prompts of rows {empty} have no tokens; write at least a word")


def pad_prompts(
    rows: Sequence[Sequence[int]],
    *,
    pad_id: int | None,
    length: int | None,
    side: str,
    remedy: str = "raise it",
) -> tuple[np.ndarray, np.ndarray]:
    """Token ids int32 [B, T] and where they are valid, bool [B, T].

    Args:
      rows: token ids of each prompt.
      pad_id: fills the rest; 0 where the tokenizer has none.
      length: T; the longest prompt's if None.
      side: of the padding, "left" or "right".
      remedy: what to do where a prompt is too long, for the message.

    Raises:
      ValueError: another side, or a prompt is longer than `length`.
    """
    if side not in ("left", "right"):
        raise ValueError(f"padding_side is {side!r}; it must be 'left' or 'right'")
    longest = max(map(len, rows))
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"a prompt of {longest} tokens is longer than {length}; {remedy}")
    ids = np.full((len(rows), length), 0 if pad_id is None else pad_id, np.int32)
    valid = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], valid[i, place] = row, True
    return ids, valid
