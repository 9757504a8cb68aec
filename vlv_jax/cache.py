"""Runs the frozen towers over a data source once and keeps what they say.

    python -m vlv_jax.cache --config configs/vlv_stage1.py:mini --out DIR
    python -m vlv_jax.train --config configs/vlv_stage1.py:mini --workdir RUN \
        --config.data.cache=DIR

Running the same command again goes on with the first shard that is not whole. With several
processes, each writes every n-th shard.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from core_jax.data.bad import BadLog
from core_jax.data.images import BadImage, Reason, decode_image
from core_jax.data.sources import Source, open_source
from core_jax.files import remove_unfinished, sync_file, sync_folder, write_whole
from core_jax.partition import flatten
from core_jax.sharding import make_mesh, mesh_of
from core_jax.stopping import stop_between
from core_jax.watchdog import HEARTBEATS, Watchdog
from vlv_jax import networks as names
from vlv_jax.batches import ImageViews, policy_of, views_of
from vlv_jax.commands import run_command
from vlv_jax.encoding import image_features, latent_moments
from vlv_jax.experiment import DataConfig, Experiment
from vlv_jax.feature_cache import (
    FORMAT,
    MANIFEST,
    CacheError,
    FeatureCache,
    Layout,
    differences,
    read_manifest,
    repeated_id,
    settings_of,
    shard_names,
    shard_problem,
)
from vlv_jax.host_work import Progress, map_ahead
from vlv_jax.loading import cast_frozen, load_networks
from vlv_jax.networks import Networks

BATCH_SIZE = 32  # images a call


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """One example: its id and views, or why it cannot be used. No id: not even the record."""

    id: str
    views: dict[str, np.ndarray] | Reason


@dataclasses.dataclass(frozen=True)
class _Towers:
    """The frozen networks on this process's devices."""

    networks: Networks
    params: Any
    sharding: NamedSharding
    batch_size: int
    dtype: str

    @classmethod
    def load(
        cls, experiment: Experiment, batch_size: int, dtype: str, devices: Sequence[Any]
    ) -> tuple["_Towers", Any]:
        """Also returns the host's pieces."""
        networks, params, pieces = load_networks(experiment.model, with_language_model=False)
        # Every process works for itself, with a copy of the towers on each of its devices.
        mesh = make_mesh({"data": -1}, devices=devices)
        params = jax.device_put(
            cast_frozen(towers_of(params), experiment.model), NamedSharding(mesh, PartitionSpec())
        )
        size = padded_batch(batch_size, mesh)
        return cls(networks, params, rows_sharding(mesh), size, dtype), pieces

    def __call__(self, views: Sequence[dict[str, np.ndarray]]) -> dict[str, jax.Array]:
        """Starts the computation of one batch, padded to its full size."""
        padded = [*views, *[views[-1]] * (self.batch_size - len(views))]
        pixels = {
            key: jax.device_put(np.stack([row[key] for row in padded]), self.sharding)
            for key in ("florence_image", "image")
        }
        with mesh_of(self.params):
            encoded = encode_views(self.networks, self.params, pixels)
        return encoded | {"features": encoded["features"].astype(self.dtype)}

    def layout(self, views: ImageViews) -> Layout:
        """Shapes of a record, without computing anything."""
        side = (views.size, views.size, 3)
        florence = views.processor.size
        florence = (florence, florence) if isinstance(florence, int) else tuple(florence)
        pixels = {
            "image": jax.ShapeDtypeStruct((1, *side), jnp.uint8),
            "florence_image": jax.ShapeDtypeStruct((1, *florence, 3), jnp.uint8),
        }
        out = jax.eval_shape(functools.partial(encode_views, self.networks), self.params, pixels)
        return Layout(out["features"].shape[1:], out["latent_mean"].shape[1:], self.dtype)


def towers_of(params: Any) -> Any:
    """The networks that are run."""
    return {names.FLORENCE2: params[names.FLORENCE2], names.VAE: params[names.VAE]}


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Of a batch's views."""
    return NamedSharding(mesh, PartitionSpec("data"))


def padded_batch(batch_size: int, mesh: Mesh) -> int:
    """Rounded up to as many images on each device."""
    return -(-batch_size // mesh.size) * mesh.size


@functools.partial(jax.jit, static_argnames=("networks",))
def encode_views(networks: Networks, params: Any, pixels: dict) -> dict[str, jax.Array]:
    """What the towers say of a batch of both views."""
    mean, logvar = latent_moments(networks, params, pixels["image"])
    features = image_features(networks, params, pixels["florence_image"])
    return {
        "features": features,
        "latent_mean": mean.astype(jnp.float32),
        "latent_logvar": logvar.astype(jnp.float32),
    }


def build_cache(
    experiment: Experiment,
    out: pathlib.Path,
    *,
    dtype: str = "bfloat16",
    examples_per_shard: int = 1024,
    batch_size: int = BATCH_SIZE,
    process_index: int = 0,
    process_count: int = 1,
    devices: Sequence[Any] | None = None,
    at: Callable[[str], None] = lambda place: None,
) -> int:
    """Writes this process's shards that are not there yet; returns how many are still missing.

    Args:
      experiment: data and networks; what it trains does not matter.
      out: the folder.
      dtype: of the features; they are computed in `model.frozen_dtype`.
      examples_per_shard: examples a file.
      batch_size: images a call, rounded up to a multiple of this process's devices.
      process_index: this process.
      process_count: all processes.
      devices: that share each batch; this process's own by default.
      at: told where the job is (`Watchdog.at`).

    Raises:
      CacheError: random crops, two examples of one id, or the folder holds a cache of something
        else.
      TooManyBadExamples: past `data.max_bad_fraction`.
    """
    data = _checked(experiment.data, out)
    source = open_source(data.source)
    towers, pieces = _Towers.load(experiment, batch_size, dtype, devices or jax.local_devices())
    views = views_of(data, pieces.processor)
    layout = towers.layout(views)
    count = -(-len(source) // examples_per_shard)
    frozen = [n for n in flatten(towers.params) if not n.startswith("florence2/language_model/")]
    _write_manifest(out, {
        "format": FORMAT, "settings": settings_of(experiment, pieces.processor),
        "features": list(layout.features), "latent": list(layout.latent), "dtype": dtype,
        "computed_in": {"features": experiment.model.frozen_dtype,
                        "latent": experiment.model.vae_dtype},
        "num_examples": len(source), "examples_per_shard": examples_per_shard,
        "num_shards": count, "frozen": frozen,
    })  # fmt: skip
    own = range(process_index, count, process_count)
    todo = [shard for shard in own if _is_todo(out, shard, count)]
    ranges = {
        s: range(s * examples_per_shard, min((s + 1) * examples_per_shard, len(source)))
        for s in todo
    }
    total = sum(map(len, ranges.values()))
    print(
        f"{total} of {len(source)} examples to encode, {layout.num_bytes / 1e6:.2f} MB each, "
        f"{layout.num_bytes * total / 1e9:.2f} GB in all",
        flush=True,
    )
    load = functools.partial(_load, source, data, views)
    loaded = map_ahead(
        load, itertools.chain.from_iterable(ranges.values()), num_threads=data.num_threads,
        ahead=2 * towers.batch_size + data.num_threads,
    )  # fmt: skip
    log, progress = BadLog(policy_of(data, require_caption=False)), Progress(total, at=at)
    for shard, indices in ranges.items():
        rows = _logged(itertools.islice(loaded, len(indices)), log)
        _write_shard(out, shard_names(shard, count), rows, towers, layout, progress)
    if total:
        progress.close()
        if log.met:
            reasons = ", ".join(f"{reason} {n}" for reason, n in log.counts.most_common())
            print(f"{log.met} images cannot be used: {reasons}", flush=True)
    missing = sum(bool(shard_problem(out, shard, count)) for shard in range(count))
    if not missing:
        FeatureCache(out)  # says what no shard sees alone: an id that two of them have
    return missing


def _is_todo(out: pathlib.Path, shard: int, count: int) -> bool:
    """Whether a shard is still to be made; a damaged one is said, and made anew."""
    problem = shard_problem(out, shard, count)
    if problem and (out / shard_names(shard, count)[1]).is_file():
        print(f"{problem}: the shard is made anew", flush=True)
    return bool(problem)


def _checked(data: DataConfig, out: pathlib.Path) -> DataConfig:
    try:
        return dataclasses.replace(data, cache=str(out))
    except ValueError as error:
        raise CacheError(str(error)) from None


def _write_manifest(out: pathlib.Path, manifest: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    if (out / MANIFEST).is_file():
        found = differences(read_manifest(out), manifest)
        if found:
            raise CacheError(
                f"{out} holds a cache of something else; name another folder:\n  "
                + "\n  ".join(found)
            )
        return
    # Several processes may do this at once: all write the same.
    write_whole(out / MANIFEST, json.dumps(manifest, indent=1))


def _load(source: Source, data: DataConfig, views: ImageViews, index: int) -> _Loaded:
    example_id = ""
    try:
        example = source[index]
        example_id = example.id
        image = decode_image(example.encoded_image(data.limits), data.limits)
        return _Loaded(example_id, views(image))
    except BadImage as error:
        return _Loaded(example_id, error.reason)


def _logged(rows: Iterator[_Loaded], log: BadLog) -> Iterator[_Loaded]:
    for row in rows:
        log.add(((row.id, row.views),) if isinstance(row.views, Reason) else ())
        log.check()
        yield row


def _encoded(
    rows: Iterator[_Loaded], towers: _Towers
) -> Iterator[tuple[list[_Loaded], dict[str, np.ndarray]]]:
    """Batches of usable rows with their arrays; the device is one batch ahead of the disk."""
    pending: collections.deque = collections.deque()

    def finished():
        block, arrays = pending.popleft()
        return block, jax.device_get(arrays)

    while block := list(itertools.islice(rows, towers.batch_size)):
        pending.append((block, towers([row.views for row in block])))
        if len(pending) > 1:
            yield finished()
    while pending:
        yield finished()


def _write_shard(
    out: pathlib.Path,
    files: tuple[str, str],
    rows: Iterator[_Loaded],
    towers: _Towers,
    layout: Layout,
    progress: Progress,
) -> None:
    """Records first, then the list of ids that says that they are whole."""
    from array_record.python.array_record_module import ArrayRecordWriter

    bad: dict[str, str] = {}
    met: set[str] = set()
    ids: list[str] = []

    def check_id(row: _Loaded) -> None:
        if row.id in met:
            raise repeated_id(out, row.id)
        met.add(row.id)

    def usable() -> Iterator[_Loaded]:
        for row in rows:
            if isinstance(row.views, Reason):
                progress.add(1)
                if row.id:
                    check_id(row)
                    bad[row.id] = str(row.views)
            else:
                check_id(row)
                yield row

    for name in files:  # of a process that was killed; nobody else writes this shard
        remove_unfinished(out / name)
    temporary = out / f".{files[0]}.{uuid.uuid4().hex[:12]}.tmp"
    # One record a group: random access reads nothing else. Features do not compress.
    writer = ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
    try:
        for block, arrays in _encoded(usable(), towers):
            for i, row in enumerate(block):
                writer.write(layout.pack(row.id, {k: v[i] for k, v in arrays.items()}))
                ids.append(row.id)
            progress.add(len(block))
        writer.close()
        sync_file(temporary)
        size = temporary.stat().st_size
        os.replace(temporary, out / files[0])
    except BaseException:
        with contextlib.suppress(RuntimeError):  # closing writes, too: on a full disk it fails
            if writer.is_open():
                writer.close()
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(out)
    write_whole(out / files[1], json.dumps({"ids": ids, "bad": bad, "bytes": size}))


def main() -> None:
    """The command."""
    out = flags.DEFINE_string("out", None, "Folder of the cache.")
    dtype = flags.DEFINE_enum(
        "dtype", "bfloat16", ["bfloat16", "float32"], "Of the features; moments are float32."
    )
    per_shard = flags.DEFINE_integer("examples_per_shard", 1024, "Examples a file.", lower_bound=1)
    size = flags.DEFINE_integer("batch_size", BATCH_SIZE, "Images a call.", lower_bound=1)
    flags.mark_flags_as_required(["out"])

    def job(experiment: Experiment, workdir: pathlib.Path | None) -> None:
        folder, index = pathlib.Path(out.value).expanduser(), jax.process_index()
        hang_seconds = experiment.run.hang_seconds
        with Watchdog(folder / HEARTBEATS, seconds=hang_seconds, index=index) as watchdog:
            missing = build_cache(
                experiment,
                folder,
                dtype=dtype.value,
                examples_per_shard=per_shard.value,
                batch_size=size.value,
                process_index=index,
                process_count=jax.process_count(),
                at=stop_between(watchdog.at),
            )
        if missing:
            print(f"{missing} shards are missing still, of other processes", flush=True)
        else:
            print(f"whole; train with --config.data.cache={out.value}", flush=True)

    run_command(job, workdir=False)


if __name__ == "__main__":
    main()
