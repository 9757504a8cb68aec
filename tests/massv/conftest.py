"""Tiny targets and language models, written once a session."""

import pytest

from tests.massv import tiny_pairs


@pytest.fixture(scope="session")
def qwen_pair(tmp_path_factory) -> tiny_pairs.Pair:
    """A Qwen2.5-VL and a tied Qwen2; read only."""
    return tiny_pairs.write_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def gemma_pair(tmp_path_factory) -> tiny_pairs.Pair:
    """A Gemma 3 and a text-only one; read only."""
    return tiny_pairs.write_gemma(tmp_path_factory.mktemp("gemma"))
