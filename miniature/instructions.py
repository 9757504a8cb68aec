"""`python -m miniature.instructions --out DIR`: the world as LLaVA-format files, for MASSV."""

import pathlib

from absl import app, flags

from miniature.world.llava import write_llava

_OUT = flags.DEFINE_string("out", "runs/miniature_llava", "Folder to write.")
_TRAIN = flags.DEFINE_integer("train", 6000, "Training scenes.", lower_bound=1)
_HELDOUT = flags.DEFINE_integer("heldout", 300, "Held-out scenes, with two questions each.")


def main(argv: list[str]) -> None:
    """Writes everything; what is there already is kept."""
    del argv
    out = pathlib.Path(_OUT.value)
    if (out / "heldout.json").exists():
        print(f"{out} is there already", flush=True)
        return
    write_llava(out, train=_TRAIN.value, heldout=_HELDOUT.value)
    print(f"{_TRAIN.value} training and {_HELDOUT.value} held-out scenes in {out}", flush=True)


if __name__ == "__main__":
    app.run(main)
