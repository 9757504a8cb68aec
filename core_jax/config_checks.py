"""Checks of config values, for the `__post_init__` of typed configs.

Messages name the value by its dotted path, as the command line does.
"""

from typing import Any


def at_least(group: str, config: Any, **least: float) -> None:
    """Checks the least values of a group.

    Args:
      group: its name, for messages.
      config: the group.
      **least: of each value.

    Raises:
      ValueError: one is smaller.
    """
    for name, bound in least.items():
        value = getattr(config, name)
        if not value >= bound:  # so that NaN is refused
            raise ValueError(f"{group}.{name} is {value}; it must be at least {bound}")


def is_fraction(group: str, config: Any, *names: str) -> None:
    """Checks shares and probabilities.

    Raises:
      ValueError: one does not lie in [0, 1].
    """
    for name in names:
        value = getattr(config, name)
        if not 0 <= value <= 1:
            raise ValueError(f"{group}.{name} is {value}; it must lie in [0, 1]")


def check_run(run: Any) -> None:
    """Checks what the training runs of every method have in common.

    Raises:
      ValueError: a value makes no run.
    """
    at_least("run", run, steps=1, grad_accum=1, log_every=1, save_every=1, keep=1, hang_seconds=0)
    if run.ema_decay is not None and not 0 <= run.ema_decay < 1:
        raise ValueError(
            f"run.ema_decay is {run.ema_decay}; it must lie in [0, 1), such as 0.999, or stay unset"
        )


def check_micro_batches(data: Any, run: Any) -> None:
    """Checks that a batch divides into micro-batches.

    Raises:
      ValueError: it does not.
    """
    if data.batch_size % run.grad_accum:
        raise ValueError(
            f"data.batch_size {data.batch_size} does not divide into run.grad_accum "
            f"{run.grad_accum} micro-batches; make it a multiple"
        )


def check_drawing(group: str, config: Any) -> None:
    """Checks how tokens are drawn: temperature, top_k and top_p.

    Raises:
      ValueError: a value has no meaning.
    """
    at_least(group, config, temperature=0, top_k=0)
    if not 0 < config.top_p <= 1:
        raise ValueError(
            f"{group}.top_p is {config.top_p}; it must lie in (0, 1], and 1 keeps every token"
        )


def check_lengths(group: str, lengths: tuple[int, ...]) -> None:
    """Checks the lengths that prompts are filled up to.

    Raises:
      ValueError: there is none, or one is no length.
    """
    if not lengths or min(lengths) < 1:
        raise ValueError(f"{group}.prompt_lengths is {lengths}; name at least one, each 1 or more")
