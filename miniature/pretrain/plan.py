"""What is trained, in which order and for how long."""

import dataclasses
import pathlib
import shutil
import time

from miniature import standins


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """Numbers of training images and steps.

    Attributes:
      images: rendered scenes, shared by all parts.
      vae: optimizer steps of the autoencoder.
      text_encoder: of the text encoder on what a caption says of every cell.
      diffusion: of the UNet, the text encoder frozen.
      tower: of the vision tower on what is in every cell.
      florence2: of all of Florence-2 on captions.
      language_models: steps of each size on text.
      soft_words: further ones, with prefixes of vectors between words.
      target_tower: of the tower of each vision-language model on what is in every cell.
      target: of all of each vision-language model on conversations about pictures.
      text_models: of each language model that drafters are made of.
    """

    images: int
    vae: int
    text_encoder: int
    diffusion: int
    tower: int
    florence2: int
    language_models: int
    soft_words: int
    target_tower: int
    target: int
    text_models: int


SCALES = {
    # Some two and a half hours on two cores.
    "full": Scale(
        images=24_000, vae=4000, text_encoder=700, diffusion=3000, tower=1000, florence2=2000,
        language_models=3000, soft_words=1500, target_tower=1000, target=2000, text_models=1000,
    ),
    # Seconds: shows that everything runs. The results know nothing.
    "smoke": Scale(
        images=128, vae=4, text_encoder=4, diffusion=4, tower=4, florence2=4, language_models=4,
        soft_words=4, target_tower=4, target=4, text_models=4,
    ),
}  # fmt: skip
PARTS = (
    "tokenizers", "vae", "diffusion", "florence2", *standins.LANGUAGE_MODELS,
    standins.QWEN2_5_TEXT, standins.QWEN2_5_VL, standins.GEMMA_3_TEXT, standins.GEMMA_3,
)  # fmt: skip


def run(out: pathlib.Path, workdir: pathlib.Path, *, parts: tuple[str, ...], scale: Scale) -> None:
    """Trains the named parts; one that `out` already holds is left alone.

    Raises:
      ValueError: an unknown part.
    """
    unknown = [p for p in parts if p not in PARTS]
    if unknown:
        raise ValueError(f"unknown parts {unknown}; there are {', '.join(PARTS)}")
    for part in parts:
        began = time.time()
        marker = workdir / "done" / part
        if marker.exists():
            print(f"{part}: already trained ({marker})", flush=True)
            continue
        _train(part, out, workdir, scale)
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.write_text(f"{time.time() - began:.0f} s\n")
        print(f"{part}: {time.time() - began:.0f} s", flush=True)


def _write_tokenizers(out: pathlib.Path, workdir: pathlib.Path) -> None:
    """Every directory gets its own copy, as on the hub."""
    from miniature.tokenizers import build_tokenizers

    built = build_tokenizers(workdir / "tokenizers")
    targets = {
        out / standins.PIPELINE / "tokenizer": "clip",
        out / standins.FLORENCE2: "florence2",
        **{out / name: "qwen2" for name in standins.LANGUAGE_MODELS},
        out / standins.QWEN2_5_VL: "qwen2-chat",
        out / standins.QWEN2_5_TEXT: "qwen2-chat",
        out / standins.GEMMA_3: "gemma3",
        out / standins.GEMMA_3_TEXT: "gemma3-text",
    }
    for target, name in targets.items():
        shutil.copytree(built[name], target, dirs_exist_ok=True)


def _train(part: str, out: pathlib.Path, workdir: pathlib.Path, scale: Scale) -> None:
    pipeline = out / standins.PIPELINE
    if part == "tokenizers":
        _write_tokenizers(out, workdir)
    elif part == "vae":
        from miniature.pretrain.train_vae import train_vae

        train_vae(pipeline, workdir, steps=scale.vae, num_images=scale.images)
    elif part == "diffusion":
        from miniature.pretrain.train_diffusion import train_diffusion

        train_diffusion(
            pipeline,
            workdir,
            text_steps=scale.text_encoder,
            steps=scale.diffusion,
            num_images=scale.images,
        )
    elif part == "florence2":
        from miniature.pretrain.train_florence2 import train_florence2

        train_florence2(
            out / standins.FLORENCE2,
            workdir,
            tower_steps=scale.tower,
            steps=scale.florence2,
            num_images=scale.images,
        )
    elif part in (standins.QWEN2_5_VL, standins.GEMMA_3):
        from miniature.pretrain import train_target

        train = {
            standins.QWEN2_5_VL: train_target.train_qwen2_5_vl,
            standins.GEMMA_3: train_target.train_gemma_3,
        }[part]
        train(
            out / part, workdir, tower_steps=scale.target_tower, steps=scale.target,
            num_images=scale.images,
        )  # fmt: skip
    elif part in (standins.QWEN2_5_TEXT, standins.GEMMA_3_TEXT):
        from miniature.pretrain import train_text_model

        train = {
            standins.QWEN2_5_TEXT: train_text_model.train_qwen2_5_text,
            standins.GEMMA_3_TEXT: train_text_model.train_gemma_3_text,
        }[part]
        train(out / part, workdir, steps=scale.text_models)
    else:
        from miniature.pretrain.train_language_model import train_language_model

        train_language_model(
            out / part, workdir, steps=scale.language_models, soft_steps=scale.soft_words
        )
