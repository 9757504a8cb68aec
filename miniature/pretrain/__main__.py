"""`python -m miniature.pretrain`: trains every stand-in; running it again continues."""

import pathlib

from absl import app, flags, logging

from miniature import standins
from miniature.pretrain.plan import PARTS, SCALES, run

_OUT = flags.DEFINE_string("out", str(standins.CHECKPOINTS), "Where the stand-ins are written.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/miniature", "Checkpoints and caches of training.")
_ONLY = flags.DEFINE_list("only", [], f"Parts to train, of {', '.join(PARTS)}; all by default.")
_SCALE = flags.DEFINE_enum("scale", "full", sorted(SCALES), "How long to train.")


def main(argv: list[str]) -> None:
    """Entry point."""
    del argv
    logging.set_verbosity(logging.WARNING)  # Orbax tells every detail at INFO
    run(
        pathlib.Path(_OUT.value),
        pathlib.Path(_WORKDIR.value).absolute(),
        parts=tuple(_ONLY.value) or PARTS,
        scale=SCALES[_SCALE.value],
    )


if __name__ == "__main__":
    app.run(main)
