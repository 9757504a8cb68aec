"""`python -m miniature.pretrain.quality`: how good each stand-in is, on held-out scenes.

Writes `quality.json` and a README.md with a table beside the checkpoints.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from PIL import Image
from transformers import AutoTokenizer

from core_jax.data.processors import ImageProcessor
from core_jax.decode.adapters import CausalDecoder, EncoderDecoder, EncoderPrefix, TokenPrefix
from core_jax.decode.generate import generate
from core_jax.decode.target import Target, WindowDecoder, load_target
from core_jax.diffusion.schedule import NoiseSchedule, add_noise, training_target
from core_jax.models import load_model
from core_jax.ops.losses import token_cross_entropy
from core_jax.partition import count_parameters
from miniature import standins
from miniature.pretrain.scenes import captions, question_texts, scenes
from miniature.pretrain.train_florence2 import LENGTH, PROMPT
from miniature.pretrain.train_language_model import QUESTION_FORMAT
from miniature.world import aggregate, describe, render, scorer
from miniature.world.dialogues import DESCRIBE, interview

_DIR = flags.DEFINE_string("dir", str(standins.CHECKPOINTS), "Where the stand-ins are.")
_COUNT = flags.DEFINE_integer("count", 256, "Held-out scenes.")
_BATCH, _NEW_TOKENS = 32, 72  # of the targets' answers
_TIMESTEPS = 8  # of each picture in the denoising comparison


def main(argv: list[str]) -> None:
    """Entry point."""
    del argv
    root, found = pathlib.Path(_DIR.value), scenes("heldout", 0, _COUNT.value)
    pixels = np.stack([render(s) for s in found])
    measured = {"n": len(found), "split": "heldout", "parts": {}}
    measured["parts"] |= _pipeline(root / standins.PIPELINE, found, pixels)
    measured["parts"][standins.FLORENCE2] = _florence2(root / standins.FLORENCE2, found, pixels)
    for name in standins.LANGUAGE_MODELS:
        measured["parts"][name] = _language_model(root / name, found)
    for name in filter(lambda name: (root / name).exists(), standins.TARGETS):
        measured["parts"][name] = _target(root / name, found, pixels)
    for name in filter(lambda name: (root / name).exists(), standins.TEXT_MODELS):
        measured["parts"][name] = {"parameters": _count(root / name)}
    for name, values in measured["parts"].items():
        values["megabytes"] = _megabytes(root / name)
    (root / "quality.json").write_text(json.dumps(measured, indent=2) + "\n")
    (root / "README.md").write_text(_table(measured))
    print(_table(measured))


def _megabytes(path: pathlib.Path) -> float:
    return round(sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e6, 2)


def _pipeline(path: pathlib.Path, found, pixels) -> dict[str, dict]:
    models, params = load_model(path, dtype="float32")
    schedule = NoiseSchedule.from_hf(
        json.loads((path / "scheduler" / "scheduler_config.json").read_text())
    )
    tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
    vae, unet, text = models["vae"], models["unet"], models["text_encoder"]
    x = jnp.asarray(pixels, jnp.float32) / 127.5 - 1.0

    @jax.jit
    def encode(x):
        mean, _ = vae.apply({"params": params["vae"]}, x, method="encode")
        y = vae.apply({"params": params["vae"]}, mean, method="decode")
        return mean, jnp.mean(jnp.square(y - x))

    parts = [encode(part) for part in jnp.split(x, max(1, len(x) // 64))]
    mean = jnp.concatenate([p[0] for p in parts]) * vae.config.scaling_factor
    mse = float(np.mean([p[1] for p in parts]))

    @jax.jit
    def losses(latents, ids, t, noise):
        context = text.apply({"params": params["text_encoder"]}, ids)
        noisy = add_noise(schedule, latents, noise, t)
        out = unet.apply({"params": params["unet"]}, noisy, t, context)
        return jnp.mean(
            jnp.square(out - training_target(schedule, latents, noise, t)), axis=(1, 2, 3)
        )

    def ids_of(texts):
        encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=77)
        return jnp.asarray(encoded["input_ids"], jnp.int32)

    texts = captions(found, style="default", seed=0)
    conditions = {"caption": texts, "none": [""] * len(texts), "wrong": texts[1:] + texts[:1]}
    sums = dict.fromkeys(conditions, 0.0)
    for i in range(_TIMESTEPS):
        k_t, k_noise = jax.random.split(jax.random.key(i))
        t = jax.random.randint(k_t, (len(mean),), 0, schedule.num_train_timesteps)
        noise = jax.random.normal(k_noise, mean.shape)
        for name, words in conditions.items():
            sums[name] += float(jnp.mean(losses(mean, ids_of(words), t, noise))) / _TIMESTEPS
    return {
        standins.PIPELINE: {
            "vae_psnr_db": round(float(10 * np.log10(4.0 / mse)), 2),
            **{f"denoising_loss_{n}": round(v, 5) for n, v in sums.items()},
        }
    }


def _florence2(path: pathlib.Path, found, pixels) -> dict:
    """Greedy captions, scored like VLV's."""
    model, params = load_model(path, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(path)
    processor = ImageProcessor.from_hf(json.loads((path / "preprocessor_config.json").read_text()))
    prompt = jnp.asarray(tokenizer(PROMPT)["input_ids"], jnp.int32)[None]

    @jax.jit
    def encode(x):
        ids = jnp.broadcast_to(prompt, (x.shape[0], prompt.shape[1]))
        image = model.apply({"params": params}, x, method="encode_image")
        words = model.apply({"params": params}, ids, method="embed_tokens")
        states = jnp.concatenate([image, words], axis=1)
        return model.apply({"params": params}, states, method="encode")

    texts = []
    for part in np.split(pixels, max(1, len(pixels) // 64)):
        out = generate(
            EncoderDecoder(model), params,
            EncoderPrefix(encode(jnp.asarray(processor.normalize(part)))),
            max_new_tokens=LENGTH, eos_ids=model.config.text_config.eos_token_id,
        )  # fmt: skip
        for row, n in zip(np.asarray(out.tokens), np.asarray(out.lengths), strict=True):
            texts.append(tokenizer.decode(row[:n].tolist(), skip_special_tokens=True))
    scores = aggregate(scorer(found, texts))
    return {k: round(scores[k], 4) for k in ("object_f1", "relation_f1")}


def _language_model(path: pathlib.Path, found) -> dict:
    model, params = load_model(path, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = captions(found, style="default", seed=0)
    ids, mask = _padded(tokenizer, texts, left=False)
    logits = jax.jit(lambda i: model.apply({"params": params}, i))(ids[:, :-1])
    losses = token_cross_entropy(logits, ids[:, 1:])
    weights = mask[:, 1:].astype(jnp.float32)
    perplexity = float(jnp.exp(jnp.sum(losses * weights) / jnp.sum(weights)))
    right = total = 0
    prompts, answers = [], []
    for scene in found:
        for question, answer in question_texts(scene, 0):
            caption = describe(scene, 1)
            prompts.append(
                QUESTION_FORMAT.format(caption=caption, question=question, answer="").rstrip()
            )
            answers.append(answer)
    for i in range(0, len(prompts), 128):
        ids, mask = _padded(tokenizer, prompts[i : i + 128], left=True, length=120)
        out = generate(
            CausalDecoder(model), params, TokenPrefix(ids, mask), max_new_tokens=6,
            eos_ids=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for row, n, answer in zip(
            np.asarray(out.tokens), np.asarray(out.lengths), answers[i : i + 128], strict=True
        ):
            said = tokenizer.decode(row[:n].tolist(), skip_special_tokens=True)
            said = said.split("\n")[0].strip()
            right, total = right + (said == answer), total + 1
    return {
        "caption_perplexity": round(perplexity, 3),
        "answers_from_true_captions": round(right / total, 4),
    }


def _target(path: pathlib.Path, found, pixels) -> dict[str, float]:
    """Greedy descriptions, scored like VLV's captions, and answers to a question a picture."""
    target = load_target(path, dtype="float32")
    images = [Image.fromarray(picture) for picture in pixels]
    scores = aggregate(scorer(found, _answers(target, images, [DESCRIBE[0]] * len(found))))
    asked = [interview(scene, 0, turns=1)[0] for scene in found]
    said = _answers(target, images, [question for question, _ in asked])
    right = [a == b for a, (_, b) in zip(said, asked, strict=True)]
    return {
        **{k: round(scores[k], 4) for k in ("object_f1", "relation_f1")},
        "answers": round(float(np.mean(right)), 4),
    }


def _answers(target: Target, images: list[Image.Image], questions: list[str]) -> list[str]:
    """Greedily, in batches of one shape."""
    texts = []
    for first in range(0, len(images), _BATCH):
        at = [min(i, len(images) - 1) for i in range(first, first + _BATCH)]
        rendered = [target.frontend.render(questions[i], 1) for i in at]
        inputs = target.frontend.prepare(rendered, [[images[i]] for i in at], lengths=(64, 96))
        tokens = np.asarray(
            _greedy(target.decoder, target.params, inputs.prompt, inputs.images, _NEW_TOKENS)
        )
        for row in tokens[: len(images) - first]:
            ends = np.flatnonzero(np.isin(row, target.eos_ids))
            ids = row[: ends[0]] if len(ends) else row
            texts.append(target.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip())
    return texts


@functools.partial(jax.jit, static_argnums=(0, 4))
def _greedy(decoder: WindowDecoder, params, prompt, images, new_tokens: int) -> jax.Array:
    vision = decoder.encode_images(params, images)
    logits, state = decoder.begin(params, prompt, vision, max_new_tokens=new_tokens, window=0)
    first = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def step(carry, _):
        token, state = carry
        logits, state = decoder.extend(params, state, token[:, None])
        following = jnp.argmax(logits[:, 0], axis=-1).astype(jnp.int32)
        return (following, state), token

    return jax.lax.scan(step, (first, state), None, length=new_tokens)[1].T


def _count(path: pathlib.Path) -> int:
    return count_parameters(load_model(path)[1])


def _padded(tokenizer, texts, *, left: bool, length: int | None = None):
    rows = tokenizer(texts)["input_ids"]
    width = length or max(map(len, rows))
    ids = np.full((len(rows), width), tokenizer.pad_token_id, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, where], mask[i, where] = row, True
    return jnp.asarray(ids), jnp.asarray(mask)


def _table(measured: dict) -> str:
    lines = [
        "# Stand-ins for the hub",
        "",
        "Trained on the miniature world by `make miniature`, stored in bfloat16;",
        f"measured on {measured['n']} held-out scenes by `python -m miniature.pretrain.quality`.",
        "",
        "| directory | MB | measured |",
        "|---|---|---|",
    ]
    for name, values in measured["parts"].items():
        facts = ", ".join(f"{k} {v}" for k, v in values.items() if k != "megabytes")
        lines.append(f"| {name} | {values['megabytes']} | {facts} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app.run(main)
