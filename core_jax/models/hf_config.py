"""Reading config.json into typed configurations."""

import dataclasses
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
