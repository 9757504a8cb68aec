"""Reading config.json into typed configurations."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any


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
