"""How a network is executed on a machine, as opposed to what it computes."""

import dataclasses
from typing import Literal, get_args

AttentionBackend = Literal["xla", "cudnn", "splash"]
ConvBackend = Literal["xla", "im2col"]
DepthwiseBackend = Literal["xla", "shifts"]
RematPolicy = Literal["none", "full", "dots", "attention"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """Choices that change speed and memory, and results only by rounding.

    Attributes:
      attention: "xla" everywhere; "cudnn" is fused attention on NVIDIA GPUs (bf16 or fp16 only);
        "splash" is fused attention on TPUs, used where a mask's structure is known beforehand (all
        keys, or a whole causal sequence) and sizes fit (core_jax.ops.splash); "xla" elsewhere, so
        in decoding and for padded prompts.
      conv: "xla" is the compiler's convolution; "im2col" writes a convolution as matrix products,
        which is faster on CPUs at small spatial sizes.
      depthwise_conv: "shifts" writes a depthwise convolution as a weighted sum of shifted images;
        on CPUs the compiler's own ("xla") is twenty times slower.
      remat: what a layer's backward pass recomputes. "none" keeps every activation, "full" keeps
        only a layer's input, "dots" keeps the results of matrix products without batch dimensions,
        "attention" keeps a layer's input and what the fused kernel of "splash" returns, so that
        attention runs forward once; with "xla" it is "full".
      unroll: how many layers one turn of the loop over layers runs. 1 compiles fastest. As many as
        there are leaves no loop, which spares copies of weights and activations: on two CPU cores
        the miniature's training steps are 20 % faster.
    """

    attention: AttentionBackend = "xla"
    conv: ConvBackend = "xla"
    depthwise_conv: DepthwiseBackend = "xla"
    remat: RematPolicy = "none"
    unroll: int = 1

    def plain(self) -> "Execution":
        """With nothing computed twice, and no kernel of its own: for counting the arithmetic."""
        return dataclasses.replace(self, remat="none", attention="xla")

    def __post_init__(self):
        for name, allowed in (
            ("attention", get_args(AttentionBackend)),
            ("conv", get_args(ConvBackend)),
            ("depthwise_conv", get_args(DepthwiseBackend)),
            ("remat", get_args(RematPolicy)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"execution.{name} is {value!r}; it must be one of {allowed}")
        if self.unroll < 1:
            raise ValueError(f"execution.unroll is {self.unroll}; it must be at least 1")
