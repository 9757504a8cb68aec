"""The Qwen2.5 stand-ins: language models of the miniature world's text, pictures unseen.

What a language model of the hub can do before it sees a picture, these learn too: to write a
caption as each of the three authors would, to say one author's caption in another's words, and to
answer questions about a caption. At last they learn to read vectors that are mixtures of words
(`soft_words`). Nothing in it knows of vectors that stand for a picture.
"""

import functools
import pathlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from transformers import AutoTokenizer

from core_jax.models import qwen2, save_model
from core_jax.ops.execution import Execution
from core_jax.ops.losses import masked_mean, token_cross_entropy
from miniature import standins
from miniature.pretrain.fit import fit
from miniature.pretrain.looking_back import with_heads_that_look_back
from miniature.pretrain.made_ahead import made_ahead
from miniature.pretrain.scenes import question_texts
from miniature.pretrain.soft_words import bags, blurred
from miniature.world import STYLES, Scene, describe, sample_scene

BATCH = 24
LENGTH = 160  # a caption and some ten questions
Pieces = list[tuple[str, float]]  # parts of a text and what their tokens count
SCENES = 20_000
LEARNING_RATES = {"qwen2.5-small": 6e-3, "qwen2.5-medium": 6e-3, "qwen2.5-large": 4e-3}
# What tokens count: what can be read in the row itself most, answers above all, for they are few.
READ_WEIGHT, ANSWER_WEIGHT, OTHER_WEIGHT = 1.0, 5.0, 0.1
# Share of the steps, the first ones, that teach to look things up in the row.
READING = 0.2
# With soft words: rows of both kinds in a step, tokens of a caption, noise on a mixture (of the
# table's own size).
TEXT_ROWS, SOFT_ROWS, CAPTION_LENGTH, SOFT_NOISE = 8, 16, 64, 0.3
# The prompt of vlv_jax.evaluation.vqa.PromptFormat without an instruction.
QUESTION_FORMAT = "Image: {caption}\nQuestion: {question}\nAnswer: {answer}"


def train_language_model(
    out: pathlib.Path, workdir: pathlib.Path, *, steps: int, soft_steps: int
) -> None:
    """Trains one size; its name is the directory's. First on text, then with soft words, too."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    config = standins.language_model_config(
        out.name, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    execution = Execution(unroll=config.num_hidden_layers)
    model = qwen2.Qwen2ForCausalLM(config=config, execution=execution)

    def text_loss(params, frozen, batch, key):
        del frozen, key
        tokens = batch["tokens"]
        logits = model.apply({"params": params}, tokens[:, :-1])
        losses = token_cross_entropy(logits, tokens[:, 1:])
        weights = batch["weights"]
        right = (jnp.argmax(logits, axis=-1) == tokens[:, 1:]).astype(jnp.float32)
        metrics = {
            "answer_tokens_right": masked_mean(right, weights == ANSWER_WEIGHT),
            "read_tokens_right": masked_mean(right, weights == READ_WEIGHT),
        }
        return jnp.sum(losses * weights) / jnp.sum(weights), metrics

    def soft_loss(params, frozen, batch, key):
        text_value, metrics = text_loss(params, frozen, batch, key)
        table = params["embed_tokens"]["embedding"]
        mixed = jnp.einsum("bqm,bqmd->bqd", batch["soft_weights"], table[batch["soft_words"]])
        scale = SOFT_NOISE * jnp.sqrt(jnp.mean(jnp.square(table)))
        mixed = mixed + scale * jax.random.normal(key, mixed.shape)
        tokens = batch["captions"]
        embeds = model.apply({"params": params}, tokens[:, :-1], method="embed")
        embeds = jnp.concatenate([mixed, embeds], axis=1)
        hidden, _ = model.apply({"params": params}, embeds, method="from_embeddings")
        logits = model.apply({"params": params}, hidden[:, mixed.shape[1] - 1 :], method="logits")
        losses = token_cross_entropy(logits, tokens)
        soft_value = masked_mean(losses, batch["told"])
        right = (jnp.argmax(logits, axis=-1) == tokens).astype(jnp.float32)
        metrics |= {"soft": soft_value, "soft_tokens_right": masked_mean(right, batch["told"])}
        return text_value + soft_value, metrics

    def text_batches(start: int) -> Iterator[dict]:
        return made_ahead(functools.partial(_text_step, tokenizer, steps), start)

    def soft_batches(start: int) -> Iterator[dict]:
        return made_ahead(functools.partial(_soft_step, tokenizer, steps), start)

    fresh = qwen2.FAMILY.init_params(model, jax.random.key(5))
    params = fit(
        out.name, params=with_heads_that_look_back(fresh, config), loss=text_loss,
        make_batches=text_batches, steps=steps, learning_rate=LEARNING_RATES[out.name],
        workdir=workdir, optimizer_name="muon",
    )  # fmt: skip
    params = fit(
        f"{out.name}-soft", params=params, loss=soft_loss, make_batches=soft_batches,
        steps=soft_steps, learning_rate=2e-3, workdir=workdir, optimizer_name="muon",
    )  # fmt: skip
    save_model(out, model, params, dtype="bfloat16")


def _text_step(tokenizer, steps: int, step: int) -> dict[str, np.ndarray]:
    return _batch(tokenizer, step, reading=step < READING * steps)


def _soft_step(tokenizer, steps: int, step: int) -> dict[str, np.ndarray]:
    """After `steps` of text."""
    text = _batch(tokenizer, steps + step, reading=False)
    few = {name: array[:TEXT_ROWS] for name, array in text.items()}
    return few | _soft_batch(tokenizer, step)


def _batch(tokenizer, step: int, *, reading: bool) -> dict[str, np.ndarray]:
    """Texts of one step: half paraphrases, five twelfths questions, a twelfth captions.

    While `reading`, a quarter each of random words said again and again, captions said twice,
    paraphrases and questions: whoever repeats what is written learns to look things up, in some
    hundred steps; questions alone teach it in many thousands.
    """
    rng = np.random.default_rng((6, step))
    tokens = np.full((BATCH, LENGTH), tokenizer.pad_token_id, np.int32)
    weights = np.zeros((BATCH, LENGTH - 1), np.float32)
    for row in range(BATCH):
        scene = sample_scene(0, int(rng.integers(SCENES)), "train")
        if reading and row % 4 == 0:
            ids, weight = _repeated(rng, len(tokenizer))
        else:
            kinds = _TO_READ if reading else _TO_ANSWER
            ids, weight = _tokenize(tokenizer, kinds[row % len(kinds)](scene, rng))
        n = min(len(ids), LENGTH)
        tokens[row, :n] = ids[:n]
        weights[row, : n - 1] = weight[1:n]
    return {"tokens": tokens, "weights": weights}


def _soft_batch(tokenizer, step: int) -> dict[str, np.ndarray]:
    """Prefixes of soft words and captions of the same scenes; half are blurred text."""
    rng = np.random.default_rng((12, step))
    captions = np.full((SOFT_ROWS, CAPTION_LENGTH), tokenizer.pad_token_id, np.int32)
    told = np.zeros(captions.shape, bool)
    words, weights = [], []
    for row in range(SOFT_ROWS):
        scene = sample_scene(0, int(rng.integers(SCENES)), "train")
        if row % 2:
            mixtures = bags(scene, tokenizer, rng)
        else:
            mixtures = blurred(tokenizer(_caption(scene, rng))["input_ids"], rng)
        words.append(mixtures[0])
        weights.append(mixtures[1])
        ids = [*tokenizer(_caption(scene, rng))["input_ids"], tokenizer.eos_token_id]
        n = min(len(ids), CAPTION_LENGTH)
        captions[row, :n], told[row, :n] = ids[:n], True
    return {
        "captions": captions, "told": told,
        "soft_words": np.stack(words), "soft_weights": np.stack(weights),
    }  # fmt: skip


def _repeated(rng: np.random.Generator, vocab_size: int) -> tuple[list[int], list[float]]:
    """Random words, again and again until the row is full; the first time can't be guessed."""
    period = int(rng.integers(5, LENGTH // 2))
    words = rng.integers(vocab_size, size=period).tolist()
    weight = [0.0] * period + [READ_WEIGHT] * (LENGTH - period)
    return (words * (LENGTH // period + 1))[:LENGTH], weight


def _tokenize(tokenizer, pieces: Pieces) -> tuple[list[int], list[float]]:
    """Ids of the joined text and the end token, and each one's weight: its first letter's."""
    text = "".join(piece for piece, _ in pieces)
    of_letter = [weight for piece, weight in pieces for _ in piece]
    encoded = tokenizer(text, return_offsets_mapping=True)
    weights = [of_letter[start] for start, _ in encoded["offset_mapping"]]
    return [*encoded["input_ids"], tokenizer.eos_token_id], [*weights, of_letter[-1]]


def _caption(scene: Scene, rng: np.random.Generator) -> str:
    style = STYLES[int(rng.integers(len(STYLES)))]
    return describe(scene, int(rng.integers(1000)), style)


def _said_once(scene: Scene, rng: np.random.Generator) -> Pieces:
    return [(_caption(scene, rng), READ_WEIGHT)]


def _said_twice(scene: Scene, rng: np.random.Generator) -> Pieces:
    caption = _caption(scene, rng)
    return [(f"Image: {caption}\nAgain:", OTHER_WEIGHT), (f" {caption}", READ_WEIGHT)]


def _paraphrase(scene: Scene, rng: np.random.Generator) -> Pieces:
    first, second = _caption(scene, rng), _caption(scene, rng)
    return [(f"Image: {first}\nIn other words:", OTHER_WEIGHT), (f" {second}", READ_WEIGHT)]


def _dialogue(scene: Scene, rng: np.random.Generator) -> Pieces:
    """A caption, then questions and answers until the row is full: (text, weight) pieces."""
    pairs = question_texts(scene, int(rng.integers(1000)))
    pieces = [(f"Image: {_caption(scene, rng)}", OTHER_WEIGHT)]
    for i in rng.permutation(len(pairs)):
        question, answer = pairs[i]
        pieces += [(f"\nQuestion: {question}\nAnswer:", OTHER_WEIGHT)]
        pieces += [(f" {answer}", ANSWER_WEIGHT)]
    return pieces


# What the rows of a batch are, in turn.
_TO_READ = (_dialogue, _said_twice, _paraphrase)
_TO_ANSWER = (*(_dialogue, _paraphrase) * 5, _paraphrase, _said_once)
