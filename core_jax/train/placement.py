"""A training step on a mesh, from the shapes of its parameters alone.

Training puts arrays where this says; a plan (`launch.plan`) lowers the same step for devices that
nobody has yet.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.sharding import Mesh, NamedSharding

from core_jax.abstract import AbstractProgram
from core_jax.sharding import abstract_like, batch_sharding, fsdp_axis, fsdp_by_size
from core_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule
from core_jax.train.state import TrainState, create_state, init_state, state_shardings
from core_jax.train.step import LossFn, jit_train_step, make_train_step

Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacedStep:
    """A jitted step, and where its arguments lie.

    Attributes:
      step_fn: `(state, frozen, batch) -> (state, metrics)`, jitted; the state is donated.
      optimizer: what its state belongs to.
      abstract_state: shapes of the state with their shardings.
      shardings: of the state.
      frozen_shardings: of the frozen parameters.
      batch_sharding: of every array of a batch.
      mesh: the mesh.
    """

    step_fn: Callable[..., Any]
    optimizer: optax.GradientTransformation
    abstract_state: TrainState
    shardings: TrainState
    frozen_shardings: Tree
    batch_sharding: NamedSharding
    mesh: Mesh

    def create_state(self, trainable: Tree) -> TrainState:
        """The state of a run that starts from these parameters, in its shards."""
        state, _ = create_state(
            trainable, self.optimizer, param_shardings=self.shardings.params, mesh=self.mesh,
            ema=self.abstract_state.ema is not None,
        )  # fmt: skip
        return state

    def abstract_arguments(self, frozen: Tree, batch: Tree) -> tuple[TrainState, Tree, Tree]:
        """What `step_fn` takes, as shapes with shardings: for lowering without memory."""
        return (
            self.abstract_state,
            abstract_like(frozen, self.frozen_shardings),
            abstract_like(batch, self.batch_sharding),
        )


@dataclasses.dataclass(frozen=True)
class AbstractJob:
    """A training job as shapes: all that lowering and compiling it take.

    Attributes:
      placed: the step.
      arguments: (state, frozen, batch), shapes with shardings.
    """

    placed: PlacedStep
    arguments: tuple[TrainState, Tree, Tree]

    @property
    def program(self) -> AbstractProgram:
        """The step as a program."""
        state, frozen, batch = self.arguments
        return AbstractProgram(
            fn=self.placed.step_fn, arguments=self.arguments,
            parts={
                "frozen": frozen, "trained": state.params,
                "optimizer": (state.opt_state, state.step), "ema": state.ema, "batch": batch,
            },
            batch_sharding=self.placed.batch_sharding,
        )  # fmt: skip


def place_step(
    loss_fn: LossFn,
    trainable: Tree,
    frozen: Tree,
    *,
    mesh: Mesh,
    optimizer: OptimizerConfig,
    grad_accum: int,
    compute_dtype: Any,
    ema_decay: float | None,
    seed: int,
    keyed_by_example: bool = False,
) -> PlacedStep:
    """The step of a loss on a mesh; no value of a parameter is read.

    Args:
      loss_fn: see `make_train_step`.
      trainable: parameters, or their shapes.
      frozen: the same of those that are not trained, in the type they are held in.
      mesh: of real devices, or of a topology's (jax.experimental.topologies).
      optimizer: its configuration.
      grad_accum: micro-batches.
      compute_dtype: of the trained parameters in the loss.
      ema_decay: None keeps no average.
      seed: of what is drawn in a step.
      keyed_by_example: see `make_train_step`.
    """
    schedule = make_schedule(optimizer)
    transformation = make_optimizer(optimizer, schedule)
    # Which parameters need splitting depends on size alone; small ones are replicated.
    place = functools.partial(fsdp_by_size, mesh=mesh, axis=fsdp_axis(mesh))
    abstract = jax.eval_shape(lambda p: init_state(p, transformation, ema_decay is not None),
                              trainable)  # fmt: skip
    shardings = state_shardings(abstract, place(trainable), mesh)
    step = make_train_step(
        loss_fn, transformation, schedule, grad_accum=grad_accum, compute_dtype=compute_dtype,
        ema_decay=ema_decay, seed=seed, keyed_by_example=keyed_by_example,
    )  # fmt: skip
    frozen_shardings, of_batch = place(frozen), batch_sharding(mesh)
    return PlacedStep(
        step_fn=jit_train_step(step, shardings, frozen_shardings, of_batch, mesh),
        optimizer=transformation,
        abstract_state=abstract_like(abstract, shardings),
        shardings=shardings,
        frozen_shardings=frozen_shardings,
        batch_sharding=of_batch,
        mesh=mesh,
    )
