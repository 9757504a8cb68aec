"""`python -m miniature.pretrain`: trains every stand-in; running it again continues.

Every part is trained in a process of its own, as `--only` does: what the allocator should do with
freed memory is said to a process before it begins.
"""

import pathlib

from absl import app, flags, logging

from miniature import standins
from miniature.commands import keep_compiled_programs, keep_memory
from miniature.commands import run as run_command
from miniature.pretrain.plan import PARTS, SCALES, run

_OUT = flags.DEFINE_string("out", str(standins.CHECKPOINTS), "Where the stand-ins are written.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/miniature", "Checkpoints and caches of training.")
_ONLY = flags.DEFINE_list("only", [], f"Parts to train, of {', '.join(PARTS)}; all by default.")
_SCALE = flags.DEFINE_enum("scale", "full", sorted(SCALES), "How long to train.")


def main(argv: list[str]) -> None:
    """Entry point."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells every detail at INFO
    workdir = pathlib.Path(_WORKDIR.value).absolute()
    if _ONLY.value:
        run(
            pathlib.Path(_OUT.value), workdir, parts=tuple(_ONLY.value), scale=SCALES[_SCALE.value]
        )
        return
    keep_compiled_programs(workdir)
    keep_memory()
    for part in PARTS:
        run_command(
            "miniature.pretrain", only=part, out=_OUT.value, workdir=workdir, scale=_SCALE.value
        )


if __name__ == "__main__":
    app.run(main)
