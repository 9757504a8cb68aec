"""What rounds did, counted on the device and read on the host."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from massv_jax.speculative.accept import Verdict, Window


@flax.struct.dataclass
class RoundCounts:
    """Sums over the rounds of each row; a round begins while the row has not ended.

    Attributes:
      rounds: int32 [B], target passes after the prompt's.
      emitted: int32 [B], tokens of those rounds.
      judged: int32 [B, gamma], drafts at each place of a window all of whose predecessors were
        accepted, so that they were compared with the target.
      accepted: int32 [B, gamma], those of them that were accepted and emitted.
    """

    rounds: jax.Array
    emitted: jax.Array
    judged: jax.Array
    accepted: jax.Array

    @classmethod
    def zeros(cls, batch: int, gamma: int) -> "RoundCounts":
        """Nothing yet."""
        row, places = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, gamma), jnp.int32)
        return cls(row, row, places, places)

    def add(self, verdict: Verdict, window: Window, valid: Int[Array, " B"]) -> "RoundCounts":
        """With one more round, of at most as many drafts as there are places.

        Args:
          verdict: the target's.
          window: what was emitted.
          valid: drafts that were offered.
        """
        place = jnp.arange(self.judged.shape[1], dtype=jnp.int32)[None]
        running = window.count > 0
        # Behind an end token nothing counts, and after the last possible token there is no bonus.
        reached = (place <= verdict.accepted[:, None]) & (place < window.count[:, None])
        judged = reached & (place < valid[:, None])
        accepted = judged & (place < verdict.accepted[:, None])
        return RoundCounts(
            rounds=self.rounds + running,
            emitted=self.emitted + window.count,
            judged=self.judged + judged,
            accepted=self.accepted + accepted,
        )


@dataclasses.dataclass(frozen=True)
class Statistics:
    """What speculation did, for each row; `total` sums up.

    Attributes:
      rounds, emitted, judged, accepted: see `RoundCounts`; numpy.
    """

    rounds: np.ndarray
    emitted: np.ndarray
    judged: np.ndarray
    accepted: np.ndarray

    @classmethod
    def of(cls, counts: RoundCounts, rows: int) -> "Statistics":
        """Of the first so many rows."""
        host = jax.device_get(counts)
        return cls(*(np.asarray(x)[:rows] for x in (
            host.rounds, host.emitted, host.judged, host.accepted)))  # fmt: skip

    @classmethod
    def concatenate(cls, parts: "list[Statistics]") -> "Statistics":
        """Rows of several batches, one after the other."""
        names = [f.name for f in dataclasses.fields(cls)]
        return cls(*(np.concatenate([getattr(p, n) for p in parts]) for n in names))

    @property
    def total(self) -> "Statistics":
        """One row with the sums."""
        return Statistics(*(
            np.sum(x, axis=0, keepdims=True)
            for x in (self.rounds, self.emitted, self.judged, self.accepted)
        ))  # fmt: skip

    @property
    def accepted_length(self) -> np.ndarray:
        """Drafts accepted in a round, without the target's own token: [rows]."""
        return _ratio(self.accepted.sum(axis=1), self.rounds)

    @property
    def emitted_length(self) -> np.ndarray:
        """Tokens of a round, the target's own included (tau): [rows]."""
        return _ratio(self.emitted, self.rounds)

    @property
    def acceptance(self) -> np.ndarray:
        """Share of the drafts at each place that were accepted, once compared: [rows, gamma]."""
        return _ratio(self.accepted, self.judged)

    def summary(self) -> dict[str, object]:
        """Sums and means of all rows, for JSON; None where nothing was counted."""
        total = self.total

        def number(x: float) -> float | None:
            return None if np.isnan(x) else round(float(x), 6)

        return {
            "rows": len(self.rounds),
            "rounds": int(total.rounds[0]),
            "tokens": int(total.emitted[0]),
            "accepted_length": number(total.accepted_length[0]),
            "emitted_length": number(total.emitted_length[0]),
            "acceptance": [number(x) for x in total.acceptance[0]],
        }


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """NaN where there is nothing to divide by."""
    return np.where(under > 0, over / np.maximum(under, 1), np.nan)
