"""Turns a working directory into one directory that stands alone.

    python -m vlv_jax.export --config configs/vlv_stage2.py:mini --workdir RUN --out DIR
    python -m vlv_jax.export --config configs/vlv_stage2.py:3b --released FILE --out DIR

The first works at any time, in either stage, while training goes on. The second imports the
captioner that the authors released (safetensors; docs/converting-pickles.md for a model.pt); UNet,
VAE, tokenizers and configurations come from the config's hub directories.
"""

import json
import pathlib

from absl import flags

from vlv_jax.commands import run_command
from vlv_jax.experiment import Experiment
from vlv_jax.exporting import exportable_run, write_export
from vlv_jax.workdir import WorkdirError

_OUT = flags.DEFINE_string("out", None, "Directory to write.", required=True)
_RELEASED = flags.DEFINE_string(
    "released", None, "Safetensors file or directory of the released captioner."
)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"],
    "Type of the stored weights; each as it is held by default.",
)  # fmt: skip
_REPORT = flags.DEFINE_string(
    "report", None, "report.json for the model card; the working directory's by default."
)


def _job(experiment: Experiment, workdir: pathlib.Path | None) -> None:
    if (workdir is None) == (_RELEASED.value is None):
        raise WorkdirError("name one source: --workdir RUN, or --released FILE")
    if workdir is not None:
        model = exportable_run(experiment, workdir)
    else:
        from vlv_jax.released import exportable_release

        model = exportable_release(experiment, pathlib.Path(_RELEASED.value).expanduser())
    out = pathlib.Path(_OUT.value).expanduser()
    write_export(model, out, dtype=_DTYPE.value, report=_read_report(workdir))
    print(f"wrote {out}", flush=True)


def _read_report(workdir: pathlib.Path | None) -> dict:
    if _REPORT.value:
        return json.loads(pathlib.Path(_REPORT.value).expanduser().read_text())
    file = workdir / "report.json" if workdir is not None else None
    return json.loads(file.read_text()) if file is not None and file.is_file() else {}


if __name__ == "__main__":
    run_command(_job, workdir=False)
