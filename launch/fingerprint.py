"""What a plan was made of: the lowered program without the places in files that it came from."""

import hashlib
import re
from typing import Any

# What `as_text` may say about sources: `loc(...)` at the end of a line and its definitions.
_LOCATION_LINE = re.compile(r"^#loc.*\n?", re.MULTILINE)
_LOCATION = re.compile(r"\s*loc\((?:[^()]|\([^()]*\))*\)")


def without_locations(text: str) -> str:
    """StableHLO text with no source locations in it."""
    return _LOCATION.sub("", _LOCATION_LINE.sub("", text))


def fingerprint(lowered: Any) -> str:
    """SHA-256 (hex) of a lowered program (`jax.jit(f).lower(...)`).

    It changes with the program, its shardings and its mesh; not with line numbers or file names.
    """
    return fingerprint_text(lowered.as_text())


def fingerprint_text(text: str) -> str:
    """The same of its text."""
    return hashlib.sha256(without_locations(text).encode()).hexdigest()


def joined(*fingerprints: str) -> str:
    """Of programs that run one after the other."""
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()
