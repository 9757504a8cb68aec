"""Writes the README's results from a report that is kept.

    python -m miniature.results.readme [--vlv benchmarks/results/vlv/report.json] [--massv ...]

Replaces what stands between two marks of each; what a number means is written by hand around it.
"""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags

from core_jax.evaluation.document import replace_part
from miniature.results.readme_massv import massv_tables
from miniature.results.readme_tables import found, table, with_interval

_VLV = flags.DEFINE_string("vlv", "benchmarks/results/vlv/report.json", "VLV's report.")
_MASSV = flags.DEFINE_string("massv", "benchmarks/results/massv/report.json", "MASSV's report.")
_DOCUMENT = flags.DEFINE_string("document", "README.md", "Where its numbers go.")

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
MASSV_BEGIN, MASSV_END = "<!-- massv: begin -->", "<!-- massv: end -->"
CONDITIONS = ("vlv", "caption", "none", "wrong_image")
# What a caption gets right -> the report's name of it.
PARTS = {
    "object: shape, colour and size": "object", "relation": "relation", "shape": "shape",
    "colour": "colour", "size": "size", "place": "cell", "texture": "texture",
    "background": "background",
}  # fmt: skip
# Ablation -> its section, and what an arm is called for people.
_PARTS_SEEN = {"quarter": "a quarter", "half": "half", "all": "all"}
_WITH_STAGE1 = {"stage1": "with", "no_stage1": "without"}
ABLATIONS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "stage-2 images": ("learning_curve", _PARTS_SEEN),
    "T4a, queries": ("ablations.T4a_queries", {"q8": "8", "q32": "32", "q77": "77"}),
    "T4b, trained in stage 2": (
        "ablations.T4b_trainable",
        {"mlp": "projector", "mlp_llm": "and language model", "mlp_llm_encoder": "and encoder"},
    ),
    "T5a, stage-1 images": ("ablations.T5a_images", _PARTS_SEEN),
    "T5b, language model": (
        "ablations.T5b_language_model", {name: name for name in ("small", "medium", "large")},
    ),
    "T7, without stage 1, frozen": ("ablations.T7_paper", _WITH_STAGE1),
    "T7, without stage 1, trained": ("ablations.T7_fair", _WITH_STAGE1),
}  # fmt: skip


def tables(report: Mapping[str, Any]) -> str:
    """The report's headline and ablations as tables."""
    vlv = report["vlv"]
    return "\n\n".join((_captions(vlv), _conditions(vlv), _ablations(vlv)))


def _captions(vlv: Mapping[str, Any]) -> str:
    first = found(vlv, "caption.object_f1")
    assert first is not None
    rows = [
        (f"{name}, F1", with_interval(value))
        for name, part in PARTS.items()
        if (value := found(vlv, f"caption.{part}_f1"))
    ]
    rows += [
        (name, with_interval(value))
        for name, path in (
            ("BLEU-4", "caption.bleu_4"), ("CIDEr-D", "caption.cider_d"),
            ("captions that end by themselves", "caption.finished"),
            ("questions answered from the caption alone", "vqa.accuracy.vlv"),
            ("from the true caption", "vqa.accuracy.true_caption"),
            ("from none", "vqa.accuracy.no_caption"),
        )
        if (value := found(vlv, path))
    ]  # fmt: skip
    seeds = len(first["settings"]["runs"])
    head = (f"captions of {first['n']} held-out scenes, {seeds} seeds", "mean and interval")
    return table(head, rows)


def _conditions(vlv: Mapping[str, Any]) -> str:
    measures = {
        "denoising loss": "stage1.denoising_loss",
        "pixel error redrawn": "reconstruction.pixel_mse",
        "feature distance redrawn": "reconstruction.davit_cosine",
    }  # fmt: skip
    rows = []
    for name, path in measures.items():
        values = [found(vlv, f"{path}.{condition}") for condition in CONDITIONS]
        if all(values):
            n = values[0]["n"] if values[0] else 0
            rows.append((f"{name} (n = {n})", *(with_interval(v) for v in values if v)))
    return table(("the decoder sees", "VLV", "true caption", "nothing", "another image's"), rows)


def _ablations(vlv: Mapping[str, Any]) -> str:
    rows = []
    for title, (section, arms) in ABLATIONS.items():
        for metric, values in _metrics(found(vlv, section) or {}):
            shown = "; ".join(
                f"{arms[arm]}: {with_interval(value)}" for arm, value in values.items()
            )
            rows.append((title, metric, shown))
    return table(("ablation, one seed", "measure", "mean and interval"), rows)


def _metrics(section: Mapping[str, Any]) -> Sequence[tuple[str, Mapping[str, Any]]]:
    """(a metric's name, its value of each arm); differences are left to the report."""
    out: list[tuple[str, Mapping[str, Any]]] = []
    for name, inner in section.items():
        if name.endswith("_difference"):
            continue
        if all("value" in value for value in inner.values()):
            out.append((name, inner))
        else:
            out += [(f"{name}.{path}", values) for path, values in _metrics(inner)]
    return out


def main(argv: list[str]) -> None:
    """Entry point."""
    del argv
    document = pathlib.Path(_DOCUMENT.value)
    parts = ((_VLV, tables, BEGIN, END), (_MASSV, massv_tables, MASSV_BEGIN, MASSV_END))
    for flag, make, begin, end in parts:
        file = pathlib.Path(flag.value)
        if not file.is_file():
            print(f"{file} is missing; its tables stay as they are")
            continue
        made = make(json.loads(file.read_text()))
        document.write_text(replace_part(document.read_text(), begin, end, made))
        print(f"{document} has the numbers of {file}")


if __name__ == "__main__":
    app.run(main)
