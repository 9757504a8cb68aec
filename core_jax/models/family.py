"""What a family of networks tells the loader about itself."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from core_jax.convert.rules import WeightRules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One row of the table in auto.py.

    Attributes:
      name: our name of the family (the folder's).
      config: frozen dataclass with `from_hf(dict)` and `to_hf() -> dict`.
      model: Linen module class with fields `config` and `execution`; `__call__` with
        `example_inputs` touches every parameter.
      example_inputs: config -> abstract positional arguments (ShapeDtypeStructs) of `__call__`.
      rules: config -> weight rules.
      file_name: the canonical safetensors file.
      param_axes: (regex on path, logical axes) for sharding; empty: sharded by size.
      adapt: (config, stored shapes by name) -> config, for a size that the stored tensors say
        and released configurations get wrong; None changes nothing.
    """

    name: str
    config: Any
    model: type[nn.Module]
    example_inputs: Callable[[Any], tuple]
    rules: Callable[[Any], WeightRules]
    file_name: str = "model.safetensors"
    param_axes: tuple[tuple[str, tuple[str | None, ...]], ...] = ()
    adapt: Callable[[Any, Mapping[str, tuple[int, ...]]], Any] | None = None

    def abstract_params(self, model: nn.Module) -> Mapping[str, Any]:
        """The parameter tree as shapes, without memory."""
        inputs = self.example_inputs(model.config)
        variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
        return variables["params"]

    def init_params(self, model: nn.Module, key: jax.Array) -> Mapping[str, Any]:
        """Fresh float32 parameters, for training from scratch."""
        inputs = [jax.numpy.zeros(x.shape, x.dtype) for x in self.example_inputs(model.config)]
        return jax.jit(model.init)(key, *inputs)["params"]
