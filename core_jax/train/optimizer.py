"""The optimizer from a typed config: schedule, clipping, AdamW, learning-rate multipliers."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from core_jax.config import ConfigError
from core_jax.partition import path_str

Schedule = Callable[[Any], jax.Array]
Tree = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Hyper-parameters of the optimizer.

    Attributes:
        name: "adamw", "sgd" (momentum `b1`), or "muon" (momentum 0.95): Muon (arXiv 2502.16982)
            for the kernels of linear layers and convolutions, AdamW for everything else.
        learning_rate: peak learning rate.
        schedule: "cosine", "linear" or "constant", after the warm-up.
        warmup_steps: steps of the linear warm-up; step `i` of it has the factor `(i+1)/warmup`.
        total_steps: step at which the decay ends; afterwards the rate stays at its minimum. The
            config files set it to the run's length.
        min_ratio: the minimum of the decay as a fraction of the peak.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: AdamW's epsilon.
        weight_decay: decoupled weight decay, scaled by the learning rate as in torch's AdamW.
        weight_decay_mask: path patterns of the parameters that decay; None means all, biases
            and norms included, which is what the VLV paper's code does.
        clip_norm: largest global gradient norm, or None.
        lr_multipliers: `((path pattern, factor), ...)`; a parameter may match at most one row.
    """

    name: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    total_steps: int = 1000
    min_ratio: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    weight_decay_mask: tuple[str, ...] | None = None
    clip_norm: float | None = 1.0
    lr_multipliers: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        """Refuses values that would train badly in silence."""
        if self.name not in ("adamw", "muon", "sgd"):
            raise ValueError(f"optimizer {self.name!r}: choose 'adamw', 'muon' or 'sgd'")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ValueError(f"schedule {self.schedule!r}: choose 'cosine', 'linear', 'constant'")
        if not self.learning_rate > 0:
            raise ValueError(
                f"optimizer.learning_rate is {self.learning_rate}; it must be positive"
            )
        if self.warmup_steps < 0:
            raise ValueError(
                f"optimizer.warmup_steps is {self.warmup_steps}; it must be at least 0"
            )
        if self.total_steps < 1:
            raise ValueError(
                f"optimizer.total_steps (run.steps unless set) is {self.total_steps}; it must be "
                "at least 1"
            )
        if self.schedule != "constant" and self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.warmup_steps} leaves nothing of total_steps="
                f"{self.total_steps} (run.steps unless set) for the {self.schedule} decay; set "
                "fewer, such as optimizer.warmup_steps=0"
            )
        if not 0 <= self.min_ratio <= 1:
            raise ValueError(f"min_ratio={self.min_ratio} must lie in [0, 1]")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise ValueError(
                f"clip_norm={self.clip_norm} must be positive, or None for no clipping"
            )

    def check_length(self, steps: int) -> None:
        """Refuses a run that would go on without learning.

        Args:
            steps: of the run.

        Raises:
            ValueError: the decay ends at a learning rate of 0 before the run does.
        """
        decays_to_zero = self.schedule != "constant" and self.min_ratio == 0
        if decays_to_zero and steps > self.total_steps:
            raise ValueError(
                f"the learning rate is 0 from optimizer.total_steps={self.total_steps} on, and the "
                f"run goes on to run.steps={steps}; set optimizer.total_steps={steps} (the config "
                "files do so by themselves), optimizer.min_ratio, or optimizer.schedule='constant'"
            )


def make_schedule(config: OptimizerConfig) -> Schedule:
    """Returns `step -> learning rate` (float32 scalar).

    The decay reaches its end once and stays there (the reference code of VLV oscillates).
    """

    def schedule(step: Any) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warmup = jnp.minimum((step + 1) / max(config.warmup_steps, 1), 1.0)
        span = max(config.total_steps - config.warmup_steps, 1)
        progress = jnp.clip((step - config.warmup_steps) / span, 0.0, 1.0)
        if config.schedule == "cosine":
            decay = 0.5 * (1 + jnp.cos(math.pi * progress))
        elif config.schedule == "linear":
            decay = 1 - progress
        else:
            decay = jnp.ones_like(progress)
        if config.schedule != "constant":
            decay = config.min_ratio + (1 - config.min_ratio) * decay
        return config.learning_rate * warmup * decay

    return schedule


def make_optimizer(
    config: OptimizerConfig, schedule: Schedule | None = None
) -> optax.GradientTransformation:
    """Returns the optimizer for a tree of trainable parameters.

    Patterns are checked when the state is initialised: one that matches nothing, or two rows of
    `lr_multipliers` that match one parameter, raise `ConfigError`.
    """
    schedule = make_schedule(config) if schedule is None else schedule
    parts: list[optax.GradientTransformation] = []
    if config.clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    if config.name == "adamw":
        parts.append(optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps))
    elif config.name == "muon":
        parts.append(_scale_by_muon(config))
    elif config.b1:
        parts.append(optax.trace(decay=config.b1))
    if config.weight_decay:
        mask: Any = None
        if (patterns := config.weight_decay_mask) is not None:

            def decays(tree: Tree) -> Tree:
                return _by_path(tree, [(p, True) for p in patterns], default=False, exclusive=False)

            mask = decays

        parts.append(optax.add_decayed_weights(config.weight_decay, mask=mask))
    if config.lr_multipliers:
        parts.append(_scale_by_path(config.lr_multipliers))
    parts.append(optax.scale_by_learning_rate(schedule))
    return optax.chain(*parts)


def _scale_by_muon(config: OptimizerConfig) -> optax.GradientTransformation:
    """Muon (arXiv 2502.16982) for kernels that are matrices, Adam for everything else.

    Kernels of linear layers are [..., in, out], leading axes being stacked layers; those of
    convolutions [height, width, in, out] are matrices of height * width * in rows, unless each
    channel has its own. Updates have the size that AdamW's have (a root mean square of 0.2), so
    learning rates carry over.
    """

    def is_matrix(path: Sequence[Any], x: Any) -> bool:
        per_channel = x.ndim == 4 and x.shape[2] == 1
        return path_str(path).endswith("kernel") and x.ndim in (2, 3, 4) and not per_channel

    def labels(tree: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda path, x: "muon" if is_matrix(path, x) else "adam", tree
        )

    def rows_of(x: Any) -> tuple[int, ...]:
        return (0, 1, 2) if x.ndim == 4 else (x.ndim - 2,)

    def dimensions(tree: Tree) -> Tree:  # of what is left of the tree: kernels only
        return jax.tree.map(
            lambda x: optax.contrib.MuonDimensionNumbers(rows_of(x), x.ndim - 1), tree
        )

    def resize(updates: Tree, params: Tree) -> Tree:
        del params

        def one(x: Any) -> Any:
            rows = math.prod(x.shape[axis] for axis in rows_of(x))
            return 0.2 * math.sqrt(max(rows, x.shape[-1])) * x

        return jax.tree.map(one, updates)

    muon = optax.chain(
        optax.contrib.scale_by_muon(eps=config.eps, weight_dimension_numbers=dimensions),
        optax.stateless(resize),
    )
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    return optax.partition({"muon": muon, "adam": adam}, labels)


def _scale_by_path(rows: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiplies each update by the factor of the row that its path matches."""

    def init(params: Tree) -> optax.EmptyState:
        _by_path(params, rows, default=1.0)
        return optax.EmptyState()

    def update(updates: Tree, state: Any, params: Tree = None) -> tuple[Tree, Any]:
        del params
        factors = _by_path(updates, rows, default=1.0)
        return jax.tree.map(lambda u, factor: u * factor, updates, factors), state

    return optax.GradientTransformation(init, update)


def _by_path(
    tree: Tree, rows: Sequence[tuple[str, Any]], *, default: Any, exclusive: bool = True
) -> Tree:
    """A tree with, for each leaf, the value of the row whose pattern matches the whole path."""
    used: set[str] = set()

    def one(path: Sequence[Any], _: Any) -> Any:
        name = path_str(path)
        hits = [(pattern, value) for pattern, value in rows if re.fullmatch(pattern, name)]
        if exclusive and len(hits) > 1:
            raise ConfigError(
                f"{name} is matched by several rows: {[pattern for pattern, _ in hits]}"
            )
        used.update(pattern for pattern, _ in hits)
        return hits[0][1] if hits else default

    out = jax.tree_util.tree_map_with_path(one, tree)
    dead = [pattern for pattern, _ in rows if pattern not in used]
    # `optax.tree_utils.tree_map_params` asks with a placeholder for all parameters, without paths.
    if dead and isinstance(tree, Mapping):
        raise ConfigError(f"optimizer patterns match no trainable parameter: {dead}")
    return out
