"""What decoding by windows needs of a network, and where implementations are found.

A *target* is a model that answers prompts, with or without images. Drafters (massv_jax) save it
passes; for that they need no more of it than this:

    images, prompts -- frontend.prepare (host) --> TargetInputs
    vision        = decoder.encode_images(params, inputs.images)      once; drafters share it
    logits, state = decoder.begin(params, inputs.prompt, vision, ...)
    logits, state = decoder.extend(params, state, tokens [B, T])      a window, T >= 1
    state         = decoder.rewind(state, ends)                       rows forget their last tokens

`load_target(directory)` finds the implementation for a model type among the entry points of the
group `core_jax.targets`. Another package registers its own in its setup.py:

    entry_points={"core_jax.targets": ["my_type = my_package.target:load"]}

where `load(path, **options) -> Target` takes what `load_target` takes.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

ENTRY_POINTS = "core_jax.targets"

State = Any
Vision = Any
Message = Mapping[str, Any]
Prompt = str | Sequence[Message]


class TargetError(ValueError):
    """No target can be made of a directory, or of what it is asked; the message has the remedy."""


class WindowDecoder(Protocol):
    """A network as decoding by windows sees it: hashable, without arrays, pure under `jit`.

    Parameters and states are any pytrees.
    """

    def encode_images(self, params: Any, images: Any) -> Vision:
        """States of the frozen vision tower, before any projector: what drafters share."""
        ...

    def begin(
        self, params: Any, prompt: Any, vision: Vision, *, max_new_tokens: int, window: int
    ) -> tuple[Any, State]:
        """Runs the prompts.

        Args:
          params: of the network.
          prompt: a pytree from a frontend; its rows may differ in length and in whether they have
            images.
          vision: from `encode_images`; None where no row has an image.
          max_new_tokens: longest answer.
          window: the most drafts that are checked at a time: a state can be rewound by
            window + 1 tokens. 0 promises that it never is and that all rows advance together,
            which some caches do faster.

        Returns:
          Logits [B, V] of the first new token, and a state with room for the answer and a window.
        """
        ...

    def extend(self, params: Any, state: State, tokens: Any) -> tuple[Any, State]:
        """Appends int32 [B, T] tokens of text: logits [B, T, V] after each of them."""
        ...

    def ends(self, state: State) -> Any:
        """int32 [B]: a mark that grows by one with each token. Only differences mean anything."""
        ...

    def rewind(self, state: State, end: Any) -> State:
        """Forgets what each row got after its mark was `end` [B]."""
        ...


@dataclasses.dataclass(frozen=True)
class TargetInputs:
    """Prompts and images as arrays.

    Attributes:
      prompt: what the decoder's `begin` takes.
      images: what its `encode_images` takes; None where no row has an image.
      ids: int32 [B, P], the tokens; what stands for an image is in the frontend's `image_ids`.
      valid: bool [B, P], False at padding.
      packed: how images were packed, where they are (Qwen2.5-VL's `PackedImages`): drafters that
        pool image tokens need their grids.
    """

    prompt: Any
    images: Any
    ids: np.ndarray
    valid: np.ndarray
    packed: Any = None


class Frontend(Protocol):
    """From text and images to arrays; on the host."""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, transformers'."""
        ...

    @property
    def image_ids(self) -> tuple[int, ...]:
        """Tokens that stand for an image, begin it or end it: what a text-only model must not see.

        Empty where images take no tokens' places.
        """
        ...

    def render(self, prompt: Prompt, num_images: int) -> str:
        """A question (its images come first), or messages, in the chat template."""
        ...

    def prepare(
        self,
        texts: Sequence[str],
        images: Sequence[Sequence[Any]],
        *,
        lengths: Sequence[int] | None = None,
    ) -> TargetInputs:
        """Arrays of a batch.

        Args:
          texts: from `render`, or already so.
          images: those of each row, in order: Pillow images, uint8 arrays [H, W, 3], paths or
            encoded bytes.
          lengths: allowed values of P, of which the smallest that fits is taken; the longest
            prompt's own by default.

        Raises:
          ValueError: images and their places in a text do not match, or a prompt does not fit.
        """
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A model that can be decoded by windows.

    Attributes:
      model_type: as in config.json.
      decoder: the network.
      params: its parameters.
      frontend: its preprocessing.
      vocab_size: V, logits of the network (padding included).
      max_positions: tokens of prompt and answer together.
      eos_ids: tokens that end an answer.
      pad_id: fills rows after their end.
      directory: what it was loaded from, for those who compare it with others; None: not said.
    """

    model_type: str
    decoder: WindowDecoder
    params: Any
    frontend: Frontend
    vocab_size: int
    max_positions: int
    eos_ids: tuple[int, ...]
    pad_id: int
    directory: pathlib.Path | None = None

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, transformers'."""
        return self.frontend.tokenizer


def registered_targets() -> dict[str, importlib.metadata.EntryPoint]:
    """Model type -> entry point, of every installed package; the first on the path wins."""
    found: dict[str, importlib.metadata.EntryPoint] = {}
    # `importlib.metadata.entry_points` would let the stale metadata of an earlier build in a
    # checkout hide those of the package that is installed.
    for distribution in importlib.metadata.distributions():
        for point in distribution.entry_points.select(group=ENTRY_POINTS):
            found.setdefault(point.name, point)
    return found


def load_target(path: str | os.PathLike, **options: Any) -> Target:
    """The target that a directory holds.

    Args:
      path: a hub directory, whose config.json names the model type; or a composite one with
        `<model type>_config.json` in its place, such as VLV's export.
      **options: of the implementation; ours take `dtype` (of the parameters), `mesh`, `rules`
        (both as `load_model` does) and `execution`.

    Raises:
      FileNotFoundError: there is no configuration.
      TargetError: no implementation is registered for the model type.
    """
    path = pathlib.Path(path)
    known = registered_targets()
    name = model_type_of(path, known)
    if name not in known:
        raise TargetError(
            f"{path} holds a model of type {name!r}; targets are registered for "
            f"{', '.join(sorted(known)) or 'nothing (is the package installed?)'}. A package adds "
            f'one with entry_points={{"{ENTRY_POINTS}": ["{name} = package.module:load"]}} in its '
            "setup.py (core_jax.decode.target says what `load` returns)"
        )
    return known[name].load()(path, **options)


def model_type_of(path: pathlib.Path, known: Mapping[str, Any]) -> str:
    """`model_type` in config.json, or the name of a composite directory's configuration.

    Args:
      path: the directory.
      known: model types by name, of which `<name>_config.json` is looked for.

    Raises:
      FileNotFoundError: neither is there. An adapter's directory gets a message of its own.
      TargetError: config.json names no model type.
    """
    file = path / "config.json"
    if not file.is_file():
        for name in sorted(known):
            if (path / f"{name}_config.json").is_file():
                return name
        if (path / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"{path} holds an adapter (adapter_config.json) without its model; merge it into "
                "the model first (peft's merge_and_unload) and save that"
            )
        raise FileNotFoundError(f"{file} is missing; is {path} a hub model directory?")
    name = json.loads(file.read_text()).get("model_type")
    if not name:
        raise TargetError(f"{file} names no model_type; is it of a language model?")
    return name
