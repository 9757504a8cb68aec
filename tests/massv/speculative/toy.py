"""A network of one layer that compiles in no time, with a cache that can be wrong in every way.

Features of the tokens so far, fading with distance, plus those of an image, give the logits: so
each of them depends on every token in the cache, its place, and the image.
"""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from core_jax.decode.sampling import SamplingRule
from massv_jax.speculative.drafting import NetworkProposer
from massv_jax.speculative.loop import Params, Program, Request, advance, start
from massv_jax.speculative.options import DecodeOptions

WIDTH, PIXELS = 8, 6


@flax.struct.dataclass
class ToyPrompt:
    ids: jax.Array
    valid: jax.Array
    has_image: jax.Array


@flax.struct.dataclass
class ToyState:
    tokens: jax.Array
    end: jax.Array
    image: jax.Array


@dataclasses.dataclass(frozen=True)
class ToyDecoder:
    """A `WindowDecoder`."""

    def encode_images(self, params, images):
        return images @ params["tower"]

    def begin(self, params, prompt, vision, *, max_new_tokens, window):
        B, P = prompt.ids.shape
        room = max_new_tokens + (window + 1 if window else 0)
        place = jnp.where(prompt.valid, jnp.cumsum(prompt.valid, axis=1) - 1, P + room)
        tokens = jnp.zeros((B, P + room), jnp.int32)
        tokens = tokens.at[jnp.arange(B)[:, None], place].set(prompt.ids, mode="drop")
        image = jnp.zeros((B, WIDTH))
        if vision is not None:
            image = jnp.where(prompt.has_image[:, None], vision @ params["projector"], 0.0)
        state = ToyState(tokens, jnp.sum(prompt.valid, axis=1, dtype=jnp.int32), image)
        return _logits(params, state, state.end[:, None] - 1)[:, 0], state

    def extend(self, params, state, tokens):
        at = state.end[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        rows = jnp.arange(tokens.shape[0])[:, None]
        state = state.replace(
            tokens=state.tokens.at[rows, at].set(tokens, mode="drop"),
            end=state.end + tokens.shape[1],
        )
        return _logits(params, state, at), state

    def ends(self, state):
        return state.end

    def rewind(self, state, end):
        return state.replace(end=end)


def fade(distance, np):
    """How much a token counts at a distance; a plain decay would repeat one word."""
    return 0.95**distance * np.cos(1.7 * distance)


def _logits(params, state, at):
    slots = jnp.arange(state.tokens.shape[1], dtype=jnp.int32)
    distance = at[:, :, None] - slots[None, None]
    weight = jnp.where(distance >= 0, fade(jnp.maximum(distance, 0), jnp), 0.0)
    h = jnp.einsum("bts,bsd->btd", weight, params["table"][state.tokens])
    return jnp.tanh(h + state.image[:, None]) @ params["head"]


@functools.cache
def toy_params(vocab, seed=0, apart=0.0, scale=2.0):
    """Random parameters; `apart` moves them away from those of the same seed."""
    rng, other = np.random.default_rng(seed), np.random.default_rng(seed + 100)
    shapes = {
        "table": (vocab, WIDTH), "head": (WIDTH, vocab), "tower": (PIXELS, WIDTH),
        "projector": (WIDTH, WIDTH),
    }  # fmt: skip
    scales = {"table": 1.5, "head": scale, "tower": 0.3, "projector": 0.3}
    return {
        k: jnp.asarray(scales[k] * rng.normal(size=s) + apart * other.normal(size=s) * (
            scales[k] if k in ("tower", "projector") else 1.0), jnp.float32)
        for k, s in shapes.items()
    }  # fmt: skip


def reference(params, ids, valid, image, tokens):
    """Logits [N, V] of each token of an answer, by numpy, from the whole text each time."""
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    text = [*np.asarray(ids)[np.asarray(valid)].tolist()]
    seen = 0 if image is None else image @ p["tower"] @ p["projector"]
    out = []
    for token in tokens:
        weight = fade(np.arange(len(text))[::-1], np)
        out.append(np.tanh(weight @ p["table"][text] + seen) @ p["head"])
        text.append(int(token))
    return np.array(out)


def rows(batch, length=7, vocab=23, seed=0):
    """(ids, valid, has_image, images) of ragged rows; every third has no image."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, vocab, (batch, length)).astype(np.int32)
    pads = rng.integers(0, length - 1, batch)
    valid = np.arange(length)[None] >= pads[:, None]
    has_image = np.arange(batch) % 3 != 2
    images = rng.normal(size=(batch, PIXELS)).astype(np.float32)
    return ids, valid, has_image, images


def request(ids, valid, has_image, images, *, seeds=None, limits=None, new=16, run=0, draft=None):
    """What `start` takes."""
    B = len(ids)
    prompt = ToyPrompt(*map(jnp.asarray, (ids, valid, has_image)))
    return Request(
        prompt=prompt,
        images=None if images is None else jnp.asarray(images),
        draft_prompt=prompt if draft is None else draft,
        key=jax.random.key(run),
        row_seeds=jnp.arange(B) if seeds is None else jnp.asarray(seeds, jnp.int32),
        limits=jnp.full((B,), new, jnp.int32) if limits is None else jnp.asarray(limits, jnp.int32),
    )


def options(gamma, *, vocab=23, new=16, temperature=0.0, top_k=0, top_p=1.0, **more):
    """`DecodeOptions` with a rule."""
    rule = SamplingRule(temperature=temperature, top_k=top_k, top_p=top_p)
    return DecodeOptions(
        max_new_tokens=new, max_gamma=gamma, vocab_size=vocab, rule=rule, pad_id=-1, **more
    )


def decode(opts, asked, target, drafter=None, *, proposer=None, gamma=None, rounds=1000):
    """The whole loop; the final state on the host."""
    if proposer is None and opts.max_gamma:
        proposer = NetworkProposer(ToyDecoder(), drafter["head"].shape[1])
    program = Program(ToyDecoder(), proposer, opts)
    params = Params(target, drafter)
    state = start(program, params, asked)
    gamma = opts.max_gamma if gamma is None else gamma
    return advance(program, params, state, jnp.int32(rounds), gamma=gamma)
