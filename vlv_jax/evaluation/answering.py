"""Text-only question answering: a language model reads a caption and answers about the image."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from core_jax.decode.adapters import CausalDecoder, TokenPrefix
from core_jax.decode.generate import generate
from core_jax.evaluation.bootstrap import bootstrap_difference, ratio
from core_jax.evaluation.provenance import from_here
from core_jax.evaluation.report import Report
from core_jax.models import load_model
from vlv_jax.captioning import decode_texts
from vlv_jax.evaluation.captions import CaptionRecord
from vlv_jax.evaluation.examples import examples_file, save_examples
from vlv_jax.evaluation.heldout import Subject, in_batches
from vlv_jax.evaluation.vqa import (
    PromptFormat,
    Question,
    VqaResult,
    compare_captions,
)
from vlv_jax.loading import load_tokenizer
from vlv_jax.workdir import WorkdirError

if TYPE_CHECKING:
    from vlv_jax.evaluation.run import Request

GROUP = "vqa"
_BUCKET = 64  # prompts are padded to a multiple of this, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class LanguageModelAnswerer:
    """Continues prompts greedily.

    Attributes:
      model, params: of a hub directory.
      tokenizer: its tokenizer.
      batch_size: prompts a call; the last batch is padded to it.
      max_new_tokens: longest answer; `vqa.first_line` cuts what comes after it.
    """

    model: Any
    params: Any
    tokenizer: Any
    batch_size: int = 64
    max_new_tokens: int = 12

    @classmethod
    def from_pretrained(cls, path: str | pathlib.Path, **options: Any) -> "LanguageModelAnswerer":
        """Loads a Qwen2 hub directory.

        Args:
          path: the directory, with tokenizer.
          **options: the other attributes.

        Raises:
          WorkdirError: it holds something other than a causal language model.
        """
        model, params = load_model(path)
        if not hasattr(model, "new_cache"):
            raise WorkdirError(f"--answerer {path} is no causal language model")
        return cls(model, params, load_tokenizer(pathlib.Path(path)), **options)

    def __call__(self, prompts: list[str]) -> list[str]:
        """One continuation a prompt."""
        encoded = [self.tokenizer(p, add_special_tokens=False)["input_ids"] for p in prompts]
        # Prompts of a length go together; a batch is as wide as its longest.
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        answers = [""] * len(prompts)

        def answer(rows: slice) -> list[str]:
            return self._continue([encoded[i] for i in order[rows]])[: rows.stop - rows.start]

        texts = in_batches(len(order), self.batch_size, answer)
        for i, text in zip(order, itertools.chain.from_iterable(texts), strict=True):
            answers[i] = text
        return answers

    def _continue(self, encoded: Sequence[Sequence[int]]) -> list[str]:
        width = -(-max(map(len, encoded)) // _BUCKET) * _BUCKET
        eos, pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        pad = eos if pad is None else pad
        ids = np.full((self.batch_size, width), pad, np.int32)
        valid = np.zeros((self.batch_size, width), bool)
        valid[len(encoded) :, -1] = True  # every row needs a token
        for row, tokens in enumerate(encoded):
            ids[row, width - len(tokens) :] = tokens
            valid[row, width - len(tokens) :] = True
        generated = generate(
            CausalDecoder(self.model), self.params,
            TokenPrefix(jnp.asarray(ids), jnp.asarray(valid)),
            max_new_tokens=self.max_new_tokens, eos_ids=eos, pad_id=pad,
        )  # fmt: skip
        return decode_texts(self.tokenizer, generated)


def questions_of(record: CaptionRecord) -> list[Question]:
    """The questions in an example's extras; none is no error.

    Either `questions` is a list of objects with `question`, `answer` (or `answers`) and perhaps
    `kind`, or `questions`, `answers` and perhaps `kinds` are lists of one length.

    Raises:
      ValueError: lists of different lengths.
    """
    asked = record.extras.get("questions") or []
    if asked and isinstance(asked[0], str):
        answers = record.extras.get("answers") or []
        kinds = record.extras.get("kinds") or [""] * len(asked)
        if not len(asked) == len(answers) == len(kinds):
            raise ValueError(
                f"{record.id} has {len(asked)} questions, {len(answers)} answers, "
                f"{len(kinds)} kinds"
            )
        asked = [
            {"question": q, "answer": a, "kind": k}
            for q, a, k in zip(asked, answers, kinds, strict=True)
        ]
    found = []
    for item in asked:
        right = item.get("answers", item.get("answer"))
        if not right:
            continue
        right = (right,) if isinstance(right, str) else tuple(right)
        found.append(Question(image=record.id, question=item["question"], answers=right,
                              kind=item.get("kind", "")))  # fmt: skip
    return found


def report_questions(
    report: Report,
    subject: Subject,
    request: "Request",
    records: Sequence[CaptionRecord],
    out: pathlib.Path,
) -> list[str]:
    """Adds `vqa.accuracy.{vlv,true_caption,no_caption}`, differences, and a table by kind.

    Every answer is saved in `out`.

    Returns:
      What was left out, and why.
    """
    questions = [q for r in records for q in questions_of(r)]
    if not questions:
        return ["questions: the held-out examples have none (extras `questions`, `answers`)"]
    captions: dict[str, Mapping[str, str]] = {"vlv": {r.id: r.caption.text for r in records}}
    skipped = []
    if all(r.references for r in records):
        captions["true_caption"] = {r.id: r.references[0] for r in records}
    else:
        skipped.append("questions: no ceiling, some held-out images have no true caption")
    prompts = PromptFormat(instruction=request.instruction)
    results = compare_captions(
        LanguageModelAnswerer.from_pretrained(request.answerer), questions, captions,
        prompt_format=prompts, **subject.bootstrap,
    )  # fmt: skip
    save_answers(out, questions, results)
    settings = {
        "answerer": from_here(request.answerer), "metric": "exact_match", "shots": 0,
        "questions": len(questions), "decoding": "greedy",
        "prompt": prompts.prompt("<caption>", "<question>"),
        "bootstrap_samples": subject.evaluation.bootstrap_samples,
    }  # fmt: skip
    add = report.add_metric
    for name, result in results.items():
        add(request.section, f"vqa.accuracy.{name}", result.accuracy, settings=settings)
    for name in ("true_caption", "no_caption"):
        if name in results:
            estimate = paired_difference(
                questions, results["vlv"], results[name], **subject.bootstrap
            )
            add(request.section, f"vqa.accuracy_difference.vlv_minus_{name}", estimate,
                settings={**settings, "excludes_zero": estimate.excludes_zero})  # fmt: skip
    kinds = list(results["vlv"].by_kind)
    if kinds:
        rows = [[k, *(r.by_kind[k].value for r in results.values())] for k in kinds]
        report.add_table(
            request.section, "Questions answered from captions alone", ["kind", *results], rows,
            note="Share of answers that match exactly after VQA v2's normalisation. Between no "
            "caption and the true caption lies what this answerer can show.",
        )  # fmt: skip
    return skipped


def save_answers(
    out: pathlib.Path, questions: Sequence[Question], results: Mapping[str, VqaResult]
) -> None:
    """One JSON object an image: what was asked and answered, and the scores of its questions."""
    rows: dict[str, dict[str, Any]] = {}
    for i, question in enumerate(questions):
        row = rows.setdefault(question.image, {"id": question.image, "asked": [], "scores": {}})
        given = {name: result.answers[i] for name, result in results.items()}
        row["asked"].append({"question": question.question, "kind": question.kind,
                             "answers": list(question.answers), "given": given})  # fmt: skip
        for name, result in results.items():
            counts = row["scores"].setdefault(f"vqa.accuracy.{name}", [0.0, 0])
            counts[0] += float(result.correct[i])
            counts[1] += 1
    save_examples(out / examples_file(GROUP), rows.values())


def paired_difference(questions: Sequence[Question], a: VqaResult, b: VqaResult, **options):
    """Accuracy of a minus that of b; questions of one image are resampled together."""
    images = {name: i for i, name in enumerate(sorted({q.image for q in questions}))}
    rows = [np.zeros((len(images), 2)) for _ in range(2)]
    for table, result in zip(rows, (a, b), strict=True):
        for question, right in zip(questions, result.correct, strict=True):
            table[images[question.image]] += (right, 1)
    return bootstrap_difference(
        rows[0], rows[1], lambda sums: ratio(sums[..., 0], sums[..., 1]), **options
    )
