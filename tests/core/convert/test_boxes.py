"""Plans of what to read: everything needed, once, and nothing that a page would not bring."""

import numpy as np
import pytest

from core_jax.convert.boxes import PAGE_BYTES, plan_blocks


def _random_boxes(rng, shape):
    edges = [np.sort(rng.choice(n + 1, 2, replace=False)) for n in shape]
    return tuple((int(a), int(b)) for a, b in edges)


@pytest.mark.parametrize("shape", [(7, 5), (9, 4, 3, 2), (12, 1), (3, 6000)])
@pytest.mark.parametrize("block_bytes", [1, 64, 10**6])
def test_every_element_of_every_box_is_read_once(shape, block_bytes, rng):
    for _ in range(5):
        boxes = [_random_boxes(rng, shape) for _ in range(rng.integers(1, 5))]
        counts = [np.zeros(shape[:2], int) for _ in boxes]
        last = -1
        for block in plan_blocks(shape, 4, boxes, block_bytes=block_bytes):
            assert block.rows[0] >= last
            last = block.rows[0]
            for i in block.boxes:
                rows, columns = boxes[i][:2]
                assert rows[0] <= block.rows[0] < block.rows[1] <= rows[1]
                assert block.columns[0] <= columns[0] < columns[1] <= block.columns[1]
                counts[i][slice(*block.rows), slice(*columns)] += 1
        for box, count in zip(boxes, counts, strict=True):
            want = np.zeros_like(count)
            want[tuple(slice(*edges) for edges in box[:2])] = 1
            np.testing.assert_array_equal(count, want)


def test_blocks_are_no_larger_than_asked_for():
    (block, *more) = plan_blocks((100, 10), 4, [((0, 100), (0, 10))], block_bytes=400)
    assert block.rows == (0, 10)
    assert len(more) == 9


def test_gaps_of_a_page_are_left_out_and_smaller_ones_are_not():
    page = PAGE_BYTES // 4
    (block,) = plan_blocks((2, 4 + page), 4, [((0, 2), (0, 4))])
    assert not block.whole
    (block,) = plan_blocks((2, 3 + page), 4, [((0, 2), (0, 4))])
    assert block.whole
    apart = [((0, 1), (0, 2)), ((0, 1), (2 + page, 4 + page))]
    assert len(list(plan_blocks((1, 9 * page), 4, apart))) == 2
    near = [((0, 1), (0, 2)), ((0, 1), (1 + page, 3 + page))]
    assert len(list(plan_blocks((1, 9 * page), 4, near))) == 1


def test_boxes_of_other_rows_do_not_widen_the_columns():
    """Two quarters on a diagonal are not read as the whole."""
    n = PAGE_BYTES
    boxes = [((0, 2), (0, n)), ((2, 4), (n, 2 * n))]
    blocks = list(plan_blocks((4, 2 * n), 4, boxes))
    assert [(b.rows, b.columns, b.boxes) for b in blocks] == [
        ((0, 2), (0, n), (0,)), ((2, 4), (n, 2 * n), (1,)),
    ]  # fmt: skip


def test_empty_boxes_need_nothing():
    assert list(plan_blocks((4, 4), 4, [((1, 1), (0, 4)), ((0, 4), (2, 2))])) == []
