"""Configuration of Gemma 3's language model."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from core_jax.models.hf_config import pick_fields

LOCAL, GLOBAL = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma3TextConfig:
    """Field names and defaults are transformers' (Gemma3TextConfig), those of version 4 for RoPE.

    Attributes:
      vocab_size: V, the rows of the table.
      hidden_size: D.
      intermediate_size: F.
      num_hidden_layers: transformer layers.
      num_attention_heads: N.
      num_key_value_heads: K, a divisor of N.
      head_dim: H.
      rms_norm_eps: epsilon of every normalisation.
      query_pre_attn_scalar: attention logits are divided by its square root.
      sliding_window: how many tokens a query of a local layer sees, itself included.
      sliding_window_pattern: every layer of this number is global, the others are local; a rest
        at the end is local.
      rope_theta: base of the rotary angles in global layers.
      rope_local_base_freq: base in local layers.
      rope_scaling_factor: positions are divided by it in global layers ("linear" scaling).
      final_logit_softcapping: logits are squashed into +-this by a tanh; None in all released
        models.
      tie_word_embeddings: the output head is the token table.
      max_position_embeddings, initializer_range, bos_token_id, eos_token_id, pad_token_id: carried
        along for other readers.
    """

    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    rms_norm_eps: float = 1e-6
    query_pre_attn_scalar: int = 256
    sliding_window: int = 4096
    sliding_window_pattern: int = 6
    rope_theta: float = 1e6
    rope_local_base_freq: float = 1e4
    rope_scaling_factor: float = 1.0
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = 0

    def __post_init__(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary embeddings need pairs")
        for name in ("sliding_window", "sliding_window_pattern"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def patterns(self) -> int:
        """Whole patterns of local layers and a global one."""
        return self.num_hidden_layers // self.sliding_window_pattern

    @property
    def remainder(self) -> int:
        """Local layers after the last whole pattern."""
        return self.num_hidden_layers % self.sliding_window_pattern

    @property
    def local_layers(self) -> int:
        """Layers that see the window only."""
        return self.num_hidden_layers - self.patterns

    @property
    def layer_types(self) -> tuple[str, ...]:
        """As transformers lists them."""
        every = self.sliding_window_pattern
        return tuple(
            LOCAL if (i + 1) % every else GLOBAL for i in range(self.num_hidden_layers)
        )

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Gemma3TextConfig":
        """From config.json (or `text_config`) of transformers 4 or 5.

        Raises:
          ValueError: the checkpoint uses what this port lacks; the message lists all of it.
        """
        problems = []
        must_be = (
            ("hidden_activation", "gelu_pytorch_tanh"), ("attention_bias", False),
            ("use_bidirectional_attention", False),
            # transformers reads it and does not apply it, so nothing could be compared with.
            ("attn_logit_softcapping", None),
        )  # fmt: skip
        for name, value in must_be:
            got = config.get(name)
            if got is not None and got != value:
                problems.append(f"{name} {got!r} (only {value!r} is)")
        fields = pick_fields(cls, config) | _rope_fields(config, problems)
        every = config.get("sliding_window_pattern", config.get("_sliding_window_pattern"))
        types = config.get("layer_types")
        if types is not None:
            every = types.index(GLOBAL) + 1 if GLOBAL in types else len(types) + 1
        if every is not None:
            fields["sliding_window_pattern"] = every
        for name in ("rope_theta", "rope_local_base_freq", "rope_scaling_factor"):
            if name in fields:
                fields[name] = float(fields[name])  # the hub writes 1000000 as well
        if problems:
            raise ValueError(f"Gemma 3: not supported here: {'; '.join(problems)}")
        read = cls(**fields)
        if types is not None and tuple(types) != read.layer_types:
            raise ValueError(
                f"Gemma 3: layer_types {list(types)} do not repeat with one global layer in "
                f"{every}, which is not supported here"
            )
        return read

    def to_hf(self) -> dict[str, Any]:
        """As config.json, for transformers 4 and 5."""
        fields = dataclasses.asdict(self)
        factor = fields.pop("rope_scaling_factor")
        scaling = None if factor == 1 else {"rope_type": "linear", "factor": factor}
        full = {"rope_type": "default"} if scaling is None else scaling
        return {
            "architectures": ["Gemma3ForCausalLM"],
            "model_type": "gemma3_text",
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
            **fields,
            "layer_types": list(self.layer_types),
            "rope_scaling": scaling,
            "rope_parameters": {
                GLOBAL: {**full, "rope_theta": self.rope_theta},
                LOCAL: {"rope_type": "default", "rope_theta": self.rope_local_base_freq},
            },
        }

    @classmethod
    def gemma3_1b(cls) -> "Gemma3TextConfig":
        """Gemma-3-1B, text only."""
        return cls(
            vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
            num_attention_heads=4, num_key_value_heads=1, sliding_window=512,
            max_position_embeddings=32768, eos_token_id=(1, 106),
        )  # fmt: skip

    @classmethod
    def gemma3_4b(cls) -> "Gemma3TextConfig":
        """The language model of Gemma-3-4B."""
        return cls(
            hidden_size=2560, intermediate_size=10240, num_hidden_layers=34,
            num_attention_heads=8, num_key_value_heads=4, sliding_window=1024,
            rope_scaling_factor=8.0,
        )  # fmt: skip

    @classmethod
    def gemma3_12b(cls) -> "Gemma3TextConfig":
        """The language model of Gemma-3-12B."""
        return cls(
            hidden_size=3840, intermediate_size=15360, num_hidden_layers=48,
            num_attention_heads=16, num_key_value_heads=8, sliding_window=1024,
            rope_scaling_factor=8.0,
        )  # fmt: skip

    @classmethod
    def gemma3_27b(cls) -> "Gemma3TextConfig":
        """The language model of Gemma-3-27B."""
        return cls(
            hidden_size=5376, intermediate_size=21504, num_hidden_layers=62,
            num_attention_heads=32, num_key_value_heads=16, head_dim=128,
            query_pre_attn_scalar=168, sliding_window=1024, rope_scaling_factor=8.0,
        )  # fmt: skip


def _rope_fields(config: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """Bases and factor, from version 4's flat keys or version 5's entry for each kind of layer."""
    fields: dict[str, Any] = {}
    parameters = config.get("rope_parameters") or {}
    full = {**(config.get("rope_scaling") or {}), **(parameters.get(GLOBAL) or {})}
    local = parameters.get(LOCAL) or {}
    for name, entry in ((GLOBAL, full), (LOCAL, local)):
        kind = entry.get("rope_type", entry.get("type", "default"))
        allowed = ("default", "linear") if name == GLOBAL else ("default",)
        if kind not in allowed:
            problems.append(f"rotary embeddings of type {kind!r} in {name} layers")
    if full.get("rope_type", full.get("type")) == "linear":
        fields["rope_scaling_factor"] = full["factor"]
    if "rope_theta" in full:
        fields["rope_theta"] = full["rope_theta"]
    if "rope_theta" in local:
        fields["rope_local_base_freq"] = local["rope_theta"]
    return fields
