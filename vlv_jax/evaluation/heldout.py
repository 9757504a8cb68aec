"""What is evaluated, and the held-out examples it is evaluated on."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from PIL import Image

from core_jax.data.pipeline import evaluation_batches
from core_jax.data.sources import Example, open_source
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

    data = subject.experiment.data
    with evaluation_batches(
        source,
        batch_size=subject.autoencoder.sampling.batch_size,
        indices=range(min(count, len(source))),
        transform=transform,
        policy=policy_of(data, require_caption=False),
        num_threads=data.num_threads,
    ) as batches:
        progress = Progress(min(count, len(source)))
        for batch in batches:
            yield batch
            progress.add(int(batch["mask"].sum()))


def collect(
    batches: Iterator[Mapping[str, Any]], compute: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> dict[str, Any]:
    """Runs a function on every batch and joins what it returns, without the padding.

    Args:
      batches: from `heldout_batches`.
      compute: batch -> arrays [b, ...] or lists of b.

    Raises:
      ValueError: there was no example at all.
    """
    parts: dict[str, list] = {}
    for batch in batches:
        keep = np.flatnonzero(batch["mask"])
        for name, values in compute(batch).items():
            is_list = isinstance(values, list)
            picked = [values[i] for i in keep] if is_list else np.asarray(values)[keep]
            parts.setdefault(name, []).append(picked)
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
