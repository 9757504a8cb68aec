"""Configuration of Qwen2 and Qwen2.5."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from core_jax.models.hf_config import pick_fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Qwen2Config:
    """Field names are transformers' (Qwen2Config).

    Attributes:
      vocab_size: V, the rows of the table (released tables are padded past the tokenizer's size).
      hidden_size: D.
      intermediate_size: F.
      num_hidden_layers: transformer layers.
      num_attention_heads: N.
      num_key_value_heads: K, a divisor of N; N if None.
      head_dim: H; D / N if None.
      rms_norm_eps: epsilon of every normalisation.
      rope_theta: base of the rotary angles.
      tie_word_embeddings: the output head is the token table.
      max_position_embeddings, initializer_range, bos_token_id, eos_token_id, pad_token_id: carried
        along for other readers.
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        if self.num_attention_heads % self.kv_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} does not divide into "
                f"{self.num_attention_heads} heads; set head_dim"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim {self.head_size} is odd; rotary embeddings need pairs")

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """H."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Qwen2Config":
        """From config.json of transformers 4 (`rope_theta`) or 5 (`rope_parameters`).

        Raises:
          ValueError: the checkpoint uses what this port lacks: scaled rotary embeddings, sliding
            windows, another activation.
        """
        problems = []
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or rope
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind != "default":
            problems.append(f"rotary embeddings of type {kind!r} (only 'default' is)")
        sliding = "sliding_attention" in (config.get("layer_types") or ())
        if config.get("use_sliding_window") or sliding:
            problems.append("sliding-window attention (use_sliding_window)")
        if config.get("hidden_act", "silu") != "silu":
            problems.append(f"hidden_act {config['hidden_act']!r} (only 'silu' is)")
        if problems:
            raise ValueError(f"Qwen2: not supported here: {'; '.join(problems)}")
        fields = pick_fields(cls, config)
        if "rope_theta" in rope:
            fields["rope_theta"] = rope["rope_theta"]
        return cls(**fields)

    def to_hf(self) -> dict[str, Any]:
        """As config.json, for transformers 4 and 5."""
        fields = dataclasses.asdict(self)
        if fields["head_dim"] is None:
            del fields["head_dim"]
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            **fields,
            "num_key_value_heads": self.kv_heads,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }

    @classmethod
    def qwen2p5_0p5b(cls) -> "Qwen2Config":
        """Qwen2.5-0.5B."""
        return cls(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, tie_word_embeddings=True, **_RELEASED,
        )  # fmt: skip

    @classmethod
    def qwen2p5_1p5b(cls) -> "Qwen2Config":
        """Qwen2.5-1.5B."""
        return cls(
            hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
            num_key_value_heads=2, tie_word_embeddings=True,
            **_RELEASED | {"max_position_embeddings": 131072},
        )  # fmt: skip

    @classmethod
    def qwen2p5_3b(cls) -> "Qwen2Config":
        """Qwen2.5-3B, the captioner of VLV (arXiv 2507.07104)."""
        return cls(
            hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
            num_attention_heads=16, num_key_value_heads=2, tie_word_embeddings=True, **_RELEASED,
        )  # fmt: skip

    @classmethod
    def qwen2p5_7b(cls) -> "Qwen2Config":
        """Qwen2.5-7B: an untied head and a table padded to 152064 rows."""
        released: dict[str, Any] = {
            **_RELEASED, "vocab_size": 152064, "max_position_embeddings": 131072,
        }  # fmt: skip
        return cls(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, **released,
        )  # fmt: skip


_RELEASED: dict[str, Any] = {
    "vocab_size": 151936,
    "rope_theta": 1e6,
    "max_position_embeddings": 32768,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
}
