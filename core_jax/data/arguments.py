"""The command-line arguments that name a source, shared by this package's commands."""

from __future__ import annotations

import argparse

from core_jax.data.sources import SourceSpec

_TEXT = {
    "name": "tfds: registered name",
    "split": "tfds: split to read, slices allowed",
    "manifest": "folder: JSONL or JSON list of images and captions",
    "images": "folder that image paths are relative to",
    "image_key": "parquet, tfds: column or feature of the image",
    "caption_key": "parquet, tfds: column or feature of the caption",
    "id_key": "parquet, tfds: column or feature of the id",
    "captions": "coco: all or first",
    "caption_suffix": "folder: suffix of the caption file beside each image",
    "cache_dir": "webdataset: where the index goes",
}


def add_source_arguments(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """Adds `--from`, `--kind` and one argument a field of `SourceSpec`."""
    parser.add_argument("--from", dest="from_path", help="file or folder of the source")
    parser.add_argument("--kind", default="auto", help="folder, parquet, webdataset, coco, tfds")
    parser.add_argument("--follow-symlinks", action="store_true", default=None)
    for field, text in _TEXT.items():
        flag = f"--{prefix}{field}".replace("_", "-")
        parser.add_argument(flag, dest=f"source_{field}", help=text)


def spec_from_arguments(arguments: argparse.Namespace) -> SourceSpec:
    """The spec that the parsed arguments name."""
    fields = {field: getattr(arguments, f"source_{field}") for field in _TEXT}
    return SourceSpec(
        kind=arguments.kind,
        path=arguments.from_path,
        follow_symlinks=arguments.follow_symlinks,
        **fields,
    )
