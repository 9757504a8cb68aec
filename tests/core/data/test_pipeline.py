import time

import numpy as np
import pytest
from PIL import Image

from core_jax.data.bad import DataPolicy, TooManyBadExamples
from core_jax.data.images import BadImage, Reason
from core_jax.data.pipeline import (
    WithoutImage,
    evaluation_batches,
    image_transform,
    make_batches,
    replacement_index,
)
from core_jax.data.resize import CropSpec
from core_jax.data.sources import EmptySourceError, Example, Source
from tests.core.data.image_files import encode, noise

FINE = DataPolicy(max_bad_fraction=1.0)


class Numbered:
    """n images; those of `bad` are half files. Position i is readable from the pixels."""

    def __init__(self, n, bad=(), delay=0.0):
        self.n, self.bad, self.delay = n, set(bad), delay
        self.reads = []

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        time.sleep(self.delay)
        self.reads.append(i)
        data = encode(np.full((32, 32, 3), i, np.uint8) if i not in self.bad else noise(i))
        if i in self.bad:
            data = data[: len(data) // 2]
        return Example(f"e{i}", data, f"caption {i}")


def value(image, example, rng):
    assert image.mode == "RGB"
    number = int(example.id[1:])
    assert (np.asarray(image) == number).all()
    return {"x": np.float32(number), "noise": rng.random(3), "caption": example.caption}


def take(source, n, *, transform=value, **options):
    options = {"batch_size": 4, "seed": 0, "policy": FINE, "num_threads": 2} | options
    with make_batches(source, transform=transform, **options) as batches:
        return [next(batches) for _ in range(n)]


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])


def test_source_protocol():
    assert isinstance(Numbered(3), Source)


@pytest.mark.parametrize("num_threads", [0, 1, 5])
def test_resuming_at_a_step_equals_going_on(num_threads):
    source = Numbered(11, bad=(3, 7))
    whole = take(source, 9)
    for start in (1, 4, 8):
        resumed = take(source, 9 - start, start_step=start, num_threads=num_threads)
        for a, b in zip(whole[start:], resumed, strict=True):
            same(a, b)


def test_process_count_does_not_change_the_global_batches():
    source = Numbered(13, bad=(2, 5))
    whole = take(source, 6, batch_size=8)
    for count in (2, 4):
        parts = [
            take(source, 6, batch_size=8, process_index=i, process_count=count)
            for i in range(count)
        ]
        for step, batch in enumerate(whole):
            for key in batch:
                joined = np.concatenate([part[step][key] for part in parts])
                np.testing.assert_array_equal(joined, batch[key])


def test_every_epoch_is_a_new_permutation_and_seeds_share_none():
    ids = [batch["ids"][0] for batch in take(Numbered(7), 28, batch_size=1)]
    epochs = [tuple(ids[i : i + 7]) for i in range(0, 28, 7)]
    assert all(len(set(epoch)) == 7 for epoch in epochs)
    assert len(set(epochs)) > 1
    other = [batch["ids"][0] for batch in take(Numbered(7), 28, batch_size=1, seed=1)]
    assert not {tuple(other[i : i + 7]) for i in range(0, 28, 7)} & set(epochs)


def test_unshuffled_is_in_order_and_epochs_end():
    source = Numbered(5)
    options = {"batch_size": 2, "seed": 0, "transform": value, "shuffle": False, "epochs": 3}
    with make_batches(source, **options) as batches:
        assert batches.steps == 7  # 15 examples, the remainder dropped
        ids = [batch["ids"] for batch in batches]
        assert [next(batches, "end") for _ in range(2)] == ["end", "end"]
    assert [name for batch in ids for name in batch] == [f"e{i % 5}" for i in range(14)]
    assert list(make_batches(source, start_step=7, **options)) == []
    with pytest.raises(ValueError, match="no batch of 16"):
        make_batches(source, **options | {"batch_size": 16})


def test_batch_contents():
    (batch,) = take(Numbered(4), 1, transform=image_transform(CropSpec(size=8)))
    assert batch["image"].shape == (4, 8, 8, 3)
    assert batch["image"].dtype == np.uint8
    for i, name in enumerate(batch["ids"]):
        assert batch["caption"][i] == f"caption {name[1:]}"
        assert (batch["image"][i] == int(name[1:])).all()


def test_bad_images_are_replaced_by_the_rule():
    bad = {1, 4, 6}
    source = Numbered(10, bad=bad)
    good_order = [b["ids"] for b in take(Numbered(10), 5, transform=lambda *_: {})]
    with make_batches(
        source, batch_size=4, seed=0, transform=value, policy=FINE, num_threads=3
    ) as batches:
        got = [next(batches)["ids"] for _ in range(5)]
        expected_bad = set()
        for step in range(5):
            for row in range(4):
                index, attempt = int(good_order[step][row][1:]), 0
                while index in bad:
                    expected_bad.add(f"e{index}")
                    attempt += 1
                    index = replacement_index(0, step * 4 + row, attempt, 10)
                assert got[step][row] == f"e{index}"
        assert expected_bad <= set(batches.bad.ids)
        assert set(batches.bad.ids.values()) == {Reason.TRUNCATED}
        assert batches.bad.met >= 3
        summary = batches.bad.summary()
        assert summary["counts"]["truncated"] == sum(batches.bad.counts.values()) >= 3


def test_too_many_bad_images_stop_the_run_and_are_named():
    policy = DataPolicy(max_bad_fraction=0.2, min_seen=20)
    source = Numbered(40, bad=range(0, 40, 2))
    with make_batches(source, batch_size=4, seed=0, transform=value, policy=policy) as batches:
        for _ in range(4):  # 20 positions are 5 batches, the fifth is the one refused
            next(batches)
        with pytest.raises(TooManyBadExamples, match=r"e\d+ \(truncated\)") as caught:
            next(batches)
    assert "max_bad_fraction" in str(caught.value)
    fine = DataPolicy(max_bad_fraction=0.6, min_seen=20)
    assert len(take(source, 10, policy=fine)) == 10


def test_nothing_usable_stops_instead_of_turning_for_ever():
    with pytest.raises(TooManyBadExamples, match="after 5 attempts"):
        take(Numbered(4, bad=range(4)), 1, policy=DataPolicy(max_attempts=5, max_bad_fraction=1))


def test_missing_caption_can_be_required():
    class Silent(Numbered):
        def __getitem__(self, i):
            example = super().__getitem__(i)
            return example if i else Example("e0", example.image, " ")

    policy = DataPolicy(max_bad_fraction=1, require_caption=True)
    batches = make_batches(Silent(5), batch_size=5, seed=0, transform=value, policy=policy)
    with batches:
        assert "e0" not in next(batches)["ids"]
        assert batches.bad.ids["e0"] == Reason.NO_CAPTION


def test_the_transform_may_refuse():
    def picky(image, example, rng):
        if example.id == "e2":
            raise BadImage(Reason.TOO_SMALL)
        return value(image, example, rng)

    ids = [name for b in take(Numbered(4), 6, transform=picky) for name in b["ids"]]
    assert "e2" not in ids


@pytest.mark.parametrize("num_threads", [0, 2])
def test_other_errors_pass_through_with_the_example_named(num_threads):
    class Failing(Numbered):
        def __getitem__(self, i):
            if i == 3:
                raise OSError("disk")
            return super().__getitem__(i)

    with pytest.raises(OSError, match="disk") as caught:
        take(Failing(4), 3, num_threads=num_threads)
    assert "example 3" in caught.value.__notes__[0]


def test_wait_is_measured_and_close_ends_the_thread():
    batches = make_batches(
        Numbered(8, delay=0.02), batch_size=4, seed=0, transform=value, num_threads=1
    )
    next(batches)
    assert 0.05 < batches.data_wait_seconds < 5
    time.sleep(0.4)
    before = batches.data_wait_seconds
    next(batches)  # was ready
    assert batches.last_wait_seconds == batches.data_wait_seconds - before < 0.05
    assert batches.step == 2
    batches.close()
    assert not batches._thread.is_alive()
    assert next(batches, None) is None


def test_a_dropped_iterator_ends_its_thread():
    batches = make_batches(Numbered(8), batch_size=4, seed=0, transform=value, num_threads=1)
    thread = batches._thread
    del batches
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("bad", [{"batch_size": 6, "process_count": 4}, {"process_index": 1}])
def test_process_arguments_are_checked(bad):
    options = {"batch_size": 4, "seed": 0, "transform": value} | bad
    with pytest.raises(ValueError, match="process"):
        make_batches(Numbered(8), **options)


class TestEvaluation:
    def run(self, source, **options):
        options = {"batch_size": 4, "transform": value, "policy": FINE, "num_threads": 2} | options
        with evaluation_batches(source, **options) as batches:
            return list(batches)

    @pytest.mark.parametrize("processes", [1, 2])
    def test_every_example_once_in_order(self, processes):
        parts = [
            self.run(Numbered(10, bad=(1, 8)), process_index=i, process_count=processes)
            for i in range(processes)
        ]
        assert {len(part) for part in parts} == {3}
        seen = {}
        for part in parts:
            for batch in part:
                assert batch["x"].shape == batch["mask"].shape == (4 // processes,)
                for name, mask, x, reason in zip(
                    batch["ids"], batch["mask"], batch["x"], batch["reasons"], strict=True
                ):
                    if mask:
                        assert name == f"e{x:.0f}"
                    if name:
                        assert name not in seen
                        seen[name] = (bool(mask), reason)
        assert sorted(seen) == sorted(f"e{i}" for i in range(10))
        assert {name for name in seen if not seen[name][0]} == {"e1", "e8"}
        assert seen["e1"][1] == Reason.TRUNCATED
        if processes == 1:
            assert list(seen) == [f"e{i}" for i in range(10)]

    def test_masked_rows_repeat_a_good_row(self):
        batches = self.run(Numbered(6, bad=range(4)))
        assert not batches[0]["mask"].any()
        np.testing.assert_array_equal(batches[0]["x"], [4] * 4)
        np.testing.assert_array_equal(batches[1]["x"], [4, 5, 4, 4])
        assert batches[1]["ids"] == ["e4", "e5", "", ""]

    def test_chosen_indices(self):
        (batch,) = self.run(Numbered(10), indices=[7, 2])
        assert batch["ids"] == ["e7", "e2", "", ""]

    def test_nothing_usable(self):
        with pytest.raises(TooManyBadExamples, match="not one"):
            self.run(Numbered(3, bad=range(3)))

    def test_empty(self):
        assert self.run(Numbered(3), indices=[]) == []


def test_random_crops_follow_the_position_not_the_history():
    class Big(Numbered):
        def __getitem__(self, i):
            return Example(f"e{i}", encode(Image.fromarray(noise(i, 40, 90))))

    transform = image_transform(CropSpec(size=40, kind="random"))
    whole = take(Big(4), 3, transform=transform)
    (last,) = take(Big(4), 1, transform=transform, start_step=2)
    same(whole[2], last)
    # The next epoch shows other crops of the same images.
    first = dict(zip(whole[0]["ids"], whole[0]["image"], strict=True))
    second = dict(zip(whole[1]["ids"], whole[1]["image"], strict=True))
    assert any((first[key] != second[key]).any() for key in first)


def test_without_image_gives_the_same_order_and_replacements_and_decodes_nothing():
    bad = (2, 5)

    def row(example):
        if int(example.id[1:]) in bad:
            raise BadImage(Reason.TRUNCATED)
        return {"caption": example.caption}

    class Unreadable(Numbered):
        def __getitem__(self, i):
            return Example(f"e{i}", None, f"caption {i}")

    expected = take(Numbered(10, bad=bad), 8)
    found = take(Unreadable(10), 8, transform=WithoutImage(row))
    for a, b in zip(expected, found, strict=True):
        assert (a["ids"], a["caption"]) == (b["ids"], b["caption"])
    with pytest.raises(TooManyBadExamples):  # the ordinary transform does need the image
        take(Unreadable(10), 1)


def test_a_source_without_an_example_is_named():
    with pytest.raises(EmptySourceError, match="holds no example"):
        make_batches([], batch_size=2, seed=0, transform=lambda *_: {})
