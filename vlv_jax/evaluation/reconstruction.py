"""Redrawing held-out images from what VLV keeps of them, from captions, and from nothing."""

import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core_jax.data.processors import ImageProcessor
from core_jax.evaluation.bootstrap import bootstrap_difference, bootstrap_mean
from core_jax.evaluation.report import Report
from core_jax.evaluation.report_images import GalleryRow
from vlv_jax.evaluation.captions import CaptionRecord, score_note, score_records, verdict
from vlv_jax.evaluation.examples import columns_of, examples_file, save_examples
from vlv_jax.evaluation.frechet import frechet_distance
from vlv_jax.evaluation.heldout import Subject, collect, in_batches
from vlv_jax.networks import FLORENCE2, Networks

GROUP = "reconstruction"
CONDITIONS = ("vlv", "caption", "none", "wrong_image")
_OTHERS = {
    "caption": "from the true caption", "none": "from nothing", "wrong_image": "from another image",
}  # fmt: skip
_FRECHET_RESAMPLES = 100
PAIRS = (
    ("vlv", "caption"), ("vlv", "none"), ("vlv", "wrong_image"), ("caption", "none"),
    ("none", "wrong_image"),
)  # fmt: skip


def redraw_examples(subject: Subject, count: int) -> dict[str, Any]:
    """Redraws the first `count` held-out images under every condition, from the same noise.

    'vlv' has the image's caption embeddings, 'caption' its true caption as the diffusion pipeline
    reads it (cut to the text encoder's length), 'none' the empty caption, 'wrong_image' the
    embeddings of the next image.

    Returns:
      `ids`, `original` uint8 [n, H, W, 3], `caption` (the true ones), and each condition's
      images, uint8 [n, H, W, 3]. Conditions that are not possible (no captions; a single image)
      are left out.
    """
    auto = subject.autoencoder
    found = collect(
        subject,
        count,
        lambda batch: {
            "ids": batch["ids"], "original": batch["image"], "caption_text": batch["caption"],
            "z": auto.encode_views(batch["florence_image"]),
        },
    )  # fmt: skip
    z, captions = found.pop("z"), found["caption_text"]
    found["vlv"] = _drawn(subject, z)
    found["none"] = _drawn(subject, [""] * len(captions))
    if all(captions):
        found["caption"] = _drawn(subject, captions)
    if len(z) > 1:
        found["wrong_image"] = _drawn(subject, np.roll(z, -1, axis=0))
    return found


def _drawn(subject: Subject, inputs: np.ndarray | list[str]) -> np.ndarray:
    """Images of embeddings or texts, uint8 [n, H, W, 3]; a row's noise follows from its place."""
    auto = subject.autoencoder

    def draw(rows: slice) -> np.ndarray:
        if isinstance(inputs, list):
            return auto.draw_texts(inputs[rows], start=rows.start)
        return auto.reconstruct(inputs[rows], start=rows.start)

    return np.concatenate(in_batches(len(inputs), auto.sampling.batch_size, draw))


def pixel_mse(images: np.ndarray, originals: np.ndarray) -> np.ndarray:
    """Mean squared difference of each image, pixels in 0..1: [n]."""
    difference = images.astype(np.float32) / 255.0 - originals.astype(np.float32) / 255.0
    return np.mean(np.square(difference), axis=(1, 2, 3))


@functools.partial(jax.jit, static_argnames=("networks",))
def tower_features(networks: Networks, params: Any, views: jax.Array) -> jax.Array:
    """Florence-2's DaViT features before projection, float32 [B, P, C]."""
    mean = jnp.asarray(networks.image_mean, jnp.float32)[None, None, None]
    std = jnp.asarray(networks.image_std, jnp.float32)[None, None, None]
    pixels = (views.astype(jnp.float32) / 255.0 - mean) / std
    features = networks.florence2.apply(
        {"params": params[FLORENCE2]}, pixels, method="vision_features"
    )
    B, _, _, C = features.shape
    return features.reshape(B, -1, C).astype(jnp.float32)


def davit_features(subject: Subject, images: np.ndarray) -> np.ndarray:
    """`tower_features` of images at the VAE's size: float32 [n, P, C]."""
    auto = subject.autoencoder
    processor: ImageProcessor = auto.pieces.processor

    def features(rows: slice) -> np.ndarray:
        views = np.stack([processor.resize(x) for x in images[rows]])
        padded = jnp.asarray(auto.pad_batch(views))
        return np.asarray(tower_features(auto.networks, auto.params, padded))[: len(views)]

    return np.concatenate(in_batches(len(images), auto.sampling.batch_size, features))


def feature_distances(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    """Distances of features [n, P, C] place by place, so that layout counts: each [n].

    `davit_cosine` is one minus the cosine, averaged over places; `davit_l2` the root mean square
    difference.
    """
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine = np.sum(a * b, axis=-1) / np.maximum(norms, 1e-12)
    return {
        "davit_cosine": np.mean(1.0 - cosine, axis=1),
        "davit_l2": np.sqrt(np.mean(np.square(a - b), axis=(1, 2))),
    }


def measure(
    drawn: Mapping[str, Any], features: Mapping[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Distance -> condition -> values [n].

    Args:
      drawn: from `redraw_examples`.
      features: `davit_features` of the originals and of every condition's images.
    """
    values: dict[str, dict[str, np.ndarray]] = {}
    for condition in CONDITIONS:
        if condition not in drawn:
            continue
        found = {"pixel_mse": pixel_mse(drawn[condition], drawn["original"])}
        found |= feature_distances(features[condition], features["original"])
        for name, column in found.items():
            values.setdefault(name, {})[condition] = column
    return values


def add_frechet(
    report: Report, section: str, subject: Subject, features: Mapping[str, np.ndarray], settings
) -> list[str]:
    """Adds the Frechet distance of averaged DaViT features between redrawn and original images.

    Returns:
      Why it was left out, where there are too few images for it.
    """
    pooled = {name: values.mean(axis=1) for name, values in features.items()}
    options = {"features": "davit-mean", "seed": subject.evaluation.seed}
    for condition in ("vlv", "caption", "none"):
        if condition not in pooled:
            continue
        try:
            # Each resample costs two eigendecompositions.
            found = frechet_distance(
                pooled[condition], pooled["original"], num_resamples=_FRECHET_RESAMPLES, **options
            )
        except ValueError as error:
            return [str(error)]
        report.add_metric(
            section, f"reconstruction.{found.name}.{condition}", found.value, n=found.n,
            interval=found.interval, seed=found.seed,
            settings={**settings, "bootstrap_samples": _FRECHET_RESAMPLES,
                      "dimension": found.dimension},
        )  # fmt: skip
    return []


def add_comparison(
    report: Report,
    section: str,
    prefix: str,
    values: Mapping[str, np.ndarray],
    *,
    options: Mapping[str, int],
    settings: Mapping[str, Any],
) -> None:
    """Adds means of conditions and their paired differences with intervals.

    `{prefix}.{condition}` are means, `{prefix}_difference.{a}_minus_{b}` mean differences over
    the same images; the settings of a difference say whether its interval excludes zero.
    """
    for condition, column in values.items():
        estimate = bootstrap_mean(column, **options)
        report.add_metric(section, f"{prefix}.{condition}", estimate, settings=settings)
    for a, b in PAIRS:
        if a in values and b in values:
            estimate = bootstrap_difference(values[a], values[b], **options)
            report.add_metric(
                section, f"{prefix}_difference.{a}_minus_{b}", estimate,
                settings={**settings, "excludes_zero": estimate.excludes_zero},
            )  # fmt: skip


def report_reconstruction(
    report: Report,
    section: str,
    subject: Subject,
    drawn: Mapping[str, Any],
    records: Sequence[CaptionRecord],
    out: pathlib.Path,
) -> list[str]:
    """Adds `reconstruction.*` and the gallery to a report, and saves each image's distances.

    Args:
      report: where to.
      section: under which name.
      subject: what is evaluated.
      drawn: from `redraw_examples`.
      records: captions; those of the redrawn images are shown beside them. May be empty.
      out: the folder of the report.

    Returns:
      What was left out, and why.
    """
    sampling = subject.autoencoder.sampling
    settings: dict[str, Any] = {
        f"sampling.{n}": getattr(sampling, n) for n in ("sampler", "num_steps", "guidance", "seed")
    }
    settings |= {
        "stage": subject.experiment.stage,
        "bootstrap_samples": subject.evaluation.bootstrap_samples,
        "davit": "Florence-2's image features, the ones that VLV reads",
    }
    if "caption" in drawn:
        settings["captions_cut"] = cut_fraction(subject, drawn["caption_text"])
    features = {
        name: davit_features(subject, drawn[name])
        for name in ("original", *CONDITIONS)
        if name in drawn
    }
    columns: dict[str, np.ndarray] = {}
    for name, values in measure(drawn, features).items():
        columns |= {f"reconstruction.{name}.{c}": column for c, column in values.items()}
        add_comparison(report, section, f"reconstruction.{name}", values,
                       options=subject.bootstrap, settings=settings)  # fmt: skip
    save_examples(out / examples_file(GROUP), columns_of(drawn["ids"], columns))
    report.add_gallery(
        section, "Original, redrawn, captioned", gallery(subject, drawn, records),
        note="Redrawn from the image's caption embeddings. For comparison, from the same noise: "
        "from its true caption, from the empty caption, from the next image's embeddings.",
    )  # fmt: skip
    missing = [c for c in CONDITIONS if c not in drawn]
    return [
        *add_frechet(report, section, subject, features, settings),
        *(f"redrawing from {c}: not possible with this data" for c in missing),
    ]


def cut_fraction(subject: Subject, captions: Sequence[str]) -> float:
    """Share of true captions that are longer than the text encoder reads."""
    tokenizer = subject.autoencoder.pieces.text_tokenizer
    limit = subject.autoencoder.networks.text_encoder.config.max_position_embeddings
    lengths = [len(ids) for ids in tokenizer(list(captions))["input_ids"]]
    return float(np.mean([n > limit for n in lengths]))


def gallery(
    subject: Subject, drawn: Mapping[str, Any], records: Sequence[CaptionRecord]
) -> list[GalleryRow]:
    """One row an image: original, redrawn, what was written and what the scorer says of it."""
    written = {r.id: r for r in records}
    shown = [written[i] for i in drawn["ids"] if i in written]
    counts = score_records(subject, shown, []) if shown else None
    scored = dict(zip([r.id for r in shown], counts, strict=True)) if counts else {}
    rows = []
    for i, name in enumerate(drawn["ids"]):
        rows.append(
            GalleryRow(
                images={"original": drawn["original"][i], "redrawn": drawn["vlv"][i]},
                more={text: drawn[c][i] for c, text in _OTHERS.items() if c in drawn},
                caption=written[name].caption.text if name in written else None,
                reference=drawn["caption_text"][i] or None,
                verdict=verdict(scored[name]) if name in scored else {},
                note=score_note(scored[name]) if name in scored else None,
                id=name,
            )
        )
    return rows
