"""From an ml_collections config to typed dataclasses, once, in `main`."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, cast, get_args, get_origin

T = TypeVar("T")


class ConfigError(ValueError):
    """A config value is unknown, missing, of the wrong type, or does not fit what it is used with.

    The message names it. Commands show it as one line.
    """


def to_dataclass(cls: type[T], config: Mapping[str, Any], *, path: str = "config") -> T:
    """Builds a (nested) frozen dataclass from a mapping.

    Args:
      cls: a dataclass; nested dataclass fields are built from nested mappings.
      config: ConfigDict or plain mapping.
      path: where we are, for messages.

    Raises:
      ConfigError: an unknown key (with the nearest name), a missing one, a wrong type, or a value
        that the dataclass itself refuses.
    """
    fields = {f.name: f for f in dataclasses.fields(cast(Any, cls))}
    hints = typing.get_type_hints(cls)
    for key in config:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {path}.{near[0]}?" if near else ""
            raise ConfigError(f"{path}.{key} is unknown{hint} (known: {', '.join(fields)})")
    values = {k: _convert(hints[k], config[k], f"{path}.{k}") for k in config}
    missing = [
        name
        for name, f in fields.items()
        if name not in values
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}")
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin = get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = get_args(hint)
        if (value is None or value == "") and type(None) in options:
            return None  # a command line can say "" and cannot say None
        errors = []
        for option in options:
            if option is type(None):
                continue
            try:
                return _convert(option, value, path)
            except ConfigError as error:
                errors.append(str(error))
        raise ConfigError(errors[0])
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ConfigError(f"{path} must be a group of values, not {value!r}")
        return to_dataclass(cast(type, hint), dict(value.items()), path=path)
    if origin is tuple:
        return _tuple(hint, value, path)
    if origin in (dict, Mapping) or hint is dict or getattr(origin, "__name__", "") == "Mapping":
        return {k: v for k, v in value.items() if v is not None}
    if origin is typing.Literal:
        if value not in get_args(hint):
            raise ConfigError(f"{path} is {value!r}; it must be one of {get_args(hint)}")
        return value
    return _scalar(hint, value, path)


def _tuple(hint: Any, value: Any, path: str) -> tuple:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ConfigError(f"{path} must be a list, not {value!r}")
    args = get_args(hint)
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], v, f"{path}[{i}]") for i, v in enumerate(value))
    if len(args) != len(value):
        raise ConfigError(f"{path} must have {len(args)} values, not {len(value)}")
    return tuple(_convert(a, v, path) for a, v in zip(args, value, strict=True))


def _scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and (
        not isinstance(value, hint) or (hint is int and isinstance(value, bool))
    ):
        raise ConfigError(f"{path} must be {hint.__name__}, not {value!r}")
    return value
