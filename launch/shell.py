"""Shell text from words. Whatever came from outside is quoted; only `Verbatim` is not."""

import shlex
from collections.abc import Iterable, Mapping

_WIDTH = 96


class Verbatim(str):
    """Shell that we wrote ourselves, such as "$node": never text from outside."""


def quote(word: str) -> str:
    """The word as one shell word."""
    return str(word) if isinstance(word, Verbatim) else shlex.quote(word)


def flag(name: str, value: str) -> str:
    """`--name=value`, not yet quoted."""
    return f"--{name}={value}"


def line(*words: str, indent: str = "") -> str:
    """A command, over several lines where it is long."""
    lines, current = [], indent + quote(words[0])
    for word in words[1:]:
        quoted = quote(word)
        if len(current) + len(quoted) + 3 > _WIDTH:
            lines.append(current + " \\")
            current = f"{indent}  {quoted}"
        else:
            current += f" {quoted}"
    return "\n".join([*lines, current])


def exports(variables: Mapping[str, str]) -> list[str]:
    """`export NAME=value` for each."""
    return [f"export {name}={quote(value)}" for name, value in variables.items()]


def need_secrets(names: Iterable[str]) -> list[str]:
    """Stops a script that was started without them."""
    return [f': "${{{name}:?set {name} in the environment}}"' for name in names]


def here_document(path: Verbatim, text: str, *, end: str) -> str:
    """Writes a file exactly as it is.

    Raises:
      ValueError: the text has the line that ends it.
    """
    if end in text.splitlines():
        raise ValueError(f"the text has a line {end!r}")
    return f"cat > {path} <<'{end}'\n{text.rstrip()}\n{end}"
