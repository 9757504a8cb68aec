"""README.md of an exported model: what it is, how it was made, how good it is, what it may be."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from vlv_jax.experiment import Experiment

_HEAD = """---
library_name: vlv_jax
pipeline_tag: {task}
license: other
tags: [vlv, caption-embeddings, jax]
---
# {title}

{origin} VLV (arXiv 2507.07104) reads an image with Florence-2 and {queries} learnable queries into
caption embeddings, from which a frozen Stable Diffusion redraws it{reads}.

## Use
```python
{example}
```
Each folder is also a model of its own: `florence2/` and `language_model/` load in transformers,
`stable-diffusion/` in diffusers.
"""
_REDRAW = """from vlv_jax import Autoencoder

model = Autoencoder.from_pretrained("this/directory")
embeddings = model.encode(["photo.jpg"])   # [1, {queries}, E]
images = model.reconstruct(embeddings)     # uint8 [1, {size}, {size}, 3]"""
_CAPTION = """from vlv_jax import Captioner

captions = Captioner.from_pretrained("this/directory").caption(["photo.jpg"])
print(captions[0].text)"""
_LICENCES = """
## Licences
The weights are derived from other people's, whose terms apply to them:

| part | usual source | terms |
|---|---|---|
| `florence2/` | microsoft/Florence-2 | MIT |
| `stable-diffusion/` | Stable Diffusion 2.1-base | CreativeML Open RAIL++-M; its use-based \
restrictions pass on to derivatives. The original repository was withdrawn in November 2025, \
mirrors are unofficial |
{language}
The code that wrote this directory is Apache-2.0, as is the authors' released VLV code. Check the
licence files in the folders and those of the training data: LAION's metadata is CC-BY-4.0, the
images are third parties'; captions that another model wrote carry that model's terms. Stand-ins of
the miniature world have no such sources.
"""
_LANGUAGE = """| `language_model/` | Qwen2.5 | 0.5B, 1.5B and 7B: Apache-2.0. \
**3B: Qwen Research License, non-commercial** |
"""


def model_card(
    experiment: Experiment,
    *,
    has_language_model: bool,
    origin: str,
    facts: Mapping[str, Any],
    report: Mapping[str, Any],
) -> str:
    """The card's text.

    Args:
      experiment: how the model was made.
      has_language_model: whether it can caption.
      origin: a sentence about where the weights come from.
      facts: what else to list, such as the step.
      report: the content of report.json; may be empty.
    """
    queries, size = experiment.model.num_queries, experiment.data.image_size
    example = _REDRAW.format(queries=queries, size=size)
    if has_language_model:
        example = f"{_CAPTION}\n\n{example}"
    parts = [
        _HEAD.format(
            task="image-to-text" if has_language_model else "image-to-image",
            title="VLV captioner" if has_language_model else "VLV autoencoder",
            origin=origin,
            queries=queries,
            reads=" and a language model reads the caption" if has_language_model else "",
            example=example,
        ),
        _training(experiment, facts),
        _numbers(report),
        _LICENCES.format(language=_LANGUAGE if has_language_model else ""),
        "\n## Configuration\n```json\n",
        json.dumps(dataclasses.asdict(experiment), indent=2, default=str),
        "\n```\n",
    ]
    return "".join(parts)


def _training(experiment: Experiment, facts: Mapping[str, Any]) -> str:
    data, model = experiment.data, experiment.model
    rows = {
        **facts,
        "Florence-2": model.florence2,
        "diffusion model": model.diffusion,
        "language model": model.language_model or "none",
        "data": data.source.path or data.source.name or "",
        "batch size": data.batch_size,
        "image side": f"{data.image_size} px, {data.crop} crop, {data.resample}",
        "started from": experiment.run.init_from or "the pretrained networks",
    }
    lines = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items())
    return f"\n## How it was made\n| | |\n|---|---|\n{lines}\n"


def _numbers(report: Mapping[str, Any]) -> str:
    rows = [
        f"| {name} | {m['value']:.4g} | {_interval(m)} | {m['n']} |"
        for name, m in sorted(metrics_of(report))
        if isinstance(m["value"], int | float)
    ]
    if not rows:
        return "\n## Measured\nNothing yet: `python -m vlv_jax.evaluate` writes a report.\n"
    table = "\n".join(["| metric | value | 95 % interval | n |", "|---|---|---|---|", *rows])
    return f"\n## Measured\n{table}\n"


def metrics_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping]]:
    """Every (dotted name, metric) of a report.json."""
    for name, value in tree.items():
        if not isinstance(value, Mapping) or (not prefix and name == "report"):
            continue
        path = f"{prefix}.{name}" if prefix else name
        if "value" in value and "n" in value:
            yield path, value
        else:
            yield from metrics_of(value, path)


def _interval(metric: Mapping[str, Any]) -> str:
    interval = metric.get("interval")
    if not interval or any(end is None for end in interval):
        return ""
    return f"{interval[0]:.4g} to {interval[1]:.4g}"


def _cell(value: Any) -> str:
    return " ".join(str(value).replace("|", "\\|").split())
