"""Conversations as tokens with a mask of what is learned, through a model's own chat template.

The template is rendered once with marks in the answers' places and cut there, and answers are put
between the pieces as tokens. So what a model answered stays the very tokens that it chose
(detokenising and tokenising again is not the identity), the pieces are what precedes and follows
an answer when it is generated, and the mask needs no search in tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from core_jax.data.llava import Turn

_MARK = "@@answer-{}-5f1d9c@@"


class UnusableDialogue(ValueError):
    """A conversation has nothing to learn from, or its text cannot be told from the template."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What is learned.

    Attributes:
      ids: tokens, without an end.
      end: the token that ended it; None where it was cut off (no end is learned then), or
        `TEMPLATE_END` for the one that the template has.
    """

    ids: tuple[int, ...]
    end: int | None


TEMPLATE_END = -1


@dataclasses.dataclass(frozen=True)
class Tokens:
    """One training example.

    Attributes:
      ids: int32 [n].
      supervised: bool [n], True where the token is learned (given those before it).
    """

    ids: np.ndarray
    supervised: np.ndarray


def text_answer(tokenizer: Any, text: str) -> Answer:
    """A text's tokens, ended by the template's end of turn."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return Answer(tuple(ids), TEMPLATE_END)


def chat_tokens(
    render: Callable[..., str],
    tokenizer: Any,
    turns: Sequence[Turn],
    answers: Sequence[Answer],
    *,
    system: str | None = None,
    expand: Callable[[str], str] = lambda text: text,
) -> Tokens:
    """A conversation in the chat template.

    Args:
      render: messages -> text, as `Qwen2_5_VLProcessor.render`.
      tokenizer: transformers'.
      turns: questions (their answers are not looked at).
      answers: one for each turn.
      system: a system message, or None.
      expand: text -> text in which each image has all its placeholders.

    Raises:
      UnusableDialogue: no turn, or a template that drops or repeats answers.
    """
    if not turns or len(turns) != len(answers):
        raise UnusableDialogue(f"{len(turns)} questions with {len(answers)} answers")
    marks = [_MARK.format(i) for i in range(len(turns))]
    messages: list[dict[str, Any]] = [] if system is None else [_system(system)]
    for turn, mark in zip(turns, marks, strict=True):
        messages += [turn.message(), {"role": "assistant", "content": [_text(mark)]}]
    text = expand(_render(render, messages))
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found or mark in text:
            raise UnusableDialogue("the chat template does not show each answer once")
        pieces.append(before)
    pieces.append(text)
    tokens = [_tokenize(tokenizer, piece, first=not i) for i, piece in enumerate(pieces)]
    return _joined(tokens, answers)


def plain_tokens(tokenizer: Any, images: str, caption: str, *, end: str = "\n") -> Tokens:
    """Image and caption without a template (LLaVA's `plain`): the caption and its end are learned.

    Args:
      tokenizer: transformers'.
      images: text with all placeholders of the images.
      caption: what they show.
      end: what ends a caption; LLaVA has a line break.
    """
    before = _tokenize(tokenizer, images, first=True)
    ids = tokenizer(caption.strip() + end, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UnusableDialogue("an empty caption")
    supervised = [False] * len(before) + [True] * len(ids)
    return Tokens(np.asarray([*before, *ids], np.int32), np.asarray(supervised))


def bare_tokens(answer: Answer, eos_id: int | None) -> Tokens:
    """An answer alone, for models whose whole prompt is an image.

    Args:
      answer: what is learned.
      eos_id: what ends it where the answer leaves that to the template.
    """
    end = eos_id if answer.end == TEMPLATE_END else answer.end
    ids = [*answer.ids, *([] if end is None else [end])]
    return Tokens(np.asarray(ids, np.int32), np.ones(len(ids), bool))


def cut_tokens(tokens: Tokens, length: int, placeholder: int | None) -> Tokens:
    """At most `length` tokens.

    Raises:
      UnusableDialogue: nothing is learned from what is left, or an image is cut.
    """
    kept = Tokens(tokens.ids[:length], tokens.supervised[:length])
    if placeholder is not None and (tokens.ids[length:] == placeholder).any():
        raise UnusableDialogue(f"{len(tokens.ids)} tokens cut to {length} would cut an image")
    if not kept.supervised.any():
        raise UnusableDialogue(f"no token to learn among the first {length}")
    return kept


def show_masked(tokens: Tokens, tokenizer: Any, placeholder: int | None) -> str:
    """The example as text: learned parts in [[ ]], runs of placeholders counted."""
    parts: list[str] = []
    ids, learned = tokens.ids.tolist(), tokens.supervised.tolist()
    start = 0
    while start < len(ids):
        kind = (learned[start], ids[start] == placeholder)
        stop = start
        while stop < len(ids) and (learned[stop], ids[stop] == placeholder) == kind:
            stop += 1
        if kind[1]:
            text = f"<{stop - start} image tokens>"
        else:
            text = tokenizer.decode(ids[start:stop], skip_special_tokens=False)
        parts.append(f"[[{text}]]" if kind[0] else text)
        start = stop
    return "".join(parts)


def _joined(pieces: list[list[int]], answers: Sequence[Answer]) -> Tokens:
    ids, supervised = list(pieces[0]), [False] * len(pieces[0])
    for number, (answer, piece) in enumerate(zip(answers, pieces[1:], strict=True)):
        last = number == len(answers) - 1
        ids += answer.ids
        supervised += [True] * len(answer.ids)
        if not piece:
            raise UnusableDialogue("the chat template does not end an answer")
        end, rest = piece[0], piece[1:]
        if not last:
            # Later turns see the template's end, whatever ended the answer.
            ids += [end, *rest]
            supervised += [answer.end in (TEMPLATE_END, end), *[False] * len(rest)]
        elif answer.end is not None:
            ids.append(end if answer.end == TEMPLATE_END else answer.end)
            supervised.append(True)
    return Tokens(np.asarray(ids, np.int32), np.asarray(supervised, bool))


def _render(render: Callable[..., str], messages: list[dict[str, Any]]) -> str:
    import jinja2

    try:
        return render(messages, add_generation_prompt=False)
    except jinja2.TemplateError as error:
        raise UnusableDialogue(f"the chat template refuses it: {error}") from error


def _tokenize(tokenizer: Any, text: str, *, first: bool) -> list[int]:
    """Ids; the first piece gets a begin-of-sequence token if the tokenizer adds one."""
    bos = getattr(tokenizer, "bos_token", None)
    special = first and not (bos and text.startswith(bos))
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": [_text(text)]}
