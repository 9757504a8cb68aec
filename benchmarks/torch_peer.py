"""What the peers' processes share. Imported by them only, and torch only inside."""

import importlib
import os
from typing import Any

import numpy as np

from benchmarks.alternate import UnavailableError

INSTALL = "pip install torch==2.13.0, then pip install 'diffusers>=0.42' 'transformers>=5.20'"


def load_torch(threads: int = 0, *, cuda: bool = False) -> Any:
    """The torch module, set to so many threads (0: its own default).

    Raises:
      UnavailableError: it is not installed, or lacks CUDA where that is asked for.
    """
    try:
        import torch
    except ImportError as error:
        raise UnavailableError(f"PyTorch is not installed ({error}); {INSTALL}") from error
    if cuda and not torch.cuda.is_available():
        raise UnavailableError("this PyTorch has no CUDA device; install a CUDA build of torch")
    if threads:
        torch.set_num_threads(min(threads, os.cpu_count() or threads))
    return torch


def load_class(library: str, name: str) -> Any:
    """A class of diffusers or transformers.

    Raises:
      UnavailableError: the library is missing or has no such class.
    """
    try:
        return getattr(importlib.import_module(library), name)
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"{library}.{name} is not available ({error}); {INSTALL}") from error


def tensor(array: np.ndarray, dtype: Any = None, device: str = "cpu") -> Any:
    """A tensor; images and latents [B, h, w, c] become channels first."""
    import torch

    array = array.transpose(0, 3, 1, 2) if array.ndim == 4 else array
    array = array.astype(np.int64) if array.dtype.kind == "i" else array
    floating = array.dtype.kind == "f"
    return torch.tensor(np.array(array), dtype=dtype if floating else None, device=device)


def to_numpy(x: Any) -> np.ndarray:
    """Float32; [B, c, h, w] becomes channels last."""
    array = x.detach().float().cpu().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array
