import pytest

from core_jax.ops.execution import Execution


def test_unroll_is_at_least_one():
    with pytest.raises(ValueError, match=r"execution.unroll is 0; it must be at least 1"):
        Execution(unroll=0)
