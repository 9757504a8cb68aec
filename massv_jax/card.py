"""README.md of an exported drafter: what it is for, how it was made, how to use it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from massv_jax.loading import DrafterParts
from massv_jax.pixels import NAMES

_HEAD = """---
library_name: {library}
pipeline_tag: image-text-to-text
license: other
tags: [massv, speculative-decoding, drafter, jax]
---
# Drafter for {target}

A small multimodal model that drafts tokens which {target} verifies (MASSV, arXiv 2505.10526). The
output is the target's own; only the number of its passes changes. It shares the target's vision
tower, and is of no use for another target: `massv_config.json` has the target's fingerprints, which
are checked when it is loaded.

## Use
```python
from core_jax.decode.target import load_target
from massv_jax import SpeculativeDecoder, limit_pixels, load_drafter

target = limit_pixels(load_target("path/of/{target}"), {limits})
drafter = load_drafter("this/directory", "path/of/{target}", loaded=target)
decoder = SpeculativeDecoder(target, drafter)
answers = decoder.generate(["photo.jpg"], ["What is in the picture?"], max_new_tokens=256)
print(answers.texts[0])
```
"""
_STOCK = """
### In transformers
This is a stock hub directory; transformers loads it and takes it as `assistant_model`, and the
target's greedy output stays what it is. But transformers (5.20 to 5.24) hides the image from an
assistant: its prefill does not count as a first iteration, and image inputs are dropped in all
others. It then drafts blindly. These lines put the image back:
```python
import types

def sighted(drafter, **images):
    prepare = drafter.prepare_inputs_for_generation

    def with_images(self, input_ids, is_first_iteration=False, **kwargs):
        cache = kwargs.get("cache", kwargs.get("past_key_values"))  # its name since 5.24; before
        first = cache is None or cache.get_seq_length() == 0
        kwargs.pop("mm_encoder_outputs", None)
        if first:
            kwargs.update(images)
        return prepare(input_ids, is_first_iteration=first, **kwargs)

    drafter.prepare_inputs_for_generation = types.MethodType(with_images, drafter)
    return drafter

images = {{k: v for k, v in inputs.items() if k in ("pixel_values", "image_grid_thw")}}
target.generate(**inputs, assistant_model=sighted(drafter, **images))
```
"""
_OWN = """
This is a MASSV directory: no stock architecture of a hub has {reason}, so only this project reads
it. `language_model/` alone is an ordinary text model.
"""
_REASONS = {
    "mlp": "a projector on the target's merged image tokens",
    "prefix": "a projector on another model's prefix",
    "text": "anything to say about images here",
}
_LICENCES = """
## Licences
The weights are derived from other people's, whose terms apply: those of the language model (Qwen2.5
0.5B, 1.5B and 7B: Apache-2.0, 3B: Qwen Research License; Gemma: its terms of use), of the target
whose tower {copied}, and of the data. Answers that a model wrote carry that model's terms.
"""


def drafter_card(
    parts: DrafterParts, *, stock: bool, facts: Mapping[str, Any], report: Mapping[str, Any]
) -> str:
    """The card's text.

    Args:
      parts: the drafter.
      stock: whether it is a stock hub directory.
      facts: what else to list, such as the step and the training data.
      report: the content of report.json; may be empty.
    """
    config = parts.drafter.config
    reason = _REASONS.get(config.kind, f"pooling of image tokens ({config.pooling} x "
                                       f"{config.pooling})")  # fmt: skip
    rows = {
        "kind": config.kind, "pooling": config.pooling, "target": parts.binding.name,
        "target weights (SHA-256)": parts.binding.weights,
        "vision tower (SHA-256)": parts.binding.tower or "none",
        "images": dict(parts.binding.pixels) or "no limits", **facts,
    }  # fmt: skip
    return "".join([
        _HEAD.format(target=parts.binding.name, library="transformers" if stock else "massv_jax",
                     limits={n: v for n, v in parts.binding.pixels.items() if n in NAMES}),
        _STOCK.format() if stock else _OWN.format(reason=reason),
        "\n## How it was made\n",
        *(f"- {name}: {value}\n" for name, value in rows.items()),
        *_numbers(report),
        _LICENCES.format(copied="is part of this directory" if stock else "it was trained behind"),
    ])  # fmt: skip


def _numbers(report: Mapping[str, Any]) -> Iterator[str]:
    if report:
        yield "\n## Measured\n```json\n"
        yield json.dumps(report, indent=2, default=str)[:4000]
        yield "\n```\n"
