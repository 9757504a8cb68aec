"""What the jobs read: tiny networks, pictures, conversations; written once into a folder."""

import dataclasses
import json
import pathlib

from PIL import Image

from tests.massv import tiny_pairs
from tests.vlv.hub import TinyHub, write_hub

STEPS = 8
_READY = "world.json"


@dataclasses.dataclass(frozen=True)
class World:
    """Inputs of all jobs.

    Attributes:
      root: the folder.
      hub: of VLV.
      pair: target and language model of MASSV.
    """

    root: pathlib.Path
    hub: TinyHub
    pair: tiny_pairs.Pair

    def vlv(self, stage: int, **run) -> dict:
        """An experiment of eight steps that saves every other one."""
        made = self.hub.experiment(
            stage=stage, steps=STEPS,
            **{"save_every": 2, "sample_every": 0, "ema_decay": 0.9, **run},
        )  # fmt: skip
        made["data"] |= {"batch_size": 4, "num_threads": 2}
        return made

    def massv(self, task: str, **groups) -> dict:
        """An experiment of any task; `groups` are put over the defaults."""
        folder = self.root / "llava"
        made = {
            "task": task,
            "model": {
                "target": str(self.pair.target), "language_model": str(self.pair.language_model),
                "frozen_dtype": "float32", "compute_dtype": "float32",
            },
            "data": {
                "source": {"kind": "llava", "path": str(folder / "data.json"),
                           "images": str(folder)},
                "batch_size": 4, "max_length": 96, "image_windows": 12, "num_threads": 2,
                "limits": {"min_side": 8}, "format": "plain" if task == "phase1" else "chat",
            },
            "run": {"steps": STEPS, "seed": 1, "log_every": 1, "save_every": 2},
            "optimizer": {"learning_rate": 1e-3, "total_steps": 10},
        }  # fmt: skip
        for name, values in groups.items():
            made[name] = made.get(name, {}) | values
        return made

    def config(self, name: str, experiment: dict) -> str:
        """Writes an experiment; what `--config` takes."""
        file = self.root / f"{name}.config.json"
        file.write_text(json.dumps(experiment))
        return f"tests/vlv/json_config.py:{file}"


def open_world(root: pathlib.Path) -> World:
    """The world in a folder, built if it is not there."""
    ready = root / _READY
    if not ready.is_file():
        root.mkdir(parents=True, exist_ok=True)
        hub = write_hub(root / "hub")
        tiny_pairs.write_qwen(root / "qwen")
        _write_conversations(root / "llava")
        ready.write_text(json.dumps(dataclasses.asdict(hub)))
    hub = TinyHub(**json.loads(ready.read_text()))
    return World(root, hub, tiny_pairs.Pair(root / "qwen" / "target", root / "qwen" / "lm"))


def _write_conversations(folder: pathlib.Path) -> None:
    folder.mkdir()
    records = []
    for i, picture in enumerate(tiny_pairs.pictures(8)):
        Image.fromarray(picture).resize((48, 40)).save(folder / f"{i}.png")
        spoken = [{"from": "human", "value": "<image>\nwhat is it?"},
                  {"from": "gpt", "value": "a red circle"}]  # fmt: skip
        records.append({"id": str(i), "image": f"{i}.png", "conversations": spoken})
    (folder / "data.json").write_text(json.dumps(records))
