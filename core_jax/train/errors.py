"""What stops a training run."""

from collections.abc import Sequence


class NonFiniteError(RuntimeError):
    """A loss, gradient, update or state is not finite.

    Attributes:
        step: number of the step (updates made before it), or of the state.
        ids: names of the examples in this process's part of the batch, as far as known.
    """

    def __init__(self, message: str, *, step: int, ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.ids = list(ids)


class ResumeError(ValueError):
    """A working directory holds a run that must not be continued with what is asked for now."""
