"""Answers for the page: a picture, what was asked, what the target says, and in how many passes."""

from collections.abc import Mapping, Sequence

from core_jax.evaluation.report_images import GalleryRow
from massv_jax.evaluation.acceptance import Measured
from massv_jax.evaluation.prompts import Question
from massv_jax.evaluation.reporting import Place
from massv_jax.speculative.decoder import SpeculativeDecoder

SHOWN = 4  # of each task


def show_answers(
    place: Place,
    task: str,
    which: Sequence[int],
    questions: Sequence[Question],
    plain: tuple[SpeculativeDecoder, Measured],
    arms: Mapping[tuple[str, int], Measured],
) -> None:
    """Adds the first answers of a task, greedy, to the page.

    Args:
      place: where they go.
      task: its name.
      which: indices of its questions.
      questions: all of them.
      plain: who answered plainly, and the answers.
      arms: (arm, gamma) -> its answers to the same questions.
    """
    decoder, answers = plain
    rows = [
        _row(decoder, questions[i], answers.rows([i]), {k: m.rows([i]) for k, m in arms.items()})
        for i in which
        if questions[i].images
    ][:SHOWN]
    if rows:
        place.report.add_gallery(
            place.section, f"Answers: {task}, temperature 0", rows,
            note="Passes of the target, the prompt's not counted; the same words whoever drafts.",
        )  # fmt: skip


def _row(
    decoder: SpeculativeDecoder,
    question: Question,
    answer: Measured,
    arms: Mapping[tuple[str, int], Measured],
) -> GalleryRow:
    first, *others = question.images
    text = decoder.target.tokenizer.decode(
        answer.tokens[0, : answer.lengths[0]].tolist(), skip_special_tokens=True
    )
    said = {f"{_passes(answer)} passes alone": True}
    for (arm, gamma), measured in arms.items():
        same = bool(measured.same_as(answer).all())
        words = "the same words" if same else "other words"
        said[f"{_passes(measured)} passes with {arm}, gamma {gamma}: {words}"] = same
    return GalleryRow(
        images={"shown": first},
        more={f"image {i}": image for i, image in enumerate(others, 2)},
        caption=text.strip(),
        verdict=said,
        id=" · ".join(filter(None, (question.id, _asked(question.prompt)))),
    )


def _passes(measured: Measured) -> int:
    return int(measured.statistics.rounds[0])


def _asked(prompt: str | Sequence[Mapping[str, object]]) -> str:
    """The words of the last message."""
    if isinstance(prompt, str) or not prompt:
        return str(prompt or "")
    content = prompt[-1].get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return " ".join(part.get("text", "") for part in parts if isinstance(part, dict)).strip()
