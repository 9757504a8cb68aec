"""What `vlv_jax.cache` wrote: its layout, whether it fits a run, and training batches from it.

A cache is a folder with `manifest.json` and, for each shard, an ArrayRecord file and a JSON file
with its ids. A record holds what the frozen towers make of one image: Florence-2's projected image
features [P, D] and the VAE posterior's mean and log variance [h, w, c].
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core_jax.data.images import BadImage, Reason
from core_jax.data.pipeline import WithoutImage, make_batches
from core_jax.data.processors import ImageProcessor
from core_jax.data.sources import Example, SourceError, open_source
from core_jax.models import load_model
from core_jax.partition import flatten
from vlv_jax.batches import caption_row, policy_of, sample_index
from vlv_jax.experiment import Experiment
from vlv_jax.loading import Pieces
from vlv_jax.networks import FLORENCE2
from vlv_jax.workdir import EXPERIMENT_FILE, is_export, load_experiment, weights_hash

FORMAT = 1
MANIFEST = "manifest.json"
# What of a source has to do with captions only, so that they may change under a cache.
_CAPTION_FIELDS = ("caption_key", "caption_suffix")


class CacheError(SourceError):
    """A cache does not fit the run, or is not whole; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shapes and types of a record.

    Attributes:
      features: (P, D).
      latent: (h, w, c) of the mean and of the log variance, which are always float32.
      dtype: of the features, "bfloat16" or "float32".
    """

    features: tuple[int, int]
    latent: tuple[int, int, int]
    dtype: str

    def _parts(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        moments = (self.latent, np.dtype(np.float32))
        return {
            "features": (self.features, jnp.dtype(self.dtype)),
            "latent_mean": moments,
            "latent_logvar": moments,
        }

    @property
    def num_bytes(self) -> int:
        """Of a record, without its id."""
        return sum(int(np.prod(s)) * t.itemsize for s, t in self._parts().values())

    def pack(self, example_id: str, arrays: Mapping[str, np.ndarray]) -> bytes:
        """The id's length (4 bytes, little-endian), the id, and the arrays' bytes in order."""
        name = example_id.encode("utf-8", "surrogateescape")
        data = [len(name).to_bytes(4, "little"), name]
        for key, (shape, dtype) in self._parts().items():
            array = np.asarray(arrays[key])
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{key} is {array.dtype} {array.shape}, not {dtype} {shape}")
            data.append(array.tobytes())
        return b"".join(data)

    def unpack(self, record: bytes) -> tuple[str, dict[str, np.ndarray]]:
        """The inverse of `pack`; the arrays are views of the record.

        Raises:
          CacheError: a record of another length.
        """
        start = 4 + int.from_bytes(record[:4], "little")
        if len(record) != start + self.num_bytes:
            raise CacheError(f"a cached record has {len(record)} bytes; it was written otherwise")
        name, arrays = record[4:start].decode("utf-8", "surrogateescape"), {}
        for key, (shape, dtype) in self._parts().items():
            count = int(np.prod(shape))
            arrays[key] = np.frombuffer(record, dtype, count, start).reshape(shape)
            start += count * dtype.itemsize
        return name, arrays


def settings_of(experiment: Experiment, processor: ImageProcessor) -> dict[str, Any]:
    """Everything that a cached record follows from; runs with other settings cannot use it."""
    data, model = experiment.data, experiment.model
    source = {k: v for k, v in dataclasses.asdict(data.source).items() if v is not None}
    settings = {
        "weights": {
            "florence2": _network_hash(pathlib.Path(model.florence2)),
            "vae": _network_hash(pathlib.Path(model.diffusion) / "vae"),
        },
        "image_size": data.image_size,
        "crop": data.crop,
        "resample": data.resample,
        "processor": processor.to_hf(),
        "limits": dataclasses.asdict(data.limits),
        "source": {k: v for k, v in source.items() if k not in _CAPTION_FIELDS},
    }
    return json.loads(json.dumps(settings))  # as it is read back: tuples become lists


def _network_hash(directory: pathlib.Path) -> str:
    """Of weights and architecture."""
    config = hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
    return f"{weights_hash(directory)}-{config[:16]}"


def differences(written: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list:
    """Texts `crop: the cache has 'center', the run 'squash'`, one for each leaf that differs."""
    found = []
    for key in sorted({*written, *wanted}):
        old, new = written.get(key), wanted.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key}: the cache has {old!r}, the run {new!r}")
    return found


def shard_names(shard: int, count: int) -> tuple[str, str]:
    """File names of a shard's records and of its list of ids."""
    stem = f"features-{shard:05d}-of-{count:05d}"
    return f"{stem}.array_record", f"{stem}.json"


def shard_problem(path: pathlib.Path, shard: int, count: int) -> str:
    """Why a shard is not there whole; "" where it is.

    A list of ids says how long its records are. One that does not (of an earlier release) is
    believed.
    """
    records, listing = (path / name for name in shard_names(shard, count))
    if not listing.is_file():
        return f"{listing.name} is missing"
    try:
        entry = json.loads(listing.read_text("utf-8"))
        ids, size = entry["ids"], entry.get("bytes")
    except (ValueError, KeyError, TypeError):
        return f"{listing.name} is damaged"
    if not ids:
        return ""
    if not records.is_file():
        return f"{records.name} is missing"
    found = records.stat().st_size
    if size is not None and found != size:
        return f"{records.name} has {found} bytes, and {size} were written"
    return ""


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """The manifest of a cache.

    Raises:
      CacheError: there is none, or of another version of this format.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise CacheError(f"{path} is no cache: {MANIFEST} is missing. Run vlv_jax.cache first")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        raise CacheError(
            f"{file} is damaged; remove it, and run the same vlv_jax.cache command again"
        ) from None
    if manifest.get("format") != FORMAT:
        raise CacheError(f"{path} has format {manifest.get('format')}, not {FORMAT}; write it anew")
    return manifest


class FeatureCache:
    """Random access by example id; safe to read from several threads.

    Args:
      path: the folder.

    Raises:
      CacheError: no cache, one that is not whole yet, or one in which an id stands twice.
    """

    def __init__(self, path: str | os.PathLike):
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        self.path = pathlib.Path(path)
        self.manifest = read_manifest(self.path)
        self.layout = Layout(
            tuple(self.manifest["features"]), tuple(self.manifest["latent"]), self.manifest["dtype"]
        )
        count = self.manifest["num_shards"]
        names = [shard_names(shard, count) for shard in range(count)]
        problems = [found for i in range(count) if (found := shard_problem(self.path, i, count))]
        if problems:
            raise CacheError(
                f"{self.path} is not whole: {len(problems)} of {count} shards are missing or "
                f"damaged ({problems[0]}). Run the same vlv_jax.cache command again; it makes "
                "those alone"
            )
        lists = [json.loads((self.path / listing).read_text("utf-8")) for _, listing in names]
        self._bad = {key: reason for entry in lists for key, reason in entry["bad"].items()}
        ids = [example_id for entry in lists for example_id in entry["ids"]]
        keys = [_key(example_id) for example_id in ids]
        # Two arrays of 8 bytes a record: a dictionary of 40 million ids would need gigabytes.
        order = np.argsort(np.array(keys, np.uint64), kind="stable")
        self._keys, self._positions = np.array(keys, np.uint64)[order], order
        self._check_unique(ids)
        sizes = [(name, len(entry["ids"])) for (name, _), entry in zip(names, lists, strict=True)]
        self._records = ArrayRecordDataSource(
            [str(self.path / name) for name, size in sizes if size] or [""]
        ) if keys else ()  # fmt: skip
        if len(self._records) != len(keys):
            raise CacheError(f"{self.path}: the shards do not hold what their lists say")

    def _check_unique(self, ids: Sequence[str]) -> None:
        same = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        pairs = ((ids[self._positions[i]], ids[self._positions[i + 1]]) for i in same)
        twice = [first for first, second in pairs if first == second]
        twice += [example_id for example_id in ids if example_id in self._bad] if self._bad else []
        if twice:
            raise repeated_id(self.path, twice[0])

    def __len__(self) -> int:
        return len(self._records)

    def get(self, example_id: str) -> dict[str, np.ndarray]:
        """`features` [P, D], `latent_mean` and `latent_logvar` [h, w, c] of an example.

        Raises:
          BadImage: the image could not be used when the cache was written.
          CacheError: the cache does not know the example.
        """
        place = int(np.searchsorted(self._keys, np.uint64(_key(example_id))))
        while place < len(self._keys) and self._keys[place] == np.uint64(_key(example_id)):
            name, arrays = self.layout.unpack(self._records[int(self._positions[place])])
            if name == example_id:
                return arrays
            place += 1  # another id with the same 64 bits
        if example_id in self._bad:
            raise BadImage(Reason(self._bad[example_id]))
        raise CacheError(
            f"example {example_id!r} is not in the cache {self.path}: the source has changed since "
            "it was written. Write a cache of the new source"
        )

    def check(self, experiment: Experiment, processor: ImageProcessor) -> None:
        """Compares the manifest with what a run needs.

        Raises:
          CacheError: another source, other weights, size or crop; or a tower that is trained.
        """
        found = differences(self.manifest["settings"], settings_of(experiment, processor))
        if found:
            raise CacheError(
                f"the cache {self.path} was written for something else:\n  " + "\n  ".join(found)
                + "\nWrite another with vlv_jax.cache (or, where files were only moved, change "
                f"`source` in its {MANIFEST})"
            )  # fmt: skip
        trained = trained_towers(experiment, self.manifest["frozen"])
        if trained:
            raise CacheError(
                "cached features need frozen towers, but `trainable` of this run, or a run or "
                f"export before it, changes {', '.join(trained[:3])}; train without data.cache"
            )


def repeated_id(path: pathlib.Path, example_id: str) -> CacheError:
    """The exception to raise where two examples of a source have one id."""
    return CacheError(
        f"{path}: two examples of the source have the id {example_id!r}, so that one would get the "
        "features of the other. Give each an id of its own (python -m core_jax.data.check lists "
        "those that repeat), and write another cache"
    )


def _key(example_id: str) -> int:
    name = example_id.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")


def trained_towers(experiment: Experiment, frozen: Sequence[str]) -> list[str]:
    """Which of the parameters behind a cache this run, or a run before it, has trained."""
    patterns = experiment.trainable
    found = [name for name in frozen if any(re.fullmatch(p, name) for p in patterns)]
    before = pathlib.Path(experiment.run.init_from) if experiment.run.init_from else None
    if before is None:
        return found
    if is_export(before):
        return found + _changed_in_export(before, experiment, frozen)
    if (before / EXPERIMENT_FILE).is_file():
        earlier = dataclasses.replace(load_experiment(before), model=experiment.model)
        found += trained_towers(earlier, frozen)
    return found


def _changed_in_export(
    export: pathlib.Path, experiment: Experiment, frozen: Sequence[str]
) -> list[str]:
    """Which of Florence-2's are not the hub's, as they are held. The VAE is always the hub's."""
    folders = (export / "florence2", pathlib.Path(experiment.model.florence2))
    there, here = (flatten(load_model(f, only=(r"(?!language_model/).*",))[1]) for f in folders)
    dtype = jnp.dtype(experiment.model.frozen_dtype)
    return [
        name
        for name in frozen
        if (own := name.removeprefix(f"{FLORENCE2}/")) != name
        and not np.array_equal(there[own].astype(dtype), here[own].astype(dtype))
    ]


def cached_batches(
    experiment: Experiment, pieces: Pieces, start_step: int
) -> Iterator[Mapping[str, Any]]:
    """The batches of `vlv_jax.training.training_batches`, with features in the place of images.

    Same examples, same order, same replacements of images that cannot be used. Features are cast
    to the precision of the frozen networks.

    Returns:
      {"ids", "index", "features"} and, as far as the loss reads them, {"latent_mean",
      "latent_logvar"} and {"tokens", "supervised"}.

    Raises:
      CacheError: see `FeatureCache`.
    """
    from vlv_jax.training import batch_keys  # it imports this module, too

    data, captions = experiment.data, experiment.stage == 2
    cache = FeatureCache(data.cache)
    cache.check(experiment, pieces.processor)
    make_row = functools.partial(
        _cached_row, cache, experiment,
        tokenizer=pieces.lm_tokenizer if captions else None,
        moments="image" in batch_keys(experiment),
    )  # fmt: skip
    return make_batches(
        open_source(data.source),
        batch_size=data.batch_size,
        seed=experiment.run.seed,
        start_step=start_step,
        transform=WithoutImage(make_row),
        policy=policy_of(data, require_caption=captions),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=data.num_threads,
    )


def _cached_row(
    cache: FeatureCache, experiment: Experiment, example: Example, *, tokenizer: Any, moments: bool
) -> dict[str, Any]:
    arrays = cache.get(example.id)
    row: dict[str, Any] = {"index": sample_index(example.id)}
    row["features"] = arrays["features"].astype(jnp.dtype(experiment.model.frozen_dtype))
    if moments:
        row |= {key: arrays[key] for key in ("latent_mean", "latent_logvar")}
    if tokenizer is not None:
        row |= caption_row(
            tokenizer, example.caption or "", experiment.data.max_tokens,
            supervise_eos=experiment.captioning.supervise_eos,
        )  # fmt: skip
    return row
