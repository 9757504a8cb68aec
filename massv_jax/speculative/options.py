"""What a decoding program is compiled for."""

import dataclasses
from typing import Literal, get_args

from core_jax.decode.sampling import SamplingRule

MAX_GAMMA = 16

AcceptMode = Literal["rejection", "coupled", "on_policy"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeOptions:
    """Static values: another one is another program.

    Attributes:
      max_new_tokens: N, the longest answer.
      max_gamma: the most drafts of a window; 0 is plain decoding.
      vocab_size: V of the target.
      eos_ids: end tokens.
      pad_id: what fills rows after their end.
      rule: temperature, then top-k, then top-p, in transformers' order. The drafter's
        distributions are shaped by the same rule.
      accept: "rejection" is the standard rule (arXiv 2211.17192): sampled output has exactly the
        target's distribution. With "coupled" the drafter draws with the noise that the target
        will draw with (arXiv 2408.07978): sampled output is that of plain decoding, token for
        token, and somewhat fewer drafts are accepted. Greedy rows are the same in both.
        "on_policy" keeps every draft and then takes a token of the target's own: what comes out
        is NOT the target's, but lies where the drafter will be asked to draft (the sequences of
        arXiv 2306.13649 and 2310.08461, to learn from); only `distill.on_policy` uses it.
      min_confidence: drafting stops after the first draft in whose place the drafter's largest
        probability was below this; the draft itself is still offered. 0 never stops.
    """

    max_new_tokens: int
    max_gamma: int
    vocab_size: int
    eos_ids: tuple[int, ...] = ()
    pad_id: int = 0
    rule: SamplingRule = SamplingRule()
    accept: AcceptMode = "rejection"
    min_confidence: float = 0.0

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.max_gamma <= MAX_GAMMA:
            raise ValueError(f"gamma is {self.max_gamma}; it must be from 1 to {MAX_GAMMA}")
        if self.accept not in get_args(AcceptMode):
            raise ValueError(f"accept is {self.accept!r}; it must be one of {get_args(AcceptMode)}")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence {self.min_confidence} is no probability")
        if self.rule.repetition_penalty != 1:
            raise ValueError(
                f"repetition_penalty {self.rule.repetition_penalty} does not go with speculative "
                "decoding; use 1.0, or core_jax.decode.generate"
            )

    @property
    def samples(self) -> bool:
        """Whether tokens are drawn at random."""
        return not self.rule.greedy

    @property
    def needs_probs(self) -> bool:
        """Whether drafts are judged by the drafter's distributions."""
        return self.samples and self.accept == "rejection"
