"""Every comparison runs at its tiny size, and both sides compute the same thing."""

import importlib
import subprocess
import sys

import pytest

from benchmarks.alternate import OURS, PEER
from benchmarks.provenance import ROOT
from tests.benchmarks.in_process import run_tiny

TOLERANCE = 1e-4
MODULES = {
    "unet": {"forward", "forward+backward"},
    "generation": {"greedy"},
    "davit": {"tower"},
    "images": {"one thread", "batches"},
    "speculative": {"plain", "speculative", "speculative, peer's image hidden"},
}


# Compiling and importing take longer than ten seconds for these.
SLOW = ("unet", "davit", "speculative")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in MODULES]
)
def test_tiny_form_compares_the_same_thing(name, tmp_path):
    pytest.importorskip("torch")
    if name == "unet":
        pytest.importorskip("diffusers")
    benchmark = importlib.import_module(f"benchmarks.{name}").BENCHMARK
    result = run_tiny(benchmark, tmp_path)
    assert set(result["measures"]) == MODULES[name]
    for measure in result["measures"].values():
        assert {OURS, PEER, "ratio"} <= set(measure)
    assert set(result["differences"]) == MODULES[name]
    assert max(result["differences"].values()) < TOLERANCE


@pytest.mark.slow
def test_windows_of_every_length_are_timed(tmp_path):
    from benchmarks.windows import BENCHMARK

    result = run_tiny(BENCHMARK, tmp_path)
    assert set(result["measures"]) == {"batch 2, plain", "batch 2, gamma 2"}
    assert 1 <= result["facts"]["batch 2, gamma 2: tokens a round"] <= 3
    assert result["facts"]["profile: verify_ms"] > 0


def test_tokens_are_not_all_the_same(tmp_path):
    from benchmarks.generation import BENCHMARK

    assert run_tiny(BENCHMARK, tmp_path, "--no-peer")["facts"]["distinct_tokens"] >= 10


@pytest.mark.parametrize("name", ["unet", "generation", "davit"])
def test_every_size_is_an_architecture(name):
    module = importlib.import_module(f"benchmarks.{name}")
    make = {"unet": "unet_config", "generation": "qwen2_config", "davit": "florence2_config"}
    for size in module.SIZES:
        assert getattr(module, make[name])(size).to_hf()


def test_middle_unet_has_the_size_that_the_docs_say():
    from benchmarks.unet import unet_config
    from core_jax.models.unet import FAMILY, UNet2DConditionModel
    from core_jax.partition import count_parameters

    model = UNet2DConditionModel(config=unet_config("middle"))
    assert abs(count_parameters(FAMILY.abstract_params(model)) / 1e6 - 34.3) < 0.1


@pytest.mark.slow
def test_the_command_itself(tmp_path):
    command = [sys.executable, "-m", "benchmarks.generation", "--size=tiny", "--rounds=1"]
    done = subprocess.run(
        [*command, "--repeats=1", "--no-peer", f"--results={tmp_path}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "generation-tiny-float32-batch1" in done.stdout
    assert (tmp_path / "generation-tiny-float32-batch1.json").is_file()
