"""Nothing that is finished is done again."""

import pathlib
import time
from collections.abc import Callable


def once(marker: pathlib.Path, action: Callable[..., None], *args) -> None:
    """Runs an action unless its marker is there, and leaves the marker."""
    if marker.exists():
        return
    began = time.time()
    action(*args)
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.write_text(f"{time.time() - began:.0f} s\n")
