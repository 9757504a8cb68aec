r"""An exported drafter for the same target in other tensors: stored in another type, or grown.

    python -m massv_jax.rebind --drafter DIR --was TARGET --target SAME_IN_OTHER_TENSORS --out DIR

A drafter's directory names its target by the hash of every tensor (massv_jax.binding), so a target
that was saved in float32, say, is another one to it. This copies the drafter and writes the other
hashes. Whether the two targets do compute the same is not checked here: with any other one answers
stay right and fewer drafts are accepted, which `massv_jax.evaluate` shows.
"""

import json
import pathlib
import shutil

from absl import app, flags

from massv_jax.binding import BindingError, weight_hashes
from massv_jax.loading import CONFIG_FILE


def rebind(
    drafter: pathlib.Path, copy: pathlib.Path, was: pathlib.Path, target: pathlib.Path
) -> None:
    """Copies a drafter, bound to other tensors.

    Args:
      drafter: a drafter's directory.
      copy: the directory to write.
      was: the hub directory of the target that it was made for.
      target: that of the same target in other tensors.

    Raises:
      BindingError: the drafter is not one for `was`, or no drafter's directory.
    """
    try:
        config = json.loads((drafter / CONFIG_FILE).read_text())
        bound = dict(config["target"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BindingError(f"{drafter} is no drafter's directory: {CONFIG_FILE} {error}") from error
    old, new = (
        dict(zip(("weights", "tower"), weight_hashes(path), strict=True)) for path in (was, target)
    )
    if {key: bound.get(key) for key in old} != old:
        raise BindingError(f"{drafter} was not made for {was}, but for {bound.get('name')!r}")
    shutil.copytree(drafter, copy, dirs_exist_ok=True)
    changed = config | {"target": bound | new | {"name": target.name}}
    (copy / CONFIG_FILE).write_text(json.dumps(changed, indent=2) + "\n")


def _define() -> None:
    flags.DEFINE_string("drafter", None, "A drafter's directory.", required=True)
    flags.DEFINE_string("was", None, "Hub directory of the target it was made for.", required=True)
    flags.DEFINE_string("target", None, "The same target, in other tensors.", required=True)
    flags.DEFINE_string("out", None, "The directory to write.", required=True)


def main(argv: list[str]) -> None:
    """Entry point."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    values = flags.FLAGS
    drafter, out, was, target = (
        pathlib.Path(getattr(values, name)).expanduser()
        for name in ("drafter", "out", "was", "target")
    )
    for path in (was, target):
        if not (path / "config.json").is_file():
            raise SystemExit(f"error: {path} is no hub directory")
    try:
        rebind(drafter, out, was, target)
    except BindingError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"{out} drafts for {target}", flush=True)


if __name__ == "__main__":
    _define()
    app.run(main)
