"""Reading config.json into typed configurations."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class ModelConfigError(ValueError):
    """A JSON file of a hub directory is broken, or asks for what is not supported here."""


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The content of a JSON file of a hub directory.

    Raises:
      ModelConfigError: it is not a JSON object.
    """
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ModelConfigError(f"{file} is not JSON ({error}); download it again") from error
    if not isinstance(content, dict):
        raise ModelConfigError(f"{file} holds no JSON object; download it again")
    return content


def build_config(build: Callable[[dict[str, Any]], T], raw: dict[str, Any], file: Any) -> T:
    """What `build` makes of a file's content.

    Args:
      build: a configuration's `from_hf`.
      raw: the content.
      file: its name, for messages.

    Raises:
      ModelConfigError: values are missing, impossible, or not supported here.
    """
    try:
        return build(raw)
    except KeyError as error:
        raise ModelConfigError(f"{file} lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise ModelConfigError(f"{file}: {error}") from error


def pick_fields(cls: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config.json that are fields of the dataclass `cls`.

    Lists become tuples, so that configurations can be hashed. A null means the default.
    """
    names = {f.name for f in dataclasses.fields(cls)}
    return {k: _freeze(v) for k, v in config.items() if k in names and v is not None}


def _freeze(value: Any) -> Any:
    return tuple(_freeze(v) for v in value) if isinstance(value, list | tuple) else value


def refuse_unsupported(
    what: str,
    config: Mapping[str, Any],
    known: set[str],
    must_be: Mapping[str, Any],
    without_effect: frozenset[str],
) -> None:
    """Raises if a diffusers config.json asks for something that we do not implement.

    Args:
      what: name for the message.
      config: the file's content.
      known: fields that we implement.
      must_be: fields that we do not, and the value at which they do nothing.
      without_effect: fields that change nothing in what we implement.

    Raises:
      ValueError: naming every such field. A field that nobody knows may be null or false only.
    """
    problems = []
    for name, value in config.items():
        if name.startswith("_") or name in known or name in without_effect:
            continue
        if name not in must_be:
            if value is not None and value is not False:
                problems.append(f"{name} = {json.dumps(value)} (unknown field)")
        elif value != must_be[name]:
            problems.append(f"{name} = {json.dumps(value)} (only {json.dumps(must_be[name])})")
    if problems:
        raise ValueError(f"{what}: not supported: {'; '.join(problems)}")
