import itertools

import pytest

from miniature.pretrain.made_ahead import AHEAD, made_ahead


def square(step):
    if step == 40:
        raise ValueError("step 40")
    return step * step


def test_batches_come_in_order_from_where_a_run_stands():
    batches = made_ahead(square, 3)
    count = AHEAD + 4
    assert list(itertools.islice(batches, count)) == [step**2 for step in range(3, 3 + count)]
    batches.close()


def test_an_error_reaches_the_run():
    with pytest.raises(ValueError, match="step 40"):
        list(made_ahead(square, 38))
