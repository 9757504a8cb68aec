"""What a plan was made of: the lowered program without the places in files that it came from."""

import base64
import binascii
import hashlib
import re
from typing import Any

# What `as_text` may say about sources: `loc(...)` at the end of a line and its definitions.
_LOCATION_LINE = re.compile(r"^#loc.*\n?", re.MULTILINE)
_LOCATION = re.compile(r"\s*loc\((?:[^()]|\([^()]*\))*\)")
# A TPU kernel travels as MLIR bytecode, in a string of a string, and names its sources' files.
_KERNEL = re.compile(r'(\\22body\\22: \\22)([A-Za-z0-9+/=]+)(\\22)')


def without_locations(text: str) -> str:
    """StableHLO text with no source locations in it; a kernel becomes the hash of its text."""
    text = _LOCATION.sub("", _LOCATION_LINE.sub("", text))
    return _KERNEL.sub(lambda m: m.group(1) + _kernel_hash(m.group(2)) + m.group(3), text)


def _kernel_hash(body: str) -> str:
    try:
        text = kernel_text(base64.b64decode(body, validate=True))
    except binascii.Error:
        text = body
    return hashlib.sha256(text.encode()).hexdigest()


def kernel_text(bytecode: bytes) -> str:
    """A TPU kernel's operations, without locations."""
    from jaxlib.mlir import ir
    from jaxlib.mosaic.python import tpu

    context = ir.Context()
    context.allow_unregistered_dialects = True
    tpu.register_dialect(context)
    with context:
        return str(ir.Module.parse(bytecode).operation.get_asm(enable_debug_info=False))


def fingerprint(lowered: Any) -> str:
    """SHA-256 (hex) of a lowered program (`jax.jit(f).lower(...)`).

    It changes with the program, its kernels, its shardings and its mesh; not with line numbers or
    file names.
    """
    return fingerprint_text(lowered.as_text())


def fingerprint_text(text: str) -> str:
    """The same of its text."""
    return hashlib.sha256(without_locations(text).encode()).hexdigest()


def joined(*fingerprints: str) -> str:
    """Of programs that run one after the other."""
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()
