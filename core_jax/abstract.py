"""A jitted program and its arguments as shapes: all that lowering and compiling it take."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from core_jax.flops import count_jaxpr

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class AbstractProgram:
    """A call of a jitted function, without an array.

    Attributes:
      fn: the function, jitted.
      arguments: shapes. Those with a sharding lie where it says; those without are the compiler's
        to place, as arrays are that nobody has put on a mesh.
      options: static arguments by keyword.
      mesh: set around the call; None where the function itself does so, or needs none.
      parts: the arguments by what they are to a reader (see launch.memory), for the account of
        main memory.
      batch_sharding: of the rows; None where nobody splits them beforehand.
      rows: of the batch; 0 where it is the config's.
      before: the program whose result is one of the arguments, laid out as its compiler chose.
      place: of that argument.
    """

    fn: Callable[..., Any]
    arguments: tuple[Tree, ...]
    parts: Mapping[str, Tree]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    mesh: Mesh | None = None
    batch_sharding: NamedSharding | None = None
    rows: int = 0
    before: "AbstractProgram | None" = None
    place: int = 0

    def trace(self) -> Any:
        """Jax's trace of the call."""
        with contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh):
            return self.fn.trace(*self.arguments, **self.options)  # type: ignore[attr-defined]

    def flops(self) -> float:
        """Operations of the call over all devices (`core_jax.flops`)."""
        return count_jaxpr(self.trace().jaxpr.jaxpr)

    def laid_out(self, shardings: Tree) -> "AbstractProgram":
        """The same call with the earlier program's result where that program left it.

        Args:
          shardings: `output_shardings` of the earlier program, compiled.
        """
        given = self.arguments[self.place]
        placed = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), given, shardings
        )
        arguments = tuple(
            placed if i == self.place else tree for i, tree in enumerate(self.arguments)
        )
        parts = {name: placed if tree is given else tree for name, tree in self.parts.items()}
        return dataclasses.replace(self, arguments=arguments, parts=parts)
