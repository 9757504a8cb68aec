"""The GPU script at its tiny size, on CPU devices."""

import jax
import pytest

from benchmarks import gpu
from benchmarks.alternate import OURS
from tests.benchmarks.in_process import run_tiny


@pytest.mark.slow
def test_unet(tmp_path):
    result = run_tiny(gpu.BENCHMARK, tmp_path, "--only=unet", "--no-peer")
    assert set(result["measures"]) == {"unet forward", "unet forward+backward"}
    facts = result["facts"]
    assert facts["unet forward TFLOP/s a device"] > 0
    assert facts["unet forward MFU"] is None  # a CPU's peak is not known


def test_generation(tmp_path):
    result = run_tiny(gpu.BENCHMARK, tmp_path, "--only=generation", "--no-peer")
    assert {"greedy tiny", "greedy tiny, half"} == set(result["measures"])
    assert result["measures"]["greedy tiny"]["rate"]["unit"] == "tokens/s"
    assert OURS in result["measures"]["greedy tiny"]


def test_the_peer_needs_cuda(tmp_path):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run_tiny(gpu.BENCHMARK, tmp_path, "--only=generation")
    assert "CUDA" in result["peer_unavailable"]


@pytest.mark.slow
def test_stage1_step(tmp_path):
    result = run_tiny(gpu.BENCHMARK, tmp_path, "--only=stage1", "--no-peer")
    facts = result["facts"]
    assert set(result["measures"]) == {gpu.STAGE1}
    assert facts["stage-1 step batch"] == jax.device_count()
    assert facts["stage-1 step TFLOP"] > 0
    assert facts["stage-1 step images/s"] > 0
    # Adam's moments are twice the trained parameters, all of them float32, and the step's number.
    held = facts["stage-1 step GB of state"] * 1e9
    assert abs(held - 12 * facts["stage-1 step trained parameters"]) < 64


def test_unknown_parts_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="unets"):
        run_tiny(gpu.BENCHMARK, tmp_path, "--only=unets")


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA L40S", 0.864e12),
        ("cpu", None),
    ],
)
def test_bandwidth(kind, rate):
    assert gpu.bandwidth(kind) == rate


def test_bytes_of_a_decoding_step():
    from benchmarks.generation import qwen2_config
    from benchmarks.random_weights import random_params
    from core_jax.models.qwen2 import Qwen2ForCausalLM

    config = qwen2_config("tiny")  # 2 layers, 1 key-value head of 8, an untied table of 64 x 16
    params = random_params(Qwen2ForCausalLM(config=config))
    weights = 4 * sum(x.size for x in jax.tree.leaves(params)) - 4 * 64 * 16
    assert gpu.bytes_read(config, params, rows=3, slots=10) == weights + 4 * 2 * 2 * 3 * 10 * 8


@pytest.mark.slow
def test_speculative_decoding(tmp_path):
    from benchmarks import gpu_decoding

    result = run_tiny(gpu_decoding.BENCHMARK, tmp_path, "--no-peer", "--gammas", "2", "5")
    facts = result["facts"]
    for part in ("decoding", "distillation"):
        planned = facts[f"{part}: GB of arguments, planned"]
        assert facts[f"{part}: GB of arguments"] == planned
    # Greedy drafts of networks that agree: 7 tokens after the prompt's in 3 rounds, and in 2.
    assert facts["gamma 2, temperature 0: tokens a round"] == pytest.approx(7 / 3)
    assert facts["gamma 5, temperature 0: tokens a round"] == pytest.approx(7 / 2)
    assert facts["distillation: tokens/s"] > 0
