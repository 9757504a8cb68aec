"""The stand-ins that are shipped load in transformers and diffusers, and say the same there."""

import pytest

from core_jax import verify
from miniature.standins import CHECKPOINTS

SHIPPED = sorted(path.name for path in CHECKPOINTS.iterdir() if path.is_dir())


def test_there_are_some():
    assert {"stable-diffusion", "florence2", "qwen2.5-medium"} <= set(SHIPPED)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_outputs_are_pytorch_s(name, capsys):
    pytest.importorskip("torch")
    assert verify.main([str(CHECKPOINTS / name)]) == 0
    assert "DIFFERENT" not in capsys.readouterr().out
