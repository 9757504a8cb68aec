"""`python -m core_jax.verify`: agrees on good checkpoints, and says so when they are not."""

import json
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core_jax import verify
from core_jax.pytorch_twins import NotComparableError, require_torch
from tests.oracle import randomize

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("verify") / "qwen2"
    randomize(transformers.Qwen2ForCausalLM(config)).save_pretrained(path)
    return path


def _altered(path, target, name, amount=0.5):
    """A copy of `path` with one element of one tensor changed."""
    shutil.copytree(path, target)
    tensors = load_file(target / "model.safetensors")
    tensors[name] = np.array(tensors[name])
    tensors[name].flat[3] += amount
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_a_good_checkpoint_passes_and_one_altered_weight_fails(qwen2, tmp_path, capsys):
    assert verify.main([str(qwen2)]) == 0
    assert "logits" in capsys.readouterr().out
    other = _altered(qwen2, tmp_path / "other", "model.layers.0.mlp.down_proj.weight")
    assert verify.main([str(qwen2), "--reference", str(other), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is False
    (output,) = report["outputs"]
    assert output["shape"] == [2, 64, 50]
    assert output["relative"] > 100 * verify.TOLERANCE
    # Both sides read the altered copy: nothing is wrong with it.
    assert verify.main([str(other), "--seed", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert report["outputs"][0]["relative"] < 1e-5


def test_a_tensor_that_pytorch_would_leave_random_is_an_error(qwen2, tmp_path, capsys):
    other = tmp_path / "other"
    shutil.copytree(qwen2, other)
    tensors = load_file(other / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert verify.main([str(qwen2), "--reference", str(other)]) == 2
    assert "model.norm.weight" in capsys.readouterr().err
    # Here it is an error as well, of our own loader.
    assert verify.main([str(other)]) == 2
    assert "missing (1)" in capsys.readouterr().err


def test_a_pipeline_is_compared_part_by_part(qwen2, tmp_path, capsys):
    shutil.copytree(qwen2, tmp_path / "text_model")
    (tmp_path / "safety").mkdir()
    (tmp_path / "safety" / "config.json").write_text('{"architectures": ["SafetyChecker"]}')
    (tmp_path / "scheduler").mkdir()
    index = {
        "_class_name": "SomePipeline",
        "text_model": ["transformers", "Qwen2ForCausalLM"],
        "safety": ["transformers", "SafetyChecker"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unused": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert verify.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "text_model/logits" in out
    assert "not compared: scheduler" in out
    assert "SafetyChecker" in out


def test_what_is_not_supported_is_said(tmp_path, capsys):
    assert verify.main([str(tmp_path)]) == 2
    assert "config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert verify.main([str(tmp_path), "--json"]) == 2
    report = json.loads(capsys.readouterr().out)
    assert "LlamaForCausalLM" in report["errors"][0]
    assert "Qwen2ForCausalLM" in report["errors"][0]


def test_without_pytorch_the_remedy_is_printed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(NotComparableError, match="pip install torch"):
        require_torch()
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen2ForCausalLM"]}')
    assert verify.main([str(tmp_path)]) == 2
    assert "pip install torch" in capsys.readouterr().err


def test_outputs_that_prove_nothing_do_not_pass():
    ones, zeros = {"x": np.ones(3)}, {"x": np.zeros(3)}
    assert verify.compare(ones, ones, 1e-4)[0].passed
    assert not verify.compare(zeros, zeros, 1e-4)[0].passed
    broken = {"x": np.array([1.0, np.nan, 1.0])}
    assert not verify.compare(broken, ones, 1e-4)[0].passed
    assert not verify.compare(ones, broken, 1e-4)[0].passed
    with pytest.raises(ValueError, match="x: shape"):
        verify.compare({"x": np.ones(4)}, ones, 1e-4)


@pytest.mark.slow
def test_the_command_from_a_shell(qwen2):
    run = subprocess.run(
        [sys.executable, "-m", "core_jax.verify", str(qwen2)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "every output is within the tolerance" in run.stdout


@pytest.mark.slow
def test_florence2_as_microsoft_publishes_it(tmp_path):
    from tests.core.models.florence2_twin import make_twin
    from tests.core.models.test_florence2_weights import _copy, _remote_config, _remote_name

    def rename(tensors):
        remote = {_remote_name(n): t for n, t in tensors.items()}
        remote["image_projection"] = remote["image_projection"].T
        return remote

    twin = make_twin("tall")
    path = _copy(twin, tmp_path, rename)
    config = json.loads((twin.path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(_remote_config(config)))
    report = verify.verify(path)
    assert not report.errors
    assert [d.output for d in report.differences] == ["vision_features", "image_tokens", "logits"]
    assert all(d.relative < 1e-5 for d in report.differences)
    # A control: the original's vision features are not those of an altered tower.
    other = _altered(twin.path, tmp_path / "other", "model.vision_tower.convs.0.conv.weight", 5.0)
    (worst,) = [
        d for d in verify.verify(path, reference=other).differences if d.output == "logits"
    ]
    assert worst.relative > 1e-3
