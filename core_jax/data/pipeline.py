"""Batches whose position in the data is the training step.

The order of the examples is a function of (seed, position) alone: the batch at step s is the same
global set for any number of processes, and resuming at step s needs no iterator state. Reading and
decoding run in threads ahead of the consumer, and the time it still had to wait is measured.
"""

from __future__ import annotations

import dataclasses
import itertools
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import grain
import numpy as np
from PIL import Image

from core_jax.data.bad import BadLog, DataPolicy
from core_jax.data.images import BadImage, Reason, decode_image
from core_jax.data.resize import CropSpec, crop_image
from core_jax.data.sources import EmptySourceError, Example, Source

# (decoded RGB image, its example, generator keyed by (seed, position)) -> one row of the batch.
# Arrays and numbers are stacked, anything else becomes a list. It may raise BadImage.
Transform = Callable[[Image.Image, Example, np.random.Generator], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class WithoutImage:
    """A transform from the example alone: its image is neither read nor decoded.

    For rows whose images were encoded before. A `BadImage` that `row` raises is treated as
    decoding's would be, so such batches can have the order and the replacements of ordinary ones.
    """

    row: Callable[[Example], Mapping[str, Any]]


def image_transform(crop: CropSpec) -> Transform:
    """A transform to {"image": uint8 [size, size, 3], "caption": str ("" where there is none)}."""

    def transform(image: Image.Image, example: Example, rng: np.random.Generator) -> dict[str, Any]:
        return {"image": np.asarray(crop_image(image, crop, rng)), "caption": example.caption or ""}

    return transform


def make_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    transform: Transform | WithoutImage,
    policy: DataPolicy | None = None,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
    prefetch_batches: int = 2,
    epochs: int | None = None,
    shuffle: bool = True,
) -> BatchIterator:
    """Training batches from step `start_step` on, reshuffled every epoch.

    A bad example is listed and replaced by another, drawn from (seed, position) alone, so all
    processes, and a resumed run, agree on it.

    Args:
        source: Where examples come from.
        batch_size: Global batch; each process gets rows [i * b, (i + 1) * b), b = batch_size /
            process_count, of the same global batch.
        seed: Of the order, of the replacements and of the transform's generator.
        start_step: The first step to give; the data position is nothing else.
        transform: From a decoded image (or from the bare example) to one row.
        policy: What is accepted, and when too much was refused.
        process_index: This process.
        process_count: All processes.
        num_threads: Threads that read and decode; 0 decodes in the collating thread.
        prefetch_batches: Batches kept ready.
        epochs: Stops after this many passes (the remainder is dropped); None never stops.
        shuffle: False keeps the source's order.

    Returns:
        An iterator over {"ids": list of b texts, ...}, with `data_wait_seconds`, `bad` and `close`.

    Raises:
        EmptySourceError: The source holds no example.
        ValueError: A batch that does not divide among the processes, or a source too small for
            one batch within `epochs`.
    """
    rows = _rows_per_process(batch_size, process_index, process_count)
    if not len(source):
        raise EmptySourceError("the data source holds no example; look at its path and split")
    order = grain.MapDataset.range(len(source))
    if shuffle:
        # Grain's epoch e of seed s is epoch e + 1 of seed s - 1, so seeds are spread out first.
        order = order.shuffle(seed=int(np.random.SeedSequence(seed).generate_state(1)[0]))
    order = order.repeat(epochs)
    steps = sys.maxsize // (2 * batch_size) if epochs is None else len(order) // batch_size
    if steps < 1:
        raise ValueError(f"{len(source)} examples in {epochs} epochs make no batch of {batch_size}")
    policy = policy or DataPolicy()
    loader = _Loader(source, transform, policy, seed, replace=True)

    def row_at(own: int) -> _Row:
        step, row = divmod(own, rows)
        position = step * batch_size + process_index * rows + row
        return loader.load(position, cast(int, order[position]))

    dataset = grain.MapDataset.range(steps * rows).map(row_at)
    collate = _Collator(rows, BadLog(policy), template=None)
    return BatchIterator(
        _threaded(dataset[start_step * rows :], num_threads, rows, prefetch_batches),
        collate, rows, prefetch_batches, start_step, steps,
    )  # fmt: skip


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    transform: Transform,
    policy: DataPolicy | None = None,
    indices: Sequence[int] | None = None,
    seed: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 8,
    prefetch_batches: int = 2,
) -> BatchIterator:
    """One pass in order, every example exactly once, all batches of one shape.

    Rows that hold no example (the end of the last batch, a bad image) repeat a good row and have
    `mask` False, so they can be computed and thrown away.

    Args:
        source: Where examples come from.
        batch_size: Global batch, shared among processes as in `make_batches`.
        transform: From a decoded image to one row.
        policy: What is accepted; `max_bad_fraction=1.0` never stops.
        indices: The examples to take, in this order (a resumed job leaves the done ones out).
        seed: Of the transform's generator.
        process_index: This process.
        process_count: All processes; every one gets the same number of batches.
        num_threads: Threads that read and decode.
        prefetch_batches: Batches kept ready.

    Returns:
        An iterator over {"ids": texts ("" in the padding), "mask": bool [b], "reasons": a `Reason`
        for each bad row and None elsewhere, ...}.
    """
    rows = _rows_per_process(batch_size, process_index, process_count)
    chosen = range(len(source)) if indices is None else indices
    steps = -(-len(chosen) // batch_size)
    policy = policy or DataPolicy()
    loader = _Loader(source, transform, policy, seed, replace=False)

    def row_at(own: int) -> _Row:
        step, row = divmod(own, rows)
        position = step * batch_size + process_index * rows + row
        if position >= len(chosen):
            return _Row("", None, ())
        return loader.load(position, int(chosen[position]))

    def template() -> Mapping[str, Any] | None:
        loaded = (loader.load(i, int(chosen[i])).values for i in range(len(chosen)))
        return next((values for values in loaded if values is not None), None)

    collate = _Collator(rows, BadLog(policy), template)
    dataset = grain.MapDataset.range(steps * rows).map(row_at)
    threaded = _threaded(dataset, num_threads, rows, prefetch_batches)
    return BatchIterator(threaded, collate, rows, prefetch_batches, 0, steps)


def replacement_index(seed: int, position: int, attempt: int, length: int) -> int:
    """Which example stands in at `position` after `attempt` (from 1) bad ones."""
    words = np.random.SeedSequence([seed, position, attempt]).generate_state(1, np.uint64)
    return int(words[0] % np.uint64(length))


@dataclasses.dataclass(frozen=True)
class _Row:
    id: str
    values: Mapping[str, Any] | None  # None: padding, or bad without a replacement
    bad: tuple[tuple[str, Reason], ...]


@dataclasses.dataclass(frozen=True)
class _Loader:
    source: Source
    transform: Transform | WithoutImage
    policy: DataPolicy
    seed: int
    replace: bool

    def load(self, position: int, index: int) -> _Row:
        bad: list[tuple[str, Reason]] = []
        example_id = ""
        for attempt in range(self.policy.max_attempts if self.replace else 1):
            if attempt:
                index = replacement_index(self.seed, position, attempt, len(self.source))
            try:
                example = self.source[index]
                example_id = example.id
                return _Row(example_id, self._values(example, position, attempt), tuple(bad))
            except BadImage as error:
                bad.append((example_id, error.reason))
            except Exception as error:
                # Not the image's fault (a disk, a bug): going on would change the data order.
                error.add_note(f"while loading example {index} (id {example_id!r}) of the source")
                raise
        return _Row(example_id, None, tuple(bad))

    def _values(self, example: Example, position: int, attempt: int) -> Mapping[str, Any]:
        if self.policy.require_caption and not (example.caption or "").strip():
            raise BadImage(Reason.NO_CAPTION)
        if isinstance(self.transform, WithoutImage):
            return self.transform.row(example)
        image = decode_image(example.encoded_image(self.policy.limits), self.policy.limits)
        rng = np.random.default_rng([self.seed, position, attempt])
        return self.transform(image, example, rng)


class _Collator:
    """Rows to a batch, and the book-keeping of bad ones, in the order of the data."""

    def __init__(self, rows: int, log: BadLog, template: Callable[[], Any] | None):
        self.rows, self.log = rows, log
        self._find_template, self._template = template, None

    def __call__(self, rows: list[_Row]) -> dict[str, Any]:
        for row in rows:
            if row.id:
                self.log.add(row.bad)
        self.log.check()
        if self._find_template is None:
            values = []
            for row in rows:
                if row.values is None:
                    raise self.log.error(f"no usable replacement after {len(row.bad)} attempts")
                values.append(row.values)
            return {"ids": [row.id for row in rows], **_stack(values)}
        return {
            "ids": [row.id for row in rows],
            "mask": np.array([row.values is not None for row in rows]),
            "reasons": [row.bad[-1][1] if row.bad else None for row in rows],
            **_stack([self._filled(row, rows) for row in rows]),
        }

    def _filled(self, row: _Row, rows: list[_Row]) -> Mapping[str, Any]:
        if row.values is not None:
            return row.values
        if self._template is None:
            self._template = next((r.values for r in rows if r.values is not None), None)
        if self._template is None and self._find_template is not None:
            self._template = self._find_template()
        if self._template is None:
            raise self.log.error("not one example could be used")
        return self._template


def _stack(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    for key in rows[0]:
        values = [row[key] for row in rows]
        numeric = isinstance(values[0], (np.ndarray, np.generic, int, float, bool))
        batch[key] = np.stack([np.asarray(value) for value in values]) if numeric else values
    return batch


class BatchIterator(Iterator[dict[str, Any]]):
    """Collates in a background thread and measures how long the consumer waits.

    Attributes:
        step: Number of the batch that `next` gives next.
        steps: Number of the batch after the last one.
        data_wait_seconds: Seconds that all calls of `next` so far waited.
        last_wait_seconds: Seconds that the last one waited.
    """

    def __init__(
        self,
        rows: Iterator[_Row],
        collate: _Collator,
        rows_per_batch: int,
        prefetch_batches: int,
        start_step: int,
        steps: int,
    ):
        self.step, self.steps = start_step, steps
        self.data_wait_seconds = self.last_wait_seconds = 0.0
        self._log = collate.log
        self._queue: queue.Queue = queue.Queue(maxsize=max(1, prefetch_batches))
        self._stop = threading.Event()
        self._finished: BaseException | None = None
        # The thread holds no reference to this object, so dropping it ends the thread.
        self._thread = threading.Thread(
            target=_produce,
            args=(rows, collate, rows_per_batch, self._queue, self._stop),
            name="data-batches",
            daemon=True,
        )
        self._thread.start()

    @property
    def bad(self) -> BadLog:
        """Bad examples so far (those of prefetched batches included)."""
        return self._log

    def __next__(self) -> dict[str, Any]:
        if self._finished is not None:
            raise self._finished
        started = time.perf_counter()
        item = self._queue.get()
        self.last_wait_seconds = time.perf_counter() - started
        self.data_wait_seconds += self.last_wait_seconds
        if isinstance(item, BaseException):
            self._finished = item
            raise item
        self.step += 1
        return item

    def close(self) -> None:
        """Ends the background threads; `next` stops afterwards."""
        self._stop.set()
        self._finished = StopIteration()
        while self._thread.is_alive():
            try:  # a producer that waits for room sees the stop only once there is some
                self._queue.get_nowait()
            except queue.Empty:
                self._thread.join(0.01)

    def __enter__(self) -> BatchIterator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self):
        self._stop.set()


def _produce(rows, collate, rows_per_batch, out: queue.Queue, stop: threading.Event) -> None:
    def put(item: Any) -> None:
        while not stop.is_set():
            try:
                return out.put(item, timeout=0.1)
            except queue.Full:
                continue
        return None

    iterator = iter(rows)
    try:
        while not stop.is_set():
            batch = list(itertools.islice(iterator, rows_per_batch))
            if len(batch) < rows_per_batch:
                put(StopIteration())
                return
            put(collate(batch))
    except BaseException as error:  # handed to the consumer, at its place in the order
        put(error)
    finally:
        if hasattr(iterator, "close"):
            iterator.close()


def _threaded(dataset: grain.MapDataset, num_threads: int, rows: int, batches: int) -> Any:
    options = grain.ReadOptions(
        num_threads=num_threads, prefetch_buffer_size=max(num_threads, rows * batches, 1)
    )
    return dataset.to_iter_dataset(options)


def _rows_per_process(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(f"batch_size {batch_size} does not divide among {process_count} processes")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not in 0..{process_count - 1}")
    return batch_size // process_count
