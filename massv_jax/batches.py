"""From conversations to the arrays that MASSV's losses take.

A row, T = data.max_length:

    tokens [T], valid [T], supervised [T]  the drafter's tokens and what of them is learned
    positions [3, T], slots [T]            Qwen2.5-VL: M-RoPE, and which image token stands where
    patches [S, C], patch_positions [S, 2], segments [S]      its images, packed; one frame each
    leaders [U]                            of pooled squares
    pixels [I, h, w, 3]                    Gemma 3's images
    images [...]                           what a prefix target's tower takes

and, where the loss wants the target's opinion of a drafter with a prompt of its own, the target's
`target_tokens`, `target_valid`, `target_positions`, `target_slots`, and `source` [T], which of the
target's places each of the drafter's tokens has.
"""

import collections
import dataclasses
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from PIL import Image

from core_jax.data.bad import DataPolicy
from core_jax.data.gemma3_processor import Gemma3Processor
from core_jax.data.images import BadImage, Reason
from core_jax.data.llava import Dialogue, Turn, open_images, parse_dialogue
from core_jax.data.llava_tokens import (
    Answer,
    Tokens,
    UnusableDialogue,
    bare_tokens,
    chat_tokens,
    cut_tokens,
    plain_tokens,
    show_masked,
    text_answer,
)
from core_jax.data.pipeline import WithoutImage
from core_jax.data.qwen2_5_vl_processor import IMAGE_PAD, Qwen2_5_VLProcessor
from core_jax.data.sources import Example, SourceError
from core_jax.models.gemma3 import ImagePromptError as GemmaPromptError
from core_jax.models.gemma3 import check_placeholders
from core_jax.models.qwen2_5_vl import ImagePromptError, pack_images, place_prompts
from massv_jax.draft_prompts import draft_view, pooling_leaders
from massv_jax.drafter_config import DrafterConfig
from massv_jax.experiment import DataConfig

Row = dict[str, Any]


@dataclasses.dataclass
class RowLog:
    """What was odd about the conversations so far; filled by several threads.

    Attributes:
      faults: how often each fault was mended (core_jax.data.llava.Fault).
      refused: why conversations were refused, with counts.
    """

    faults: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    refused: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    lock: Any = dataclasses.field(default_factory=threading.Lock)

    def add(self, faults: Sequence[str], refused: str | None = None) -> None:
        """Books one conversation."""
        with self.lock:
            self.faults.update(str(f) for f in faults)
            if refused:
                self.refused[refused] += 1


@dataclasses.dataclass(frozen=True)
class RowMaker:
    """Makes rows of a batch.

    Attributes:
      drafter: the drafter's configuration.
      config: of the data.
      processor: the target's; for a prefix target its frontend (core_jax.decode.target).
      with_target: also what the target needs to be asked for its probabilities.
      top_k: stored probabilities of the answers; 0 leaves them out.
      image_dtype: of patches and pixels; what the tower computes in loses nothing, and a batch of
        large images in float32 takes gigabytes of the host.
      log: what was mended and refused.
    """

    drafter: DrafterConfig
    config: DataConfig
    processor: Any
    with_target: bool = False
    top_k: int = 0
    image_dtype: str = "float32"
    log: RowLog = dataclasses.field(default_factory=RowLog)

    def transform(self) -> WithoutImage:
        """For `make_batches`."""
        return WithoutImage(self.row)

    def row(self, example: Example) -> Row:
        """One row.

        Raises:
          BadImage: an image cannot be used (its reason), or the conversation cannot (no_caption;
            `log` says why).
        """
        images = open_images(example, self.config.limits)
        faults: Sequence[str] = ()
        try:
            dialogue, answers = self._dialogue(example, len(images))
            faults = dialogue.faults
            made = self._encode(dialogue, answers, images, example.extras.get("record"))
        except (UnusableDialogue, ImagePromptError, GemmaPromptError) as error:
            self.log.add(faults, str(error))
            raise BadImage(Reason.NO_CAPTION) from error
        self.log.add(faults)
        return made

    def tokens(self, example: Example) -> Tokens:
        """The tokens alone, of the target's prompt, for looking at them."""
        images = open_images(example, self.config.limits)
        dialogue, answers = self._dialogue(example, len(images))
        return self._tokens(dialogue, answers, self._cut(images))

    def show(self, example: Example) -> str:
        """An example decoded, with what is learned in [[ ]]."""
        tokenizer = self.processor.tokenizer
        return show_masked(self.tokens(example), tokenizer, self.drafter.image_token_id)

    def _dialogue(self, example: Example, num_images: int) -> tuple[Dialogue, list[Answer]]:
        tokenizer, record = self.processor.tokenizer, example.extras.get("record")
        if record is not None:
            turns = record.turns[:1] if self.config.turns == "first" else record.turns
            dialogue = Dialogue(tuple(t.turn() for t in turns), record.system)
            return dialogue, [t.answer() for t in turns]
        spoken = example.extras.get("conversations")
        if spoken is None:
            if not example.caption:
                raise UnusableDialogue("neither a conversation nor a caption")
            dialogue = Dialogue((Turn((None,) * num_images, example.caption.strip()),))
        else:
            dialogue = parse_dialogue(spoken, num_images, image_place=self.config.image_place)
        turns = dialogue.turns[:1] if self.config.turns == "first" else dialogue.turns
        if not turns:
            raise UnusableDialogue("no question with an answer")
        dialogue = dataclasses.replace(dialogue, turns=turns)
        return dialogue, [text_answer(tokenizer, t.answer) for t in turns]

    def _cut(self, images: Sequence[Image.Image]) -> list[Any]:
        """Images as the processor cuts them (Qwen2.5-VL), else as they are."""
        if isinstance(self.processor, Qwen2_5_VLProcessor):
            try:
                return [self.processor.image_processor(image) for image in images]
            except ValueError as error:
                raise UnusableDialogue(str(error)) from error
        return list(images)

    def _expand(self, text: str, cut: Sequence[Any]) -> str:
        if isinstance(self.processor, Qwen2_5_VLProcessor):
            return self.processor.expand(text, [grid for _, grid in cut])
        return self.processor.expand(text, len(cut))

    def _tokens(self, dialogue: Dialogue, answers: Sequence[Answer], cut: Sequence[Any]) -> Tokens:
        p, tokenizer = self.processor, self.processor.tokenizer
        if not isinstance(p, Qwen2_5_VLProcessor | Gemma3Processor):
            return bare_tokens(answers[0], tokenizer.eos_token_id)
        if self.config.format == "plain":
            return plain_tokens(
                tokenizer, self._image_text(cut), dialogue.turns[0].answer,
                end=self.config.plain_end,
            )  # fmt: skip
        return chat_tokens(
            p.render, tokenizer, dialogue.turns, answers, system=dialogue.system,
            expand=lambda text: self._expand(text, cut),
        )  # fmt: skip

    def _image_text(self, cut: Sequence[Any]) -> str:
        """The images alone, with their markers."""
        if isinstance(self.processor, Qwen2_5_VLProcessor):
            c, t = self.processor.config, self.processor.tokenizer
            start, end = t.convert_ids_to_tokens([c.vision_start_token_id, c.vision_end_token_id])
            return self._expand(f"{start}{IMAGE_PAD}{end}" * len(cut), cut)
        if isinstance(self.processor, Gemma3Processor):
            t = self.processor.tokenizer
            return (t.bos_token or "") + self._expand(t.boi_token * len(cut), cut)
        return ""

    def _encode(self, dialogue, answers, images, record) -> Row:
        cut = self._cut(images)
        whole = self._tokens(dialogue, answers, cut)
        placeholder = self.drafter.image_token_id
        tokens = cut_tokens(whole, self.config.max_length, placeholder)
        if isinstance(self.processor, Qwen2_5_VLProcessor):
            row = self._qwen_row(tokens, cut)
        elif isinstance(self.processor, Gemma3Processor):
            row = self._gemma_row(tokens, cut)
        else:
            row = self._prefix_row(tokens, images)
        if self.top_k:
            row |= self._stored(whole, row, record, len(answers))
        return row

    def _stored(self, whole: Tokens, row: Row, record: Any, num_turns: int) -> Row:
        """`top_ids`, `top_logprobs` [T, k] of the learned tokens, in their places."""
        turns = () if record is None else record.turns[:num_turns]
        if not turns or any(not t.top_ids or len(t.top_ids[0]) < self.top_k for t in turns):
            raise UnusableDialogue(
                f"fewer than loss.top_k={self.top_k} probabilities are stored with the answers; "
                "distil with distill.store_top_k"
            )
        found = [np.asarray(t.top_ids, np.int32) for t in turns]
        probs = [np.asarray(t.top_logprobs, np.float32) for t in turns]
        ids = np.concatenate([f[:, : self.top_k] for f in found])
        if len(ids) != whole.supervised.sum():
            raise UnusableDialogue("an answer inside the conversation ended with another token")
        inside = (ids < self.drafter.vocab_size).all()
        if not inside:
            raise UnusableDialogue("stored tokens have no row in the drafter's table")
        at = np.flatnonzero(row["supervised"])  # a cut example has only the first of them
        top_ids = np.zeros((len(row["tokens"]), self.top_k), np.int32)
        top_logprobs = np.full(top_ids.shape, -np.log(2.0 * self.top_k), np.float32)
        top_ids[at] = ids[: len(at)]
        top_logprobs[at] = np.concatenate([p[:, : self.top_k] for p in probs])[: len(at)]
        return {"top_ids": top_ids, "top_logprobs": top_logprobs}

    def _qwen_row(self, tokens: Tokens, cut: Sequence[Any]) -> Row:
        config = self.processor.config
        packed = None
        if cut:
            packed = pack_images(
                [p for p, _ in cut], [g for _, g in cut], config.vision_config, rows=1,
                windows=self.config.image_windows,
            )  # fmt: skip
        ids = self._padded(tokens.ids, self.processor.tokenizer.pad_token_id or 0)[None]
        valid = np.arange(ids.shape[1])[None] < len(tokens.ids)
        # Counts placeholders against the images' tokens, and raises where they differ.
        places = place_prompts(ids, valid, packed, config)
        view = draft_view(
            self.drafter, ids, valid, places, packed, length=ids.shape[1], side="right"
        )
        row = self._text_row(tokens, view)
        if view.places is not None:
            row |= {"positions": view.places.positions[:, 0], "slots": view.places.image_slots[0]}
        if self.drafter.kind != "text" or self.with_target:
            row |= self._patches(packed)
        if self.drafter.pooling > 1:
            units = row["segments"].shape[0] // config.vision_config.merge_unit
            own = np.arange(units, dtype=np.int32)
            row["leaders"] = own if packed is None else pooling_leaders(self.drafter, packed)[0]
        if self.with_target and self._has_own_prompt():
            row |= {
                "target_tokens": ids[0], "target_valid": valid[0], "source": view.source[0],
                "target_positions": places.positions[:, 0], "target_slots": places.image_slots[0],
            }  # fmt: skip
        return row

    def _has_own_prompt(self) -> bool:
        return self.drafter.kind == "text" or self.drafter.pooling > 1

    def _patches(self, packed: Any) -> Row:
        vision = self.processor.config.vision_config
        slots = self.config.image_windows * vision.window_patches
        kind = jnp.dtype(self.image_dtype)
        if packed is None:
            values = vision.patch_values // vision.temporal_patch_size
            return {
                "patches": np.zeros((slots, values), kind),
                "patch_positions": np.zeros((slots, 2), np.int32),
                "segments": np.zeros((slots,), np.int32),
            }
        b = packed.batch
        patches = one_frame(b.patches[0], vision).astype(kind)
        return {"patches": patches, "patch_positions": b.positions[0],
                "segments": b.segments[0]}  # fmt: skip

    def _gemma_row(self, tokens: Tokens, images: Sequence[Any]) -> Row:
        most, side = self.config.max_images, self.drafter.target.vision_config.image_size
        if len(images) > most:
            raise UnusableDialogue(f"{len(images)} images, more than data.max_images {most}")
        ids = self._padded(tokens.ids, self.processor.tokenizer.pad_token_id or 0)[None]
        valid = np.arange(ids.shape[1])[None] < len(tokens.ids)
        check_placeholders(np.where(valid, ids, -1), [len(images)], self.processor.config)
        view = draft_view(self.drafter, ids, valid, length=ids.shape[1], side="right")
        row = self._text_row(tokens, view)
        if self.drafter.kind != "text" or self.with_target:
            pixels = np.zeros((most, side, side, 3), np.float32)
            if images:
                pixels[: len(images)] = self.processor.image_processor(images)
            row["pixels"] = pixels.astype(jnp.dtype(self.image_dtype))
        if self.with_target and self._has_own_prompt():
            row |= {"target_tokens": ids[0], "target_valid": valid[0], "source": view.source[0]}
        return row

    def _prefix_row(self, tokens: Tokens, images: Sequence[Image.Image]) -> Row:
        """The prefix takes the first Q places, as placeholders."""
        if len(images) != 1:
            raise UnusableDialogue(f"{len(images)} images; this target looks at one")
        seen = self.drafter.kind == "prefix"
        # Text drafters begin with an end token, which separates documents in pretraining.
        start = 0 if seen else self.processor.tokenizer.eos_token_id or 0
        prefix = self.drafter.target.num_embeddings if seen else 1
        kept = cut_tokens(tokens, self.config.max_length - prefix, None)
        ids = self._padded(np.concatenate([np.full(prefix, start, np.int32), kept.ids]), 0)
        place = np.arange(len(ids), dtype=np.int32)
        row: Row = {
            "tokens": ids,
            "valid": place < prefix + len(kept.ids),
            "supervised": self._padded(
                np.concatenate([np.zeros(prefix, bool), kept.supervised]), False
            ),
        }
        if seen:
            row["slots"] = np.where(place < prefix, place, -1).astype(np.int32)
            prepared = self.processor.prepare([""], [[images[0]]])
            row["images"] = np.asarray(prepared.images)[0]
        return row

    def _text_row(self, tokens: Tokens, view: Any) -> Row:
        supervised = self._padded(tokens.supervised, False)
        source = view.source[0]
        learned = np.where(source >= 0, supervised[np.maximum(source, 0)], False)
        beyond = view.ids[0][learned] >= self.drafter.vocab_size
        if beyond.any():
            raise UnusableDialogue(
                f"{beyond.sum()} answer tokens have no row in the drafter's table of "
                f"{self.drafter.vocab_size}"
            )
        return {"tokens": view.ids[0], "valid": view.valid[0], "supervised": learned}

    def _padded(self, values: np.ndarray, fill: Any) -> np.ndarray:
        out = np.full(self.config.max_length, fill, np.asarray(values).dtype)
        out[: len(values)] = values
        return out


def one_frame(patches: np.ndarray, vision: Any) -> np.ndarray:
    """Patches [S, c * frames * h * w] of still images with one of their equal frames."""
    S, frames = len(patches), vision.temporal_patch_size
    return patches.reshape(S, vision.in_channels, frames, -1)[:, :, 0].reshape(S, -1)


def policy_of(config: DataConfig) -> DataPolicy:
    """What a run accepts."""
    return DataPolicy(limits=config.limits, max_bad_fraction=config.max_bad_fraction)


def check_supervision(batch: Mapping[str, Any], log: RowLog) -> None:
    """Raises unless something of a batch is learned.

    Raises:
      SourceError: nothing is.
    """
    if not np.asarray(batch["supervised"])[:, 1:].any():
        raise SourceError(
            "no token of the first batch would be learned; look at the data and at the chat "
            f"template (refused so far: {dict(log.refused)}; mended: {dict(log.faults)})"
        )
