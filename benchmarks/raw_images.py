"""Raw image data as img2dataset leaves it: webdataset tars with everything that goes wrong in them.

    python -m benchmarks.raw_images --out ~/raw --count 100000 [--per-tar 10000] [--quality 75]

JPEGs of many sizes with captions and watermark scores, drawn from (seed, number) alone. Out of a
hundred: 8 too small, 5 too elongated, 10 watermarked, 2 without a score, 2 cut short, 1 that is no
image, 1 without a picture, 4 exact copies, 4 re-encoded copies of earlier ones. What was made is
counted in truth.json.
"""

import argparse
import collections
import io
import json
import pathlib
import tarfile

import numpy as np
from PIL import Image

# Kind -> of a hundred. The rest are good.
KINDS = {
    "small": 8, "elongated": 5, "watermarked": 10, "scoreless": 2, "truncated": 2,
    "not_an_image": 1, "no_image": 1, "copy": 4, "near": 4,
}  # fmt: skip
GOOD_SIDES = (520, 640)  # of the shorter side, pixels


def kind_of(number: int, seed: int) -> str:
    """What example `number` is."""
    value = np.random.default_rng((seed, number, 0)).integers(100)
    for kind, share in KINDS.items():
        if value < share and (kind not in ("copy", "near") or number > 10):
            return kind
        value -= share
    return "good"


def original_of(number: int, seed: int) -> int:
    """The earlier good example that a copy is of."""
    rng = np.random.default_rng((seed, number, 2))
    while True:
        candidate = int(rng.integers(number))
        if kind_of(candidate, seed) == "good":
            return candidate


def picture(number: int, seed: int, kind: str = "good") -> Image.Image:
    """Smooth random colours, shaped as the kind wants them."""
    rng = np.random.default_rng((seed, number, 1))
    shorter = int(rng.integers(100, 513)) if kind == "small" else int(rng.integers(*GOOD_SIDES))
    ratio = rng.uniform(2.2, 3) if kind == "elongated" else rng.uniform(1, 1.5)
    size = (int(shorter * ratio), shorter)
    size = size if rng.integers(2) else size[::-1]
    coarse = rng.integers(0, 256, (int(rng.integers(8, 24)), int(rng.integers(8, 24)), 3), np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def encode(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def sample(number: int, seed: int, quality: int) -> tuple[str, dict[str, bytes]]:
    """The kind and the members, by suffix, of one example."""
    kind = kind_of(number, seed)
    source = original_of(number, seed) if kind in ("copy", "near") else number
    rng = np.random.default_rng((seed, number, 3))
    score = rng.uniform(0.5, 1) if kind == "watermarked" else rng.uniform(0, 0.499)
    meta = {"pwatermark": None if kind == "scoreless" else float(score), "key": f"{number:09d}"}
    members = {"txt": f"picture {source}".encode(), "json": json.dumps(meta).encode()}
    if kind == "no_image":
        return kind, members
    if kind == "not_an_image":
        data = b"<html>moved</html>"
    elif kind == "near":
        image = picture(source, seed)
        smaller = image.resize((image.width * 99 // 100, image.height * 99 // 100))
        data = encode(smaller, quality - 10)
    else:
        data = encode(picture(source, seed, kind), quality)
    return kind, {"jpg": data[: len(data) // 2] if kind == "truncated" else data, **members}


def write_tars(
    out: pathlib.Path, count: int, per_tar: int, quality: int, seed: int
) -> dict[str, int]:
    """Writes the tars and truth.json; returns how many there are of every kind."""
    out.mkdir(parents=True, exist_ok=True)
    kinds: collections.Counter[str] = collections.Counter()
    for first in range(0, count, per_tar):
        with tarfile.open(out / f"{first // per_tar:05d}.tar", "w") as tar:
            for number in range(first, min(first + per_tar, count)):
                kind, members = sample(number, seed, quality)
                kinds[kind] += 1
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    (out / "truth.json").write_text(json.dumps(kinds, indent=1))
    return dict(kinds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--per-tar", type=int, default=10_000)
    parser.add_argument("--quality", type=int, default=75)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(write_tars(given.out, given.count, given.per_tar, given.quality, given.seed))


if __name__ == "__main__":
    main()
