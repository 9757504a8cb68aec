"""Drafters as the host sees them: parameters, a proposer, and their own form of a prompt.

Anything with these attributes is a drafter; `as_drafter` makes one of what users have:

- None: plain decoding;
- `LookupDrafter()`: no network, the text itself;
- a loaded language model (a `Target` that reads text): the conventional baseline. Image
  placeholders with their start and end markers are taken out of its prompt, and it counts
  positions of its own;
- a loaded vision-language model of the target's family with the same vision tower: it reads the
  target's prompt and shares the states of the target's tower, whose own copy it never runs;
- what `massv_jax.load_drafter` returns.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from core_jax.decode.adapters import TokenPrefix
from core_jax.decode.frontends import TextFrontend, allowed_length
from core_jax.decode.gemma3 import Gemma3Decoder, Gemma3Prompt
from core_jax.decode.qwen2_5_vl import ImagePrompt
from core_jax.decode.target import Target, TargetInputs, WindowDecoder
from massv_jax.binding import BindingError, bind, check_vocabularies
from massv_jax.pixels import pixels_of
from massv_jax.speculative.drafting import (
    LookupPrompt,
    LookupProposer,
    NetworkProposer,
    Proposer,
)

Lengths = Sequence[int] | None


class Drafter(Protocol):
    """What `SpeculativeDecoder` needs of a drafter."""

    @property
    def proposer(self) -> Proposer:
        """Its program."""
        ...

    @property
    def params(self) -> Any:
        """Parameters; None without any."""
        ...

    @property
    def tokenizer(self) -> Any:
        """To be compared with the target's; None if there is nothing to compare."""
        ...

    def prepare(self, inputs: TargetInputs, target: Target, lengths: Lengths) -> Any:
        """Its prompt.

        Args:
          inputs: the target's.
          target: the target.
          lengths: allowed lengths of prompts; see `Frontend.prepare`.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDrafter:
    """A network that drafts; see `Drafter`.

    Attributes:
      decoder: the network.
      params: its parameters.
      vocab_size: its logits.
      tokenizer: its own; None: the target's.
      make_prompt: (inputs, target, lengths) -> what `decoder.begin` takes; the target's own
        prompt if None.
      sees_images: whether it gets the states of the target's tower.
    """

    decoder: WindowDecoder
    params: Any
    vocab_size: int
    tokenizer: Any = None
    make_prompt: Callable[[TargetInputs, Target, Lengths], Any] | None = None
    sees_images: bool = True

    @property
    def proposer(self) -> NetworkProposer:
        """See `Drafter`."""
        return NetworkProposer(self.decoder, self.vocab_size, self.sees_images)

    def prepare(self, inputs: TargetInputs, target: Target, lengths: Lengths) -> Any:
        """See `Drafter`."""
        if self.make_prompt is None:
            return inputs.prompt
        return self.make_prompt(inputs, target, lengths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupDrafter:
    """Prompt lookup; see `LookupProposer`.

    Attributes:
      max_ngram, min_ngram: lengths of the n-grams that are looked up.
    """

    max_ngram: int = 3
    min_ngram: int = 1
    params: Any = None
    tokenizer: Any = None

    def __post_init__(self):
        if not 1 <= self.min_ngram <= self.max_ngram:
            raise ValueError(
                f"n-grams of {self.min_ngram} to {self.max_ngram} tokens; write 1 <= min <= max"
            )

    @property
    def proposer(self) -> LookupProposer:
        """See `Drafter`."""
        return LookupProposer(self.max_ngram, self.min_ngram)

    def prepare(self, inputs: TargetInputs, target: Target, lengths: Lengths) -> LookupPrompt:
        """See `Drafter`. Placeholders are no text and are left out."""
        rows = text_rows(inputs, target)
        longest = max(map(len, rows), default=0)
        ids = np.zeros((len(rows), allowed_length(longest, lengths) if longest else 1), np.int32)
        for row, tokens in zip(ids, rows, strict=True):
            row[: len(tokens)] = tokens
        counts = np.array([len(tokens) for tokens in rows], np.int32)
        return LookupPrompt(ids, counts)  # type: ignore[arg-type]


def text_rows(inputs: TargetInputs, target: Target) -> list[np.ndarray]:
    """Each row's tokens without padding, image placeholders and their markers."""
    keep = inputs.valid & ~np.isin(inputs.ids, target.frontend.image_ids)
    return [ids[kept] for ids, kept in zip(inputs.ids, keep, strict=True)]


def text_prompt(
    inputs: TargetInputs, target: Target, lengths: Lengths
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, valid) [B, P] of `text_rows`, padded on the left.

    A row with nothing left, as every row of VLV's captioner, begins with an end token, which is
    what separates documents in pretraining.
    """
    start = target.eos_ids[:1] or (target.pad_id,)
    rows = [row if len(row) else np.array(start) for row in text_rows(inputs, target)]
    length = allowed_length(max(map(len, rows)), lengths)
    ids = np.full((len(rows), length), target.pad_id, np.int32)
    for row, tokens in zip(ids, rows, strict=True):
        row[length - len(tokens) :] = tokens
    counts = np.array([[len(tokens)] for tokens in rows])
    return ids, np.arange(length)[None] >= length - counts


def text_drafter(model: Target) -> ModelDrafter:
    """The conventional text-only drafter: a language model as it is.

    Raises:
      ValueError: the model reads images.
    """
    frontend = model.frontend
    if not isinstance(frontend, TextFrontend):
        raise ValueError(f"a {model.model_type} reads images; give a language model")
    make = frontend.make_prompt

    def make_prompt(inputs: TargetInputs, target: Target, lengths: Lengths) -> Any:
        return make(*text_prompt(inputs, target, lengths))

    return ModelDrafter(
        decoder=model.decoder, params=model.params, vocab_size=model.vocab_size,
        tokenizer=model.tokenizer, make_prompt=make_prompt, sees_images=False,
    )  # fmt: skip


def as_drafter(drafter: Any, target: Target) -> Drafter | None:
    """A drafter of anything that the module's docstring lists.

    Raises:
      BindingError: it was made for another target, or its tokenizer or its vision tower is not
        the target's.
      TypeError: it is nothing of the kind.
    """
    if drafter is None:
        return None
    if isinstance(drafter, Target):
        made = _of_model(drafter, target)
    elif all(hasattr(drafter, name) for name in ("drafter", "params", "companions")):
        made = _of_parts(drafter, target)
    elif hasattr(drafter, "proposer") and hasattr(drafter, "prepare"):
        made = drafter
    else:
        raise TypeError(
            f"{type(drafter).__name__} is no drafter; give None, a LookupDrafter, a loaded model "
            "(core_jax.decode.target.load_target), or what massv_jax.load_drafter returns"
        )
    _check_tokenizer(made, target)
    return made


def _check_tokenizer(drafter: Any, target: Target) -> None:
    if drafter.tokenizer is None or drafter.tokenizer is target.tokenizer:
        return
    check_vocabularies(
        target.tokenizer, drafter.tokenizer, vocab_size=drafter.proposer.vocab_size,
        hidden=target.frontend.image_ids,
    )  # fmt: skip


def _of_model(model: Target, target: Target) -> ModelDrafter:
    if isinstance(model.frontend, TextFrontend):
        return text_drafter(model)
    if model.model_type != target.model_type:
        raise BindingError(
            f"a {model.model_type} cannot draft for a {target.model_type}: it must share the "
            "target's vision tower; give a language model, or a drafter of the target's family"
        )
    _check_same_sight(model, target)
    return ModelDrafter(
        decoder=model.decoder, params=model.params, vocab_size=model.vocab_size,
        tokenizer=model.tokenizer,
    )  # fmt: skip


def _check_same_sight(model: Target, target: Target) -> None:
    """Whether a model of the target's family can read the states of the target's tower."""
    if model.directory is None or target.directory is None or model.directory == target.directory:
        return
    its, ours = bind(target.directory, target.tokenizer), bind(model.directory, model.tokenizer)
    # Other weights are what a drafter is for, and vocabularies may have more tokens than another.
    ours = dataclasses.replace(ours, weights=its.weights, tokenizer=its.tokenizer)
    ours.check(its, where=str(model.directory))


def _of_parts(parts: Any, target: Target) -> ModelDrafter:
    from massv_jax.companions import load_tokenizer
    from massv_jax.loading import TARGET_MERGER

    if target.directory is not None:
        found = bind(target.directory, target.tokenizer, pixels_of(target))
        parts.binding.check(found, where=str(parts.companions))
    drafter, params = parts.drafter, parts.params
    if TARGET_MERGER in params and "visual" in target.params:  # its own: on the devices once
        params = {**params, TARGET_MERGER: target.params["visual"]["merger"]}
    return ModelDrafter(
        decoder=drafter.decoder,
        params=drafter.decoder_params(params),
        vocab_size=drafter.config.vocab_size,
        tokenizer=load_tokenizer(parts.companions),
        make_prompt=_OwnView(drafter),
        sees_images=drafter.sees_images,
    )


@dataclasses.dataclass(frozen=True)
class _OwnView:
    """Prompts of drafters that pool image tokens or see none (massv_jax.draft_prompts)."""

    drafter: Any

    def __call__(self, inputs: TargetInputs, target: Target, lengths: Lengths) -> Any:
        config = self.drafter.config
        if config.kind == "text":
            ids, valid = text_prompt(inputs, target, lengths)
            gemma = isinstance(self.drafter.decoder, Gemma3Decoder)
            prompt: Any = Gemma3Prompt if gemma else TokenPrefix
            return prompt(ids, valid)
        if config.pooling == 1:
            return inputs.prompt
        return self._pooled(inputs, target, lengths)

    def _pooled(self, inputs: TargetInputs, target: Target, lengths: Lengths) -> Any:
        from massv_jax.draft_prompts import PoolingPrompt, draft_view, pooling_leaders

        config, prompt, places = self.drafter.config, inputs.prompt, None
        if isinstance(prompt, ImagePrompt):
            from core_jax.models.qwen2_5_vl import PromptPlaces

            places = PromptPlaces(*map(np.asarray, (
                prompt.positions, prompt.next_positions, prompt.image_slots)))  # fmt: skip

        def view(length: int | None) -> Any:
            return draft_view(
                config, inputs.ids, inputs.valid, places, inputs.packed, length=length,
                pad_id=target.pad_id,
            )  # fmt: skip

        made = view(None)
        made = view(allowed_length(made.ids.shape[1], lengths))
        if made.places is None:
            prompt_type: Any = Gemma3Prompt
            return prompt_type(made.ids, made.valid)
        leaders = np.zeros((1, 1), np.int32)
        if inputs.packed is not None:
            leaders = pooling_leaders(config, inputs.packed)
        own = ImagePrompt.at(made.ids, made.places, valid=made.valid)
        return PoolingPrompt(own, leaders)  # type: ignore[arg-type]
