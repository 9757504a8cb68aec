"""What a run leaves and says when a step of it is not finite."""

import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from core_jax.train.errors import NonFiniteError


def non_finite_error(
    workdir: str | os.PathLike[str], step: int, values: Mapping[str, float], ids: Any
) -> NonFiniteError:
    """The exception to raise, which names the examples; all of them are listed in `workdir`.

    Args:
        workdir: of the run.
        step: the step, whose update was not made.
        values: its metrics.
        ids: names of this process's examples, or None.
    """
    names = [] if ids is None else [str(name) for name in np.asarray(ids).reshape(-1)]
    culprits = ", ".join(f"{k}={values[k]}" for k in ("loss", "grad_norm", "update_norm"))
    path = epath.Path(workdir) / f"nonfinite-{step}-process{jax.process_index()}.json"
    path.write_text(json.dumps({"step": step, "ids": names, "metrics": repr(values)}) + "\n")
    shown = ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")
    return NonFiniteError(
        f"step {step} is not finite ({culprits}) on the batch of {shown or 'unnamed examples'}. "
        f"Its update was not made and not saved; all names are in {path}. Look at those examples, "
        "lower the learning rate, or lengthen the warm-up, and run again",
        step=step,
        ids=names,
    )
