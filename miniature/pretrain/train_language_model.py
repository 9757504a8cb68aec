"""The Qwen2.5 stand-ins: language models of the miniature world's text, pictures unseen.

What a language model of the hub can do before it sees a picture, these learn too: to write a
caption as each of the three authors would, to say one author's caption in another's words, and to
answer questions about a caption. Nothing in it knows of embeddings that stand for a picture.
"""

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
from miniature.pretrain.scenes import question_texts
from miniature.world import STYLES, Scene, describe, sample_scene

BATCH = 24
LENGTH = 160  # a caption and some ten questions
Pieces = list[tuple[str, float]]  # parts of a text and what their tokens count
SCENES = 20_000
# What tokens count: what can be read in the row itself most, answers above all, for they are few.
READ_WEIGHT, ANSWER_WEIGHT, OTHER_WEIGHT = 1.0, 5.0, 0.1
# Share of the steps, the first ones, that teach to look things up in the row.
READING = 0.2
# The prompt of vlv_jax.evaluation.vqa.PromptFormat without an instruction.
QUESTION_FORMAT = "Image: {caption}\nQuestion: {question}\nAnswer: {answer}"


def train_language_model(out: pathlib.Path, workdir: pathlib.Path, *, steps: int) -> None:
    """Trains one size; its name is the directory's."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    config = standins.language_model_config(
        out.name, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    execution = Execution(unroll=config.num_hidden_layers)
    model = qwen2.Qwen2ForCausalLM(config=config, execution=execution)

    def loss(params, frozen, batch, key):
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

    def batches(start: int) -> Iterator[dict]:
        step = start
        while True:
            yield _batch(tokenizer, step, reading=step < READING * steps)
            step += 1

    fresh = qwen2.FAMILY.init_params(model, jax.random.key(5))
    params = fit(
        out.name, params=with_heads_that_look_back(fresh, config), loss=loss,
        make_batches=batches, steps=steps, learning_rate=2e-3, workdir=workdir,
    )  # fmt: skip
    save_model(out, model, params, dtype="bfloat16")


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
