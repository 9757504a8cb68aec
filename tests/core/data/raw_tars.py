"""Small webdataset tars, and the pipeline of core_jax.data.prepare without Beam."""

import collections
import io
import json
import tarfile
import types

import numpy as np
from PIL import Image

from core_jax.data.prepare_rules import Dropped, bands, exact_duplicates, shard_of
from tests.core.data.image_files import encode


def smooth(seed, height=40, width=48):
    """A picture whose low frequencies are its own; noise would have none to tell it by."""
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(seed, height=40, width=48, **options):
    return encode(smooth(seed, height, width), "JPEG", **{"quality": 90, **options})


def write_tar(file, samples):
    """Samples are (key, image bytes or None, extras or None)."""
    with tarfile.open(file, "w") as tar:
        for key, image, extras in samples:
            members = {"jpg": image, "txt": f"caption of {key}".encode("utf-8", "surrogateescape")}
            members["json"] = json.dumps(extras).encode() if extras is not None else None
            for suffix, data in members.items():
                if data is not None:
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def write_mixture(folder, good=30):
    """Three tars with one of everything; returns the reason of each dropped example."""
    folder.mkdir(parents=True, exist_ok=True)
    clean = {"pwatermark": 0.1}
    near = smooth(3).resize((50, 42))
    first = [(f"{i:04d}", jpeg(i), clean) for i in range(good)]
    second = [
        ("small", jpeg(100, 32, 60), clean),
        ("wide", jpeg(101, 40, 90), clean),
        ("marked", jpeg(102), {"pwatermark": 0.5}),
        ("scoreless", jpeg(103), {}),
        ("jsonless", jpeg(104), None),
        ("cut", jpeg(105)[:-200], clean),
        ("html", b"<html>", clean),
        ("empty", b"", clean),
        ("none", None, clean),
        ("größe 火", jpeg(106), clean),
    ]
    third = [
        ("copy", jpeg(2), clean),
        ("near", encode(near, "JPEG", quality=70), clean),
        ("other", jpeg(107), clean),
    ]
    for number, samples in enumerate((first, second, third)):
        write_tar(folder / f"{number:05d}.tar", samples)
    return {
        "00001/small": "short_side", "00001/wide": "aspect_ratio", "00001/marked": "watermark",
        "00001/scoreless": "no_watermark_score", "00001/jsonless": "no_watermark_score",
        "00001/cut": "truncated", "00001/html": "not_an_image", "00001/empty": "empty",
        "00001/none": "no_image", "00002/copy": "duplicate_bytes", "00002/near": "near_duplicate",
    }  # fmt: skip


def tree(path):
    """Every file below a folder, by its relative name."""
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


def without_beam(before=lambda what, item: None):
    """A stand-in for core_jax.data.prepare_pipeline, in one thread; `before` may raise."""

    def run_each(items, work, options):
        for item in items:
            before(work.__name__, item)
            work(item)

    def write_shards(job, units, starts, shards, options):
        records = [record for unit in units for record in job.records(unit)]
        ids = {record[0]: record[1] for record in records}
        bytes_groups, band_groups = (collections.defaultdict(list) for _ in range(2))
        for position, own, reason, _, sha256, phash, colour, *_ in records:
            if not reason:
                bytes_groups[sha256].append((own, position))
                for key in bands(phash, job.rules.near_distance or 0):
                    band_groups[key].append((own, position, phash, colour))
        drops = [
            (position, Dropped.DUPLICATE_BYTES.value, kept)
            for group in bytes_groups.values()
            for position, kept in exact_duplicates(group)
        ]
        if job.rules.near_distance is not None:
            drops += [d for group in band_groups.values() for d in job.near_duplicates(group)]
        for shard in range(shards):
            before("write", shard)
            job.write_shard(
                shard, shards, starts,
                [r for r in records if shard_of(r[1], shards) == shard],
                [d for d in drops if shard_of(ids[d[0]], shards) == shard],
            )  # fmt: skip

    return types.SimpleNamespace(
        run_each=run_each, write_shards=write_shards, pipeline_options=lambda *a: None
    )
