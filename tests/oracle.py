"""What parity tests share: randomised PyTorch twins and one measure of difference."""

import numpy as np
import pytest


def randomize(model, seed=0, std=0.08):
    """Adds noise to every parameter: fresh biases are 0 and norms 1, which hides errors."""
    torch = pytest.importorskip("torch")

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in model.named_parameters():
            p.add_(torch.randn(p.shape, generator=generator) * (std if p.ndim < 2 else std * 0.5))
    return model


def relative_error(ours, theirs) -> float:
    """max|a-b| / max|b|."""
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert a.shape == b.shape, f"{a.shape} is not {b.shape}"
    return float(np.abs(a - b).max() / np.abs(b).max())


def close(ours, theirs, tolerance: float) -> bool:
    """Whether the relative error is within the tolerance; prints it where it is not."""
    error = relative_error(ours, theirs)
    if not error <= tolerance:
        print(f"relative error {error:.3g} exceeds {tolerance}")
    return error <= tolerance
