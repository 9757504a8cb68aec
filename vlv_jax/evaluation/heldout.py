"""What is evaluated, and the held-out examples it is evaluated on."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from core_jax.data.pipeline import evaluation_batches
from core_jax.data.sources import Example, open_source
from core_jax.gathering import in_turns, own_share
from vlv_jax.batches import policy_of, sample_index
from vlv_jax.experiment import EvaluationConfig, Experiment
from vlv_jax.host_work import Progress
from vlv_jax.inference import Autoencoder, Captioner


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is evaluated.

    Attributes:
      autoencoder: redraws.
      captioner: writes captions; None after stage 1.
      experiment: its config, with an evaluation part.
    """

    autoencoder: Autoencoder
    captioner: Captioner | None
    experiment: Experiment

    @property
    def evaluation(self) -> EvaluationConfig:
        """The evaluation part of the config."""
        if self.experiment.evaluation is None:
            raise ValueError("the config has no `evaluation` part, so nothing says on what")
        return self.experiment.evaluation

    @property
    def bootstrap(self) -> dict[str, int]:
        """How intervals are made: options of core_jax.evaluation.bootstrap."""
        config = self.evaluation
        return {"seed": config.seed, "num_resamples": config.bootstrap_samples}


def heldout_batches(
    subject: Subject, count: int, *, keep: tuple[str, ...] = ("image", "florence_image")
) -> Iterator[Mapping[str, Any]]:
    """The first `count` held-out examples in order, in batches of `sampling.batch_size`.

    Of several processes each gets every n-th batch (`core_jax.gathering.in_turns`).

    Args:
      subject: what is evaluated.
      count: examples; the source may have fewer. Unusable images are left out, not replaced.
      keep: which views.

    Yields:
      `ids`, `mask` (False where a row repeats another to fill the batch), the views, `index`
      int32, `caption` and `extras`.
    """
    views = subject.autoencoder.views
    source = open_source(subject.evaluation.source)

    def transform(image: Image.Image, example: Example, rng: np.random.Generator):
        del rng  # nothing about evaluation is random
        row: dict[str, Any] = {k: v for k, v in views(image).items() if k in keep}
        extras = dict(example.extras)
        return row | {
            "index": sample_index(example.id), "caption": example.caption or "", "extras": extras,
        }  # fmt: skip

    data, size = subject.experiment.data, subject.autoencoder.sampling.batch_size
    own = own_share(batch_slices(min(count, len(source)), size))
    with evaluation_batches(
        source,
        batch_size=size,
        indices=[i for rows in own for i in range(rows.start, rows.stop)],
        transform=transform,
        policy=policy_of(data, require_caption=False),
        num_threads=data.num_threads,
    ) as batches:
        progress = Progress(sum(rows.stop - rows.start for rows in own))
        for batch in batches:
            yield batch
            progress.add(int(batch["mask"].sum()))


def batch_slices(count: int, size: int) -> list[slice]:
    """Rows of each batch."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def in_batches(count: int, size: int, compute: Callable[[slice], Any]) -> list[Any]:
    """What a function makes of the rows of every batch, in order; processes share the batches."""
    batches = batch_slices(count, size)
    return in_turns(own_share(batches), len(batches), compute)


def collect(
    subject: Subject,
    count: int,
    compute: Callable[[Mapping[str, Any]], Mapping[str, Any]],
    *,
    keep: tuple[str, ...] = ("image", "florence_image"),
) -> dict[str, Any]:
    """Runs a function on the first `count` examples and joins what it returns, without padding.

    Args:
      subject: what is evaluated.
      count: examples; see `heldout_batches`.
      compute: batch -> arrays [b, ...] or lists of b.
      keep: which views it reads.

    Raises:
      ValueError: there was no example at all.
    """

    def picked(batch: Mapping[str, Any]) -> dict[str, Any]:
        rows = np.flatnonzero(batch["mask"])
        return {
            name: [values[i] for i in rows] if isinstance(values, list)
            else np.asarray(values)[rows]
            for name, values in compute(batch).items()
        }  # fmt: skip

    length = min(count, len(open_source(subject.evaluation.source)))
    total = len(batch_slices(length, subject.autoencoder.sampling.batch_size))
    parts: dict[str, list] = {}
    for part in in_turns(heldout_batches(subject, count, keep=keep), total, picked):
        for name, values in part.items():
            parts.setdefault(name, []).append(values)
    if not parts:
        raise ValueError("the evaluation source has no example")
    return {
        name: [x for part in rows for x in part]
        if isinstance(rows[0], list) else np.concatenate(rows)
        for name, rows in parts.items()
    }  # fmt: skip


def true_captions(caption: str, extras: Mapping[str, Any]) -> tuple[str, ...]:
    """Every reference caption of an example; sources with several keep them in its extras."""
    several = extras.get("captions")
    found = several if isinstance(several, list | tuple) and several else [caption]
    return tuple(text for text in found if text)
