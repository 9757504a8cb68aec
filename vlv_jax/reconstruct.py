"""Redraws images from what a model keeps of them.

    python -m vlv_jax.reconstruct --config C --workdir RUN --input photos --output redrawn
    python -m vlv_jax.reconstruct --from EXPORT --captions captions.jsonl --output drawn
    python -m vlv_jax.reconstruct --from EXPORT --embeddings z.npz --output redrawn
    python -m vlv_jax.reconstruct --from EXPORT --compose A.png --compose B.png --output mixed

Each picture is a PNG named after its input; sheet.png has them side by side with the originals.
Steps, guidance, sampler and seed are the config's `sampling`, such as
--config.sampling.guidance=1.5, or --guidance and so on.
"""

import dataclasses
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from core_jax.data.images import BadImage, decode_image
from core_jax.data.sources import (
    IMAGE_SUFFIXES,
    SourceError,
    clean_text,
    read_jsonl,
    walk_files,
)
from vlv_jax.commands import run_command
from vlv_jax.experiment import Experiment
from vlv_jax.inference import Autoencoder, load_for_command
from vlv_jax.redrawing import compose
from vlv_jax.sample_sheets import draw_sheet

_MAX_SHEET = 64  # rows
_SHEET = "sheet"  # name of their picture


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Attributes:
      names: of the inputs, without suffix; unique.
      images: uint8 [n, H, W, 3].
      originals: uint8 [n, H, W, 3], what the model saw of the input; None where there is none.
      captions: the texts that were drawn, or None.
      embeddings: float32 [n, Q, E], or None.
    """

    names: Sequence[str]
    images: np.ndarray
    originals: np.ndarray | None = None
    captions: Sequence[str] | None = None
    embeddings: np.ndarray | None = None


def list_images(paths: Sequence[str]) -> list[pathlib.Path]:
    """Image files of files and folders (recursively), in a fixed order, each of them once.

    Raises:
      SourceError: a path is not there, or there is no image at all.
    """
    files: dict[str, pathlib.Path] = {}
    for text in paths:
        path = pathlib.Path(text).expanduser()
        if path.is_dir():
            found = sorted(f for f in walk_files(path) if f.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            found = [path]
        else:
            raise SourceError(f"--input {path} is neither a file nor a folder")
        for file in found:
            files.setdefault(os.path.abspath(file), file)
    if not files:
        raise SourceError(f"no image among {', '.join(paths)}")
    return list(files.values())


def unique_names(stems: Sequence[str]) -> list[str]:
    """File names that differ, also from the sheet's: a second `cat` becomes `cat-2`."""
    used = {_SHEET}
    out = []
    for stem in stems:
        safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in stem) or "image"
        name = next(
            n for n in itertools.chain([safe], (f"{safe}-{i}" for i in itertools.count(2)))
            if n.lower() not in used
        )  # fmt: skip
        used.add(name.lower())  # some file systems know no case
        out.append(name)
    return out


def redraw_images(auto: Autoencoder, files: Sequence[pathlib.Path], say=print) -> Iterator[Drawn]:
    """Redraws images, a batch at a time; those that cannot be used are told and left out."""
    names = dict(zip(files, unique_names([f.stem for f in files]), strict=True))
    size = auto.sampling.batch_size
    done = 0
    for start in range(0, len(files), size):
        good, views = [], []
        for file in files[start : start + size]:
            try:
                views.append(auto.views(decode_image(file, auto.limits)))
                good.append(names[file])
            except BadImage as error:
                say(clean_text(f"left out: {file}: {error.reason}"))
        if not good:
            continue
        z = auto.encode_views(np.stack([v["florence_image"] for v in views]))
        yield Drawn(
            good, auto.reconstruct(z, start=done),
            originals=np.stack([v["image"] for v in views]), embeddings=z,
        )  # fmt: skip
        done += size


def draw_captions(auto: Autoencoder, file: pathlib.Path) -> Drawn:
    """Draws the captions of a JSONL file, such as `vlv_jax.caption` writes.

    Raises:
      SourceError: a line is no object with a caption; lines with an error are passed over.
    """
    rows = []
    for number, row in read_jsonl(file):
        if "error" in row:
            continue
        text = row.get("caption", row.get("text"))
        if not isinstance(text, str):
            raise SourceError(f"{file}:{number} has no caption (keys `caption` or `text`)")
        name = pathlib.PurePath(str(row.get("id") or row.get("file_name") or f"{number:05d}"))
        rows.append((name.stem if name.suffix.lower() in IMAGE_SUFFIXES else name.name, text))
    if not rows:
        raise SourceError(f"{file} has no captions")
    texts = [text for _, text in rows]
    return Drawn(unique_names([n for n, _ in rows]), auto.draw_texts(texts), captions=texts)


def load_embeddings(file: pathlib.Path, auto: Autoencoder) -> tuple[list[str], np.ndarray]:
    """Names and embeddings float32 [n, Q, E] of an .npz with `embeddings` and perhaps `names`.

    Raises:
      SourceError: it is no such file, or its embeddings are not the model's.
    """
    try:
        with np.load(file, allow_pickle=False) as content:
            if "embeddings" not in content:
                raise SourceError(f"{file} has no array `embeddings`, but {list(content)}")
            z = np.asarray(content["embeddings"], np.float32)
            names = [str(n) for n in content["names"]] if "names" in content else []
    except (ValueError, OSError) as error:
        if isinstance(error, SourceError):
            raise
        raise SourceError(f"{file} is no .npz of plain arrays ({error})") from error
    text = auto.networks.text_encoder.config
    if z.ndim != 3 or not len(z) or z.shape[2] != text.hidden_size:
        raise SourceError(f"{file}: embeddings are {z.shape}, not [n, Q, {text.hidden_size}]")
    if not 0 < z.shape[1] <= text.max_position_embeddings:
        raise SourceError(
            f"{file}: {z.shape[1]} embeddings an image; at most {text.max_position_embeddings}"
        )
    return unique_names(names or [f"{i:05d}" for i in range(len(z))]), z


def compose_images(
    auto: Autoencoder, first: str, second: str, *, num_first: int, num_second: int
) -> Drawn:
    """Draws the leading embeddings of two images, one after the other (paper, section 4.4.2).

    Raises:
      SourceError: one of the two is no file.
      ValueError: more embeddings than an image has, or than the text encoder takes.
    """
    files = [pathlib.Path(text).expanduser() for text in (first, second)]
    for file in files:
        if not file.is_file():
            raise SourceError(f"--compose {file} is no image file; it takes two of them")
    limit = auto.networks.text_encoder.config.max_position_embeddings
    if num_first + num_second > limit:
        raise ValueError(
            f"--num_first {num_first} and --num_second {num_second} are more than the "
            f"{limit} embeddings that the text encoder takes"
        )
    views = [auto.views(decode_image(f, auto.limits)) for f in files]
    z = auto.encode_views(np.stack([v["florence_image"] for v in views]))
    mixed = np.asarray(compose(z[:1], z[1:], num_first=num_first, num_second=num_second))
    drawn = auto.reconstruct(mixed)
    name = f"{files[0].stem}-{num_first}-{files[1].stem}-{num_second}"
    halves = np.concatenate([views[0]["image"], views[1]["image"]], axis=1)
    return Drawn(unique_names([name]), drawn, originals=halves[None], embeddings=mixed)


class Writer:
    """Writes pictures as they come, and what needs all of them at the end."""

    def __init__(self, output: pathlib.Path, *, keep_embeddings: bool):
        output.mkdir(parents=True, exist_ok=True)
        self._output, self._keep = output, keep_embeddings
        self._all: list[Drawn] = []
        self.count = 0

    def add(self, drawn: Drawn) -> None:
        """Writes the pictures of one batch."""
        for name, image in zip(drawn.names, drawn.images, strict=True):
            Image.fromarray(image).save(self._output / f"{name}.png")
        self.count += len(drawn.names)
        on_sheet = sum(len(d.names) for d in self._all) < _MAX_SHEET
        if on_sheet or self._keep:
            self._all.append(drawn)

    def close(self) -> None:
        """Writes sheet.png (the first pictures) and, if wanted, embeddings.npz."""
        if not self._all:
            return
        rows = [row for drawn in self._all for row in _sheet_rows(drawn)][:_MAX_SHEET]
        captions = [text for _, _, text in rows]
        sheet = draw_sheet(
            [left for left, _, _ in rows], [right for _, right, _ in rows],
            captions if any(captions) else None,
        )  # fmt: skip
        sheet.save(self._output / f"{_SHEET}.png")
        if self._keep and self._all[0].embeddings is not None:
            np.savez(
                self._output / "embeddings.npz",
                embeddings=np.concatenate([d.embeddings for d in self._all]),
                names=np.array([n for d in self._all for n in d.names]),
            )


def _sheet_rows(drawn: Drawn) -> Iterator[tuple[np.ndarray, np.ndarray, str]]:
    for i, image in enumerate(drawn.images):
        left = np.full_like(image, 255) if drawn.originals is None else drawn.originals[i]
        yield left, image, drawn.captions[i] if drawn.captions else ""


def load_autoencoder(
    experiment: Experiment | None, workdir: pathlib.Path | None, source: str | None, **changes: Any
) -> Autoencoder:
    """The autoencoder of a run or of an exported directory.

    Args:
      experiment: its sampling, precision and execution are used; None: the directory's own.
      workdir: of a run.
      source: an exported directory (or another run), in the place of `workdir`.
      **changes: fields of `SamplingConfig`; None leaves one as it is.

    Raises:
      WorkdirError: none or both directories given, or not such a directory.
      ConfigError: an impossible setting.
    """
    return load_for_command(Autoencoder, experiment, workdir, source, **changes)


def _define_flags() -> dict[str, Any]:
    return {
        "from": flags.DEFINE_string("from", None, "Exported directory, instead of --workdir."),
        "input": flags.DEFINE_multi_string("input", None, "Image file or folder."),
        "captions": flags.DEFINE_string("captions", None, "JSONL with captions to draw."),
        "embeddings": flags.DEFINE_string("embeddings", None, "NPZ with `embeddings` [n, Q, E]."),
        "compose": flags.DEFINE_multi_string("compose", None, "Image; give it twice."),
        "num_first": flags.DEFINE_integer("num_first", 38, "Embeddings of the first image."),
        "num_second": flags.DEFINE_integer("num_second", 39, "Embeddings of the second."),
        "output": flags.DEFINE_string("output", None, "Folder to write to."),
        "save_embeddings": flags.DEFINE_bool("save_embeddings", False, "Also embeddings.npz."),
        "sampler": flags.DEFINE_string("sampler", None, "Overrides the config's."),
        "guidance": flags.DEFINE_float("guidance", None, "Overrides the config's."),
        "num_steps": flags.DEFINE_integer("num_steps", None, "Overrides the config's."),
        "seed": flags.DEFINE_integer("seed", None, "Overrides the config's."),
    }


def draw_all(auto: Autoencoder, value: dict[str, Any], say=print) -> Iterator[Drawn]:
    """What the flags ask for, batch by batch."""
    wanted = [n for n in ("input", "captions", "embeddings", "compose") if value[n]]
    if len(wanted) != 1:
        raise SourceError("give one of --input, --captions, --embeddings, --compose")
    if value["input"]:
        yield from redraw_images(auto, list_images(value["input"]), say)
    elif value["captions"]:
        yield draw_captions(auto, pathlib.Path(value["captions"]).expanduser())
    elif value["embeddings"]:
        names, z = load_embeddings(pathlib.Path(value["embeddings"]).expanduser(), auto)
        yield Drawn(names, auto.reconstruct(z), embeddings=z)
    else:
        if len(value["compose"]) != 2:
            raise SourceError("--compose takes two images: --compose A.png --compose B.png")
        yield compose_images(
            auto, *value["compose"], num_first=value["num_first"], num_second=value["num_second"]
        )


def main() -> None:
    """The command."""
    given = _define_flags()
    flags.mark_flags_as_required(["output"])

    def job(experiment: Experiment | None, workdir: pathlib.Path | None) -> None:
        value = {name: flag.value for name, flag in given.items()}
        changes = {n: value[n] for n in ("sampler", "guidance", "num_steps", "seed")}
        try:
            auto = load_autoencoder(experiment, workdir, value["from"], **changes)
            output = pathlib.Path(value["output"]).expanduser()
            writer = Writer(output, keep_embeddings=value["save_embeddings"])
            for drawn in draw_all(auto, value, lambda line: print(line, flush=True)):
                writer.add(drawn)
                print(f"{writer.count} pictures", flush=True)
        except (ValueError, BadImage) as error:
            raise SystemExit(f"error: {error}") from error
        writer.close()
        print(f"wrote {writer.count} pictures to {output}", flush=True)

    run_command(job, workdir=False, config=False)


if __name__ == "__main__":
    main()
