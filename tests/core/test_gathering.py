"""Work in turns without other processes; with them: tests/vlv and tests/massv/test_processes.py."""

import jax
import numpy as np
import pytest

from core_jax import gathering
from core_jax.gathering import fetch, first_writes, in_turns, own_share


def test_alone_everything_is_ones_own(tmp_path):
    assert in_turns(own_share(range(5)), 5, lambda i: i * i) == [0, 1, 4, 9, 16]
    with pytest.raises(ZeroDivisionError):
        in_turns(own_share([0]), 1, lambda i: 1 / i)
    with first_writes(tmp_path) as place:
        assert place == tmp_path
    np.testing.assert_array_equal(fetch({"x": jax.numpy.arange(3)})["x"], [0, 1, 2])


@pytest.fixture
def second_of_three(monkeypatch):
    """Process 1; what the others give in each round is taken from a list."""
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    others = []

    def everyones(mine):
        first, last = others.pop(0)
        return [first, mine, last]

    monkeypatch.setattr(gathering, "_everyones", everyones)
    return others


def test_pieces_come_in_order_and_short_rounds_end(second_of_three, tmp_path):
    second_of_three += [(("a", None), ("c", None)), (("d", None), (None, None))]
    own = own_share(["a", "b", "c", "d", "e"])
    assert own == ["b", "e"]
    assert in_turns(own, 5, str.upper) == ["a", "B", "c", "d", "E"]
    with first_writes(tmp_path) as place:
        assert place != tmp_path
    assert not place.exists()


def test_an_error_anywhere_is_an_error_everywhere(second_of_three):
    second_of_three += [(("a", None), (None, ValueError("there"))), (("a", None), ("c", None))]
    with pytest.raises(ValueError, match="there"):
        in_turns(["b"], 3, str.upper)
    with pytest.raises(ZeroDivisionError):
        in_turns([0], 3, lambda i: 1 / i)
