"""A hub of tiny networks, built once a session."""

import pytest

from tests.vlv.hub import TinyHub, write_hub


@pytest.fixture(scope="session")
def tiny_hub(tmp_path_factory) -> TinyHub:
    """Read only."""
    return write_hub(tmp_path_factory.mktemp("hub"))
