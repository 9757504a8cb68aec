"""The rules of core_jax.data.prepare, one by one."""

import dataclasses
import hashlib

import numpy as np
import pytest

from core_jax.data import prepare_job, prepare_rules
from core_jax.data.images import ImageLimits
from core_jax.data.prepare_rules import (
    Exclusion,
    Rules,
    bands,
    fingerprint,
    first_neighbours,
    look_at,
)  # fmt: skip
from core_jax.data.sources import Example
from tests.core.data.image_files import encode
from tests.core.data.raw_tars import jpeg, smooth

RULES = Rules(side_above=32)
CLEAN = {"pwatermark": 0.1}


def reason(example=None, rules=RULES, exclusion=None, **fields):
    example = example or Example("a", fields.pop("image", jpeg(0)), "text", CLEAN | fields)
    return look_at(example, rules, ImageLimits(), exclusion or Exclusion()).reason


class TestOneExample:
    def test_shorter_side_is_strict(self):
        assert reason(image=jpeg(0, 33, 60)) == ""
        assert reason(image=jpeg(0, 32, 60)) == "short_side"
        assert reason(image=jpeg(0, 60, 32)) == "short_side"
        assert reason(image=jpeg(0, 32, 60), rules=Rules(side_above=31)) == ""
        assert Rules().side_above == 512

    def test_aspect_ratio_includes_its_bounds(self):
        assert reason(image=jpeg(0, 40, 80)) == reason(image=jpeg(0, 80, 40)) == ""
        assert reason(image=jpeg(0, 40, 81)) == "aspect_ratio"
        assert reason(image=jpeg(0, 81, 40)) == "aspect_ratio"

    def test_aspect_ratio_of_the_upright_image(self):
        rules = dataclasses.replace(RULES, min_aspect=1.2)
        assert reason(image=jpeg(0, 40, 60), rules=rules) == ""
        exif = prepare_rules.Image.Exif()
        exif[0x0112] = 6  # a quarter turn
        assert reason(image=jpeg(0, 40, 60, exif=exif), rules=rules) == "aspect_ratio"
        assert reason(image=jpeg(0, 60, 40, exif=exif), rules=rules) == ""

    @pytest.mark.parametrize(
        ("score", "strict", "lenient"),
        [
            (0.499, "", ""), (0.5, "watermark", "watermark"), (0, "", ""),
            (1, "watermark", "watermark"),
            *[(x, "no_watermark_score", "") for x in (None, "0.1", True, float("nan"), -1, 7, [])],
        ],
    )  # fmt: skip
    def test_watermark(self, score, strict, lenient):
        keep = dataclasses.replace(RULES, missing_watermark="keep")
        assert reason(pwatermark=score) == strict
        assert reason(pwatermark=score, rules=keep) == lenient
        none = dataclasses.replace(RULES, watermark_below=None)
        assert reason(pwatermark=score, rules=none) == ""
        found = look_at(Example("a", jpeg(0), None, {"x": 1}), keep, ImageLimits(), Exclusion())
        assert found.score_missing
        assert found.reason == ""

    def test_what_cannot_be_decoded(self):
        assert reason(image=jpeg(0)[:-100]) == "truncated"
        assert reason(image=b"<html>") == "not_an_image"
        assert reason(image=b"") == "empty"
        assert reason(Example("a", None, None, CLEAN)) == "no_image"

    def test_caption(self):
        needs = dataclasses.replace(RULES, require_caption=True)
        assert reason(Example("a", jpeg(0), None, CLEAN), rules=needs) == "no_caption"
        assert reason(Example("a", jpeg(0), None, CLEAN)) == reason(rules=needs) == ""

    def test_exclusion(self):
        data = jpeg(0)
        phash, colour = fingerprint(smooth(0))
        near = Exclusion(
            hashes=np.array([phash], np.uint64), colours=np.frombuffer(colour, np.uint8)[None]
        )
        digest = hashlib.sha256(data).digest()
        assert reason(exclusion=Exclusion(ids=frozenset({"a"}))) == "excluded_id"
        assert reason(exclusion=Exclusion(ids=frozenset({"A"}))) == ""
        assert reason(exclusion=Exclusion(sha256=frozenset({digest}))) == "excluded_bytes"
        assert reason(exclusion=near) == "excluded_near"
        assert reason(image=jpeg(1), exclusion=near) == ""

    @pytest.mark.parametrize(
        "bad",
        [{"side_above": -1}, {"min_aspect": 3}, {"missing_watermark": "x"}, {"near_distance": 8}],
    )
    def test_rules_are_checked(self, bad):
        with pytest.raises(ValueError, match=next(iter(bad)).split("_")[-1]):
            Rules(**bad)


class TestFingerprints:
    def test_survives_size_and_quality_and_tells_pictures_apart(self):
        for seed in range(20):
            phash, colour = fingerprint(smooth(seed, 300, 400))
            data = encode(smooth(seed, 300, 400).resize((200, 150)), "JPEG", quality=60)
            again, coloured = fingerprint(prepare_rules.decode_image(data))
            assert (phash ^ again).bit_count() <= RULES.near_distance
            difference = np.frombuffer(colour, np.uint8) - np.frombuffer(coloured, np.uint8) * 1.0
            assert np.abs(difference).mean() < 3
            other, _ = fingerprint(smooth(seed + 1000, 300, 400))
            assert (phash ^ other).bit_count() > 10
            assert 0 <= phash < 2**63

    def test_bands_meet_within_the_distance_and_need_not_beyond(self, rng):
        for distance in range(8):
            for _ in range(50):
                a = int(rng.integers(2**63))
                flips = rng.choice(63, distance, replace=False)
                b = a ^ sum(1 << int(bit) for bit in flips)
                assert set(bands(a, distance)) & set(bands(b, distance))
                assert len(set(bands(a, distance))) == distance + 1
        apart = 1 | 1 << 16 | 1 << 32 | 1 << 48  # a bit in each of the four bands of distance 3
        assert not set(bands(0, 3)) & set(bands(apart, 3))
        assert max(bands(2**63 - 1, 0)) < 2**63

    @pytest.mark.parametrize("block", [3, 4096])
    def test_first_neighbours_against_a_loop(self, rng, block):
        n, distance, tolerance = 600, 3, 20.0
        hashes = rng.integers(2**63, size=6)[rng.integers(6, size=n)].astype(np.uint64)
        hashes ^= (np.uint64(1) << rng.integers(63, size=n).astype(np.uint64)) * (
            rng.random(n) < 0.9
        )
        colours = np.clip(rng.integers(0, 3, (n, 1)) * 40 + rng.integers(0, 9, (n, 48)), 0, 255)
        colours = colours.astype(np.uint8)
        want = np.full(n, -1)
        for i in range(n):
            for j in range(i):
                apart = np.abs(colours[i].astype(int) - colours[j]).mean()
                if int(hashes[i] ^ hashes[j]).bit_count() <= distance and apart <= tolerance:
                    want[i] = j
                    break
        got = first_neighbours(hashes, colours, distance, tolerance, block)
        np.testing.assert_array_equal(got, want)
        assert (want >= 0).sum() > 300
        assert (first_neighbours(hashes, colours, 0, tolerance, block) != want).any()

    def test_no_two_kept_are_near(self, rng):
        """Also in a chain a - b - c whose ends are not near each other."""
        job = prepare_job.Job(
            parts=(), path=None, name="", split="", rules=RULES, limits=ImageLimits()
        )
        colour = bytes(48)
        chain = [("a", 0, 0b0, colour), ("b", 1, 0b1111, colour), ("c", 2, 0b11111111, colour)]
        for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
            drops = job.near_duplicates([chain[i] for i in order])
            assert sorted(drops) == [(1, "near_duplicate", "a"), (2, "near_duplicate", "b")]
        assert not job.near_duplicates([chain[0], chain[2]])
