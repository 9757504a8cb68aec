"""`SpeculativeDecoder`: questions and images in, texts and counts out."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from core_jax.data.sources import clean_text
from core_jax.decode.sampling import SamplingRule
from core_jax.decode.target import Prompt, Target
from core_jax.sharding import mesh_of
from massv_jax.speculative.accept import StopReason
from massv_jax.speculative.adaptive import GammaChoice, GammaPolicy, Replay, policy_of
from massv_jax.speculative.counts import Statistics
from massv_jax.speculative.drafters import as_drafter
from massv_jax.speculative.loop import LoopState, Params, Program, Request, advance, start
from massv_jax.speculative.options import MAX_GAMMA, AcceptMode, DecodeOptions

# Prompts are padded to one of these: each is a program to compile.
PROMPT_LENGTHS = (
    16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192,
    12288, 16384, 24576, 32768,
)  # fmt: skip
ALL_ROUNDS = 2**31 - 1

Images = Sequence[Any] | None


class RequestError(ValueError):
    """What is asked cannot be done; found before anything is compiled."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """What was generated, a row a prompt.

    Attributes:
      texts: without special tokens.
      tokens: int32 [B, N]; an end token is kept, what follows is padding.
      lengths: int32 [B], tokens of each row, the end token included.
      finished: bool [B], whether a row ended by itself, not by running out of room.
      statistics: see `Statistics`.
      choices: the windows that were used, for each batch a list.
      max_gamma: the longest window that there was room for.
    """

    texts: tuple[str, ...]
    tokens: np.ndarray
    lengths: np.ndarray
    finished: np.ndarray
    statistics: Statistics
    choices: tuple[tuple[GammaChoice, ...], ...]
    max_gamma: int

    def replay(self) -> Replay:
        """As `gamma` of another run it does the same again."""
        return Replay(self.choices, self.max_gamma)


@dataclasses.dataclass
class Session:
    """A batch that is being answered.

    Attributes:
      program, params: what runs.
      request: the batch itself.
      state: between two calls.
      rows: of the batch; later ones only fill it.
    """

    program: Program
    params: Params
    request: Request
    state: LoopState
    rows: int

    def advance(self, gamma: int, rounds: int = ALL_ROUNDS) -> None:
        """Runs rounds until all rows have ended, or so many of them.

        Raises:
          RequestError: the caches have no room for such a window.
        """
        longest = self.program.options.max_gamma
        if not min(1, longest) <= gamma <= longest:
            raise RequestError(
                f"a window of {gamma} drafts in a session for at most {longest}; begin it with a "
                "larger max_gamma"
            )
        with mesh_of(self.params):
            self.state = advance(
                self.program, self.params, self.state, jnp.int32(min(rounds, ALL_ROUNDS)),
                gamma=gamma,
            )  # fmt: skip

    @property
    def done(self) -> bool:
        """Whether every row has ended; waits for the device."""
        return not (np.asarray(self.state.reason) == StopReason.RUNNING).any()

    def tokens(self) -> tuple[np.ndarray, np.ndarray]:
        """The answers so far and their lengths."""
        tokens, lengths = jax.device_get((self.state.tokens, self.state.lengths))
        return np.asarray(tokens)[: self.rows], np.asarray(lengths)[: self.rows]

    def statistics(self) -> Statistics:
        """The counts so far."""
        return Statistics.of(self.state.counts, self.rows)


@dataclasses.dataclass(frozen=True)
class SpeculativeDecoder:
    """A target and what drafts for it.

    Greedy output is plain decoding's, token for token, as far as the target computes the same
    logits for a window as for a token (it does in float32; in bfloat16 near-ties may flip).
    Sampled output has the target's distribution (accept="rejection") or is plain decoding's
    (accept="coupled").

    Attributes:
      target: from `core_jax.decode.target.load_target`.
      drafter: see massv_jax.speculative.drafters; None decodes plainly, in the same loop.
      accept: see `DecodeOptions`.
      min_confidence: see `DecodeOptions`.
      batch_size: rows of a compiled program, the last batch is filled up; None: all at once.
      prompt_lengths: what prompts are padded to, as far as the model has positions; a prompt
        longer than all of them is an error.
    """

    target: Target
    drafter: Any = None
    accept: AcceptMode = "rejection"
    min_confidence: float = 0.0
    batch_size: int | None = None
    prompt_lengths: Sequence[int] = PROMPT_LENGTHS

    def __post_init__(self):
        object.__setattr__(self, "drafter", as_drafter(self.drafter, self.target))
        if self.batch_size is not None and self.batch_size < 1:
            raise RequestError(f"batch_size is {self.batch_size}; it must be at least 1")

    def generate(
        self,
        images: Images,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        gamma: int | GammaPolicy | Sequence[Sequence[GammaChoice]] = 5,
        seed: int = 0,
        row_seeds: Sequence[int] | None = None,
        chat: bool = True,
    ) -> Answers:
        """Answers prompts.

        Args:
          images: for each prompt an image, a list of images, or None; None if nobody has one.
            Pillow images, uint8 arrays [H, W, 3], paths or encoded bytes.
          prompts: questions, or conversations as lists of messages.
          max_new_tokens: longest answer, its end included.
          temperature: 0 takes the most likely token.
          top_k: keeps the k most likely tokens; 0 keeps all.
          top_p: keeps the most likely tokens with this probability together; 1 keeps all.
          gamma: drafts of a window, 1 to 16; a policy that chooses them
            (massv_jax.speculative.adaptive); `replay()` of earlier `Answers` to repeat them, or
            their `choices` alone. Not used without a drafter.
          seed: of sampling.
          row_seeds: a number for each prompt, its index by default. With a fixed gamma an answer
            depends on seed, row seed and prompt alone.
          chat: whether prompts go through the chat template; False takes texts as they are, with
            their special tokens.

        Raises:
          RequestError: an argument is out of range, or does not fit another.
          ValueError: images and their places in a prompt do not match, or a prompt is too long.
        """
        rows = self._rows(images, prompts)
        rule = _rule(temperature, top_k, top_p)
        policy = policy_of(gamma if self.drafter is not None else 0)
        options = self._options(rule, max_new_tokens, policy.max_gamma)
        seeds = _row_seeds(row_seeds, len(rows))
        texts = self._texts(rows, chat)
        size = len(rows) if self.batch_size is None else self.batch_size
        parts, choices = [], []
        for first in range(0, len(rows), size):
            batch = slice(first, min(first + size, len(rows)))
            session = self._start(
                options, texts[batch], [images for images, _ in rows[batch]], seeds[batch], seed,
                size,
            )  # fmt: skip
            choices.append(policy.run(session, batch=len(parts)))
            parts.append((session.tokens(), np.asarray(session.state.reason), session.statistics()))
        return self._answers(parts, choices, policy.max_gamma)

    def begin(
        self,
        images: Images,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        max_gamma: int = 5,
        seed: int = 0,
        row_seeds: Sequence[int] | None = None,
        chat: bool = True,
    ) -> Session:
        """One batch whose rounds are run by the caller: `session.advance(gamma, rounds)`.

        Arguments are those of `generate`; no window may be longer than `max_gamma`.
        """
        rows = self._rows(images, prompts)
        rule = _rule(temperature, top_k, top_p)
        options = self._options(rule, max_new_tokens, max_gamma if self.drafter is not None else 0)
        seeds = _row_seeds(row_seeds, len(rows))
        size = len(rows) if self.batch_size is None else max(self.batch_size, len(rows))
        texts = self._texts(rows, chat)
        return self._start(options, texts, [images for images, _ in rows], seeds, seed, size)

    def check(self, images: Images, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> None:
        """Raises what `generate` would raise before it runs anything; compiles nothing.

        Args:
          images: see `generate`.
          prompts: see `generate`.
          options: keyword arguments of `generate`.
        """
        rows = self._rows(images, prompts)
        texts = self._texts(rows, options.get("chat", True))
        lengths = self.allowed_lengths(options.get("max_new_tokens", 128))
        self.target.frontend.prepare(texts, [images for images, _ in rows], lengths=lengths)

    def stream(
        self,
        images: Images,
        prompts: Sequence[Prompt],
        *,
        gamma: int = 5,
        rounds_per_call: int = 1,
        **options: Any,
    ) -> Iterator[tuple[str, ...]]:
        """The texts so far after each call of `rounds_per_call` rounds; see `begin`."""
        session = self.begin(images, prompts, max_gamma=gamma, **options)
        gamma = session.program.options.max_gamma
        yield self._decode(*session.tokens())
        while not session.done:
            session.advance(gamma, rounds_per_call)
            yield self._decode(*session.tokens())

    def _rows(self, images: Images, prompts: Sequence[Prompt]) -> list[tuple[list[Any], Prompt]]:
        if isinstance(prompts, str) or not len(prompts):
            raise RequestError("prompts must be a list of at least one prompt")
        given = [None] * len(prompts) if images is None else list(images)
        if len(given) != len(prompts):
            raise RequestError(f"{len(prompts)} prompts, but images for {len(given)}")
        lists = [
            [] if row is None else list(row) if isinstance(row, list | tuple) else [row]
            for row in given
        ]
        return list(zip(lists, prompts, strict=True))

    def _texts(self, rows: list[tuple[list[Any], Prompt]], chat: bool) -> list[str]:
        if chat:
            texts = [self._render(prompt, len(images)) for images, prompt in rows]
        elif wrong := [i for i, (_, prompt) in enumerate(rows) if not isinstance(prompt, str)]:
            raise RequestError(f"prompts {wrong} are messages; with chat=False give texts")
        else:
            texts = [str(prompt) for _, prompt in rows]
        if broken := [i for i, text in enumerate(texts) if clean_text(text) != text]:
            raise RequestError(f"prompts {broken} hold halves of characters, which are no Unicode")
        return texts

    def _render(self, prompt: Prompt, num_images: int) -> str:
        from jinja2 import TemplateError

        try:
            return self.target.frontend.render(prompt, num_images)
        except TemplateError as error:  # such as Gemma's, where roles do not alternate
            raise RequestError(f"the chat template refuses the messages: {error}") from error

    def _options(self, rule: SamplingRule, max_new_tokens: int, max_gamma: int) -> DecodeOptions:
        target = self.target
        if self.drafter is not None and not 1 <= max_gamma <= MAX_GAMMA:
            raise RequestError(f"gamma is {max_gamma}; it must be from 1 to {MAX_GAMMA}")
        try:
            return DecodeOptions(
                max_new_tokens=max_new_tokens, max_gamma=max_gamma, vocab_size=target.vocab_size,
                eos_ids=target.eos_ids, pad_id=target.pad_id, rule=rule, accept=self.accept,
                min_confidence=self.min_confidence,
            )  # fmt: skip
        except ValueError as error:
            raise RequestError(str(error)) from error

    def allowed_lengths(self, max_new_tokens: int) -> list[int]:
        """What prompts may be padded to, so that there is room for an answer.

        Raises:
          RequestError: there is no room for a prompt.
        """
        longest = self.target.max_positions - max_new_tokens
        if longest < 1:
            raise RequestError(
                f"{max_new_tokens} new tokens leave no room for a prompt: the model has "
                f"{self.target.max_positions} positions"
            )
        # A length that does not fit is cut: no prompt that fits is refused for its padding.
        return sorted({min(n, longest) for n in self.prompt_lengths})

    def _start(
        self,
        options: DecodeOptions,
        texts: Sequence[str],
        images: Sequence[list[Any]],
        row_seeds: np.ndarray,
        seed: int,
        size: int,
    ) -> Session:
        target, drafter = self.target, self.drafter
        fill = size - len(texts)  # rows that repeat the last prompt and get no token
        texts, images = [*texts, *[texts[-1]] * fill], [*images, *[images[-1]] * fill]
        lengths = self.allowed_lengths(options.max_new_tokens)
        inputs = target.frontend.prepare(texts, images, lengths=lengths)
        draft_prompt = None if drafter is None else drafter.prepare(inputs, target, lengths)
        limits = np.full(size, options.max_new_tokens, np.int32)
        limits[len(row_seeds) :] = 0
        request = Request(
            prompt=inputs.prompt,
            images=inputs.images,
            draft_prompt=draft_prompt,
            key=jax.random.key(seed) if options.samples else None,
            row_seeds=jnp.asarray(np.pad(row_seeds, (0, fill))),
            limits=jnp.asarray(limits),
        )
        program = Program(target.decoder, None if drafter is None else drafter.proposer, options)
        params = Params(target.params, None if drafter is None else drafter.params)
        with mesh_of(params):
            state = start(program, params, request)
        return Session(program, params, request, state, len(row_seeds))

    def _decode(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[str, ...]:
        return tuple(
            self.target.tokenizer.decode(row[:n].tolist(), skip_special_tokens=True).strip()
            for row, n in zip(tokens, lengths, strict=True)
        )

    def _answers(
        self, parts: list[Any], choices: list[tuple[GammaChoice, ...]], max_gamma: int
    ) -> Answers:
        tokens = np.concatenate([tokens for (tokens, _), _, _ in parts])
        lengths = np.concatenate([lengths for (_, lengths), _, _ in parts])
        reasons = np.concatenate([reason[: len(t)] for (t, _), reason, _ in parts])
        return Answers(
            texts=self._decode(tokens, lengths),
            tokens=tokens,
            lengths=lengths,
            finished=reasons == StopReason.END_TOKEN,
            statistics=Statistics.concatenate([statistics for _, _, statistics in parts]),
            choices=tuple(choices),
            max_gamma=max_gamma,
        )


def _rule(temperature: float, top_k: int, top_p: float) -> SamplingRule:
    try:
        return SamplingRule(temperature=temperature, top_k=top_k, top_p=top_p)
    except ValueError as error:
        raise RequestError(str(error)) from error


def _row_seeds(given: Sequence[int] | None, rows: int) -> np.ndarray:
    seeds = np.arange(rows) if given is None else np.asarray(given)
    if seeds.shape != (rows,):
        raise RequestError(f"{rows} prompts, but row_seeds of shape {seeds.shape}")
    return seeds.astype(np.uint32).astype(np.int32)  # the lower 32 bits
