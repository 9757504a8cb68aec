"""The vision-language stand-ins as one thing to train: pictures and rows of tokens to logits."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer

from core_jax.data.gemma3_processor import Gemma3Processor, gemma3_image_processor
from core_jax.data.llava import Turn
from core_jax.data.llava_tokens import Tokens, chat_tokens, text_answer
from core_jax.data.qwen2_5_vl_images import Qwen2_5_VLImageProcessor
from core_jax.data.qwen2_5_vl_processor import Qwen2_5_VLProcessor
from core_jax.models import gemma3, qwen2_5_vl
from core_jax.models.family import Family
from core_jax.ops.attention import causal_mask
from core_jax.ops.execution import Execution
from miniature import standins
from miniature.world.dialogues import Turns

_SIDE = standins.TARGET_IMAGE_SIZE // standins.TARGET_PATCH_SIZE  # patches
_EXECUTION = Execution(unroll=8)


class Reader(Protocol):
    """A target in training; every row has one picture."""

    family: Family
    model: Any
    preprocessor: Mapping[str, Any]

    def tokens(self, turns: Turns) -> Tokens:
        """A conversation about a picture."""
        ...

    def places(self, ids: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
        """What the model has to know beside the tokens, a row for each row."""
        ...

    def features(self, params: Any, pixels: jax.Array) -> jax.Array:
        """The tower's features [B, 12, 12, D] of pixels of 0..255 [B, 64, 64, 3]."""
        ...

    def logits(self, params: Any, features: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Logits [B, T, V]."""
        ...


_FILTERS = {2: "linear", 3: "cubic"}  # Pillow's numbers


def enlarged(pixels: jax.Array, preprocessor: Mapping[str, Any]) -> jax.Array:
    """Pixels of 0..255 [B, 64, 64, 3] as the image processor gives them: [B, 72, 72, 3]."""
    side = standins.TARGET_IMAGE_SIZE
    shape = (pixels.shape[0], side, side, 3)
    method = _FILTERS[preprocessor["resample"]]
    x = jax.image.resize(pixels.astype(jnp.float32), shape, method, antialias=False)
    x = jnp.clip(jnp.round(x), 0.0, 255.0) / 255.0
    mean, std = (
        jnp.asarray(preprocessor[name], jnp.float32)[None, None, None]
        for name in ("image_mean", "image_std")
    )
    return (x - mean) / std


def _chat(processor: Any, expand: Any, turns: Turns) -> Tokens:
    questions = [
        Turn((None, question) if not i else (question,), answer)
        for i, (question, answer) in enumerate(turns)
    ]
    answers = [text_answer(processor.tokenizer, answer) for _, answer in turns]
    return chat_tokens(processor.render, processor.tokenizer, questions, answers, expand=expand)


@dataclasses.dataclass(frozen=True)
class Qwen2_5_VLReader:
    """Qwen2.5-VL.

    Attributes:
      processor: of the checkpoint.
      model: to be trained.
    """

    processor: Qwen2_5_VLProcessor
    model: qwen2_5_vl.Qwen2_5_VLForConditionalGeneration
    family = qwen2_5_vl.FAMILY
    preprocessor = standins.QWEN2_5_VL_PREPROCESSOR

    @classmethod
    def make(cls, path: Any) -> "Qwen2_5_VLReader":
        """With the tokenizer of a directory."""
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = standins.qwen2_5_vl_config(tokenizer)
        images = Qwen2_5_VLImageProcessor.from_hf(cls.preprocessor)
        model = qwen2_5_vl.Qwen2_5_VLForConditionalGeneration(config=config, execution=_EXECUTION)
        return cls(Qwen2_5_VLProcessor(tokenizer, images, config), model)

    def tokens(self, turns: Turns) -> Tokens:
        """See `Reader`."""
        return _chat(
            self.processor, lambda text: self.processor.expand(text, [(1, _SIDE, _SIDE)]), turns
        )

    def places(self, ids: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
        """See `Reader`."""
        packed = self._packed(len(ids))
        places = qwen2_5_vl.place_prompts(ids, valid, packed, self.model.config)
        return {
            "positions": np.moveaxis(places.positions, 1, 0),
            "image_slots": places.image_slots,
        }

    def features(self, params: Any, pixels: jax.Array) -> jax.Array:
        """See `Reader`."""
        batch = self._packed(1).batch
        rows, columns = np.moveaxis(batch.positions[0], 1, 0)
        B, size = pixels.shape[0], standins.TARGET_PATCH_SIZE
        x = enlarged(pixels, self.preprocessor).reshape(B, _SIDE, size, _SIDE, size, 3)
        x = jnp.transpose(x, (0, 1, 3, 5, 2, 4))[:, rows, columns]  # [B, S, 3, size, size]
        frames = self.model.config.vision_config.temporal_patch_size
        patches = jnp.repeat(x[:, :, :, None], frames, axis=3).reshape(B, rows.size, -1)
        positions, segments = (
            jnp.broadcast_to(jnp.asarray(v), (B, *v.shape[1:]))
            for v in (batch.positions, batch.segments)
        )
        states: Any = self.model.apply(
            {"params": params}, patches, positions, segments, method="vision_states"
        )
        grid = np.zeros((_SIDE, _SIDE), np.int32)
        grid[rows, columns] = np.arange(rows.size)
        return states[:, jnp.asarray(grid)]

    def logits(self, params: Any, features: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """See `Reader`."""
        rows, columns = np.moveaxis(self._packed(1).batch.positions[0], 1, 0)

        def run(model):
            x = model.embed(batch["tokens"], batch["image_slots"])
            tokens = model.merge_vision(features[:, rows, columns])
            x = model.insert_images(x, batch["image_slots"], tokens)
            positions = jnp.moveaxis(batch["positions"], 1, 0)
            mask = causal_mask(x.shape[1])  # padding is at the right, and nothing sees it
            return model.logits(model.hidden_states(x, positions, mask)[0])

        found: Any = self.model.apply({"params": params}, method=run)
        return found

    def _packed(self, count: int) -> qwen2_5_vl.PackedImages:
        config = self.model.config.vision_config
        blank = np.zeros((_SIDE**2, config.patch_values), np.float32)
        return qwen2_5_vl.pack_images([blank] * count, [(1, _SIDE, _SIDE)] * count, config)


@dataclasses.dataclass(frozen=True)
class Gemma3Reader:
    """Gemma 3.

    Attributes:
      processor: of the checkpoint.
      model: to be trained.
    """

    processor: Gemma3Processor
    model: gemma3.Gemma3ForConditionalGeneration
    family = gemma3.FAMILY
    preprocessor = standins.GEMMA_3_PREPROCESSOR

    @classmethod
    def make(cls, path: Any) -> "Gemma3Reader":
        """With the tokenizer of a directory."""
        tokenizer = AutoTokenizer.from_pretrained(path)
        config = standins.gemma_3_config(tokenizer)
        images = gemma3_image_processor(cls.preprocessor)
        model = gemma3.Gemma3ForConditionalGeneration(config=config, execution=_EXECUTION)
        return cls(Gemma3Processor(tokenizer, images, config), model)

    def tokens(self, turns: Turns) -> Tokens:
        """See `Reader`."""
        return _chat(self.processor, lambda text: self.processor.expand(text, 1), turns)

    def places(self, ids: np.ndarray, valid: np.ndarray) -> dict[str, np.ndarray]:
        """See `Reader`."""
        del ids
        return {"valid": valid}

    def features(self, params: Any, pixels: jax.Array) -> jax.Array:
        """See `Reader`."""
        x = enlarged(pixels, self.preprocessor)
        found: Any = self.model.apply({"params": params}, x, method="vision_features")
        return found

    def logits(self, params: Any, features: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        """See `Reader`."""

        def run(model):
            tokens = model.project_features(features)
            x = model.embed_prompt(batch["tokens"], tokens)
            blocks = model.image_blocks(batch["tokens"])
            return model.logits(model.from_embeddings(x, batch["valid"], blocks)[0])

        found: Any = self.model.apply({"params": params}, method=run)
        return found
