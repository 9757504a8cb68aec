"""Linear, convolution, embedding and normalisation layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from core_jax.ops.broadcast import match_rank
from core_jax.ops.conv import Padding, conv2d
from core_jax.ops.execution import ConvBackend, DepthwiseBackend
from core_jax.ops.matmul import matmul
from core_jax.ops.norms import group_norm, layer_norm, rms_norm, rms_norm_one_plus

_KERNEL_INIT = nn.initializers.variance_scaling(1.0, "fan_in", "truncated_normal")


class Linear(nn.Module):
    """y = x @ kernel + bias; kernel is [in, out]."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        """Maps the last axis from D to F features."""
        kernel = self.param("kernel", _KERNEL_INIT, (x.shape[-1], self.features))
        y = matmul(x.astype(kernel.dtype), kernel)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,))
            y = y + match_rank(bias, y)
        return y


class Conv2d(nn.Module):
    """Convolution with an HWIO kernel."""

    features: int
    kernel_size: int
    stride: int = 1
    padding: Padding = ((0, 0), (0, 0))
    groups: int = 1
    use_bias: bool = True
    backend: ConvBackend | DepthwiseBackend = "xla"

    @nn.compact
    def __call__(self, x: Float[Array, "B h w i"]) -> Float[Array, "B h2 w2 o"]:
        """Convolves images."""
        shape = (self.kernel_size, self.kernel_size, x.shape[-1] // self.groups, self.features)
        kernel = self.param("kernel", _KERNEL_INIT, shape)
        y = conv2d(
            x.astype(kernel.dtype),
            kernel,
            stride=self.stride,
            padding=self.padding,
            groups=self.groups,
            backend=self.backend,
        )
        if self.use_bias:
            y = y + match_rank(self.param("bias", nn.initializers.zeros, (self.features,)), y)
        return y


class Embed(nn.Module):
    """A table of vectors, one for each id."""

    num_embeddings: int
    features: int

    def setup(self):
        """Declares the table."""
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (self.num_embeddings, self.features)
        )

    def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Looks ids up."""
        return jnp.take(self.embedding, ids, axis=0)

    def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
        """Logits of a tied output head."""
        return matmul(x, self.embedding.T.astype(x.dtype))


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return layer_norm(x, scale, bias, eps=self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        return rms_norm(x, scale, eps=self.eps)


class OnePlusRMSNorm(nn.Module):
    """Root-mean-square normalisation whose scale is stored as its distance from one (Gemma)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Normalises the last axis."""
        scale = self.param("scale", nn.initializers.zeros, (x.shape[-1],))
        return rms_norm_one_plus(x, scale, eps=self.eps)


class GroupNorm(nn.Module):
    """Group normalisation of images."""

    num_groups: int
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Normalises space and the channels of each group."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return group_norm(x, scale, bias, num_groups=self.num_groups, eps=self.eps)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The exact (erf) GELU, which is what networks mean by "gelu"."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The tanh approximation of GELU ("gelu_pytorch_tanh": Gemma, SigLIP)."""
    return jax.nn.gelu(x, approximate=True)
