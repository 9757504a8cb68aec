"""Decoding and resizing a folder of JPEG files against transformers' image processor.

    python -m benchmarks.images [--size=middle|full]

Two measures, each over the whole folder, from file names to normalised float32 pixels:

- "one thread": this project's decoder and image processor, one image after another.
- "batches": this project's training pipeline (threads, checks of every header, 8-bit batches that
  are normalised on the device).

The peer does the same thing in both: Pillow, then transformers' Pillow processor, in a loop.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.alternate import Arguments, Benchmark, UnavailableError, main
from benchmarks.timing import Measured

ONE_THREAD, BATCHES = "one thread", "batches"
# Size -> (files, height, width, side of the result).
SIZES = {
    "tiny": (8, 48, 64, 32),
    "middle": (64, 480, 640, 384),
    "full": (64, 768, 1024, 768),
}
BATCH_SIZE = 8


def write_pictures(folder: pathlib.Path, count: int, height: int, width: int) -> int:
    """JPEG files of smooth colours with some detail, about as large as photographs; their bytes."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    total = 0
    for i in range(count):
        coarse = rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        noise = rng.integers(-8, 9, (height, width, 3))
        pixels = np.clip(np.asarray(smooth, np.int16) + noise, 0, 255).astype(np.uint8)
        file = folder / f"{i:04d}.jpg"
        Image.fromarray(pixels).save(file, quality=90)
        total += file.stat().st_size
    return total


def processor_config(side: int) -> dict[str, Any]:
    """Florence-2's preprocessor_config.json at another size."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": False, "do_resize": True, "do_rescale": True, "do_normalize": True,
        "resample": 3, "size": {"height": side, "width": side}, "rescale_factor": 1 / 255,
        "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", choices=tuple(SIZES), default="middle")


def _prepare(arguments: Arguments, folder: pathlib.Path) -> Mapping[str, Any]:
    count, height, width, side = SIZES[arguments.size]
    total = write_pictures(folder / "pictures", count, height, width)
    (folder / "preprocessor_config.json").write_text(json.dumps(processor_config(side)))
    return {
        "files": count, "pixels": f"{height}x{width}", "resized": f"{side}x{side}",
        "kilobytes_a_file": total / count / 1e3,
    }  # fmt: skip


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted((folder / "pictures").iterdir())


def _ours(arguments: Arguments, folder: pathlib.Path) -> Measured:
    import jax
    import jax.numpy as jnp

    from core_jax.data.images import decode_image
    from core_jax.data.pipeline import make_batches
    from core_jax.data.processors import ImageProcessor
    from core_jax.data.sources import SourceSpec, open_source

    config = json.loads((folder / "preprocessor_config.json").read_text())
    processor = ImageProcessor.from_hf(config)
    files = _files(folder)

    def one_thread():
        return np.concatenate([processor(decode_image(file)) for file in files])

    mean, std = (jnp.asarray(x)[None, None, None] for x in (processor.mean, processor.std))
    normalize = jax.jit(lambda x: (x.astype(jnp.float32) / 255.0 - mean) / std)
    source = open_source(SourceSpec(kind="folder", path=str(folder / "pictures")))

    def batches():
        iterator = make_batches(
            source, batch_size=BATCH_SIZE, seed=0, epochs=1, shuffle=False,
            num_threads=arguments.threads or 8,
            transform=lambda image, example, rng: {"image": processor.resize(image)},
        )  # fmt: skip
        with iterator:
            normalized = [normalize(batch["image"]) for batch in iterator]
        return jax.block_until_ready(normalized)

    measured = Measured()
    pixels = measured.time(ONE_THREAD, one_thread, repeats=arguments.repeats)
    batched = measured.time(BATCHES, batches, repeats=arguments.repeats)
    measured.outputs = {ONE_THREAD: pixels[:4], BATCHES: np.asarray(batched[0][:4])}
    return measured


def _theirs(arguments: Arguments, folder: pathlib.Path) -> Measured:
    from PIL import Image

    from benchmarks.torch_peer import load_torch

    torch = load_torch(arguments.threads)
    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ImportError as error:
        raise UnavailableError(
            f"transformers' Pillow processor is not available ({error}); "
            "pip install 'transformers>=5.20'"
        ) from error
    config = json.loads((folder / "preprocessor_config.json").read_text())
    processor = CLIPImageProcessorPil(**config)
    files = _files(folder)

    def loop():
        rows = []
        for file in files:
            with Image.open(file) as image:
                rows.append(processor(image.convert("RGB"), return_tensors="pt")["pixel_values"])
        return torch.cat(rows)

    measured = Measured(facts={"threads": torch.get_num_threads()})
    pixels = measured.time(ONE_THREAD, loop, repeats=arguments.repeats)
    # One loop is all there is: it is what both of this project's measures are held against.
    measured.seconds[BATCHES] = measured.seconds[ONE_THREAD]
    measured.first_call[BATCHES] = measured.first_call[ONE_THREAD]
    first = pixels[:4].numpy().transpose(0, 2, 3, 1)
    measured.outputs = {ONE_THREAD: first, BATCHES: first}
    return measured


def _rates(arguments: Arguments) -> dict[str, tuple[str, float]]:
    count = float(SIZES[arguments.size][0])
    return {ONE_THREAD: ("images/s", count), BATCHES: ("images/s", count)}


BENCHMARK = Benchmark(
    module="benchmarks.images",
    peer="Pillow and transformers' processor",
    add_arguments=_add_arguments,
    name=lambda a: f"images-{a.size}",
    prepare=_prepare,
    ours=_ours,
    theirs=_theirs,
    repeats=3,
    rates=_rates,
)

if __name__ == "__main__":
    sys.exit(main(BENCHMARK))
