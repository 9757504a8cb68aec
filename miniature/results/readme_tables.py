"""Numbers of a report as tables of the README."""

from collections.abc import Mapping, Sequence
from typing import Any

from core_jax.evaluation.report_text import interval_text, number_text


def found(tree: Mapping[str, Any], path: str) -> Any:
    """What stands at a dotted path; None where nothing does."""
    for name in path.split("."):
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def with_interval(value: Mapping[str, Any], *, sign: bool = False) -> str:
    """A number with its interval, for people; `sign` shows a plus as well."""
    plus = "+" if sign and value["value"] > 0 else ""
    return f"{plus}{number_text(value['value'])} {interval_text(value['interval'])}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a head; empty without any."""
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
