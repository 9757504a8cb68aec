"""What `pip install .[cuda]` would install, where there is no GPU: pip resolves, and stops."""

import importlib.metadata
import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("core_jax", "vlv_jax", "massv_jax", "miniature", "launch")


@pytest.fixture
def sources(tmp_path):
    """A copy: pip writes beside what it builds."""
    for name in PACKAGES:
        leave = shutil.ignore_patterns("checkpoints", "__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=leave)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="jax's CUDA packages are for Linux")
def test_the_cuda_extra_resolves_to_the_plugin_of_this_jax(sources):
    report = sources / "report.json"
    words = ["install", "--dry-run", "--quiet", f"--report={report}", ".[cuda]"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words],
        cwd=sources,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {d.metadata["Name"]: d.version for d in importlib.metadata.distributions()}
    found |= {
        one["metadata"]["name"]: one["metadata"]["version"]
        for one in json.loads(report.read_text())["install"]
    }
    plugins = [name for name in found if re.fullmatch(r"jax-cuda\d+-plugin", name)]
    assert plugins == ["jax-cuda13-plugin"]
    assert found["jax-cuda13-plugin"] == found["jax-cuda13-pjrt"] == found["jax"]
    assert "nvidia-cudnn-cu13" in found  # of the plugin's own extra, which jax asks for
    assert "vlv-massv-jax" in found
