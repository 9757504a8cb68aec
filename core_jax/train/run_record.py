"""run.json: what a run was made from, and whether it may be continued.

What is looked at, in this order, when a command starts in a working directory:

1. The directory has a checkpoint. The run is continued, provided that its fingerprint, its
   frozen weights and its `init_from` are the recorded ones. Anything else is an error that names
   the differences: continuing would silently train something else, and starting anew would
   throw work away.
2. It has none, and `init_from` is given: a warm start. Parameters come from there; the step,
   the moments and the moving average start anew. A run there must have been trained beside the
   same frozen weights: others of the same shape would fit, and mean something else.
3. Neither: a fresh start.
"""

import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from typing import Any, Literal

import jax
from etils import epath

from core_jax.code_version import code_version
from core_jax.files import write_whole
from core_jax.train.errors import ResumeError

FILE_NAME = "run.json"
CHECKPOINT_DIR = "checkpoints"
# The hash of what `init_from` held, where frozen weights come from there.
INIT_FROM = "init_from"
# What decides numbers: arithmetic, its compilers, what reads words, images, weights and records.
_PACKAGES = (
    "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "flax", "optax", "orbax-checkpoint", "numpy",
    "grain", "array_record", "transformers", "tokenizers", "pillow", "safetensors",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run is made from; everything must be JSON.

    Attributes:
        fingerprint: all settings that must not change between start and resumption (model,
            trainable patterns, losses, optimizer, batch size, data). What may change (logging
            and saving intervals, mesh, paths of outputs) is left out of it.
        data_seed: seed of the data order.
        frozen_hashes: name -> `tree_hash` of frozen weights.
        init_from: source of a warm start, or None.
        config: the whole resolved configuration, for people.
        extra: anything else worth keeping, for people.
    """

    fingerprint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data_seed: int | None = None
    frozen_hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    init_from: str | None = None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The record as JSON values, tuples having become lists."""
        return json.loads(json.dumps(dataclasses.asdict(self), sort_keys=True))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def has_checkpoint(workdir: str) -> bool:
    """Whether the directory holds at least one committed checkpoint."""
    directory = epath.Path(workdir) / CHECKPOINT_DIR
    return directory.exists() and any(path.name.isdigit() for path in directory.iterdir())


def decide_start(workdir: str, record: RunRecord) -> Literal["resume", "warm", "fresh"]:
    """Says how a run begins (see the module's docstring).

    Raises:
        ResumeError: if the directory holds a run that was made from something else, or
            `init_from` one that was trained with other frozen weights.
    """
    if not has_checkpoint(workdir):
        if record.init_from is None:
            return "fresh"
        _compare_weights(record)
        return "warm"
    path = epath.Path(workdir) / FILE_NAME
    if not path.exists():
        raise ResumeError(
            f"{workdir} has checkpoints but no {FILE_NAME}, so nothing says what they were made "
            f"from. Put the file back, or use a new --workdir"
        )
    _compare(_read(path), record.to_json(), workdir)
    return "resume"


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ResumeError(
            f"{path} is damaged ({error}), so nothing says what the checkpoints beside it were "
            "made from. Put a copy of the file back, or use a new --workdir"
        ) from None


def _compare(old: Mapping[str, Any], new: Mapping[str, Any], workdir: str) -> None:
    if old.get("init_from") != new["init_from"]:
        raise ResumeError(
            f"{workdir} has a checkpoint of a run with init_from={old.get('init_from')!r}, and "
            f"init_from={new['init_from']!r} is asked for. init_from starts a new run: give a new "
            f"--workdir for that, or the recorded value to continue"
        )
    problems = []
    for section in ("fingerprint", "frozen_hashes", "data_seed"):
        recorded, wanted = old.get(section), new[section]
        if section == "frozen_hashes" and INIT_FROM not in (recorded or {}):
            # A run of an earlier release, which did not record it.
            wanted = {name: value for name, value in wanted.items() if name != INIT_FROM}
        before, now = _flat({section: recorded}), _flat({section: wanted})
        for key in sorted(before.keys() | now.keys()):
            if before.get(key, "absent") != now.get(key, "absent"):
                was, want = before.get(key, "absent"), now.get(key, "absent")
                problems.append(f"{key}: was {_short(was)}, now {_short(want)}")
    if problems:
        raise ResumeError(
            f"{workdir} has a checkpoint of a run with other settings:\n  "
            + "\n  ".join(problems)
            + "\nRestore them to continue that run, or use a new --workdir (with init_from="
            f"{workdir} to start from its parameters)"
        )


def _compare_weights(record: RunRecord) -> None:
    """Of a new run with those of the run that it starts from; exports have no record."""
    if not record.init_from or not (path := epath.Path(record.init_from) / FILE_NAME).exists():
        return
    old, new = _read(path), record.to_json()
    hashes = old.get("frozen_hashes", {})
    problems = []
    for name, wanted in new["frozen_hashes"].items():
        if name != INIT_FROM and hashes.get(name, wanted) != wanted:
            there, here = (x.get("config", {}).get("model", {}).get(name, "") for x in (old, new))
            problems.append(
                f"{name}: there {there} (hash {hashes[name][:12]}), here {here} ({wanted[:12]})"
            )
    if problems:
        raise ResumeError(
            f"init_from={record.init_from} was trained with other weights than this config names:"
            "\n  " + "\n  ".join(problems) + "\nWhat it learned means nothing beside these: name "
            "the weights that it was trained with, or start without init_from"
        )


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping) and tree:
        return {
            k: v
            for key, value in tree.items()
            for k, v in _flat(value, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: tree}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else text[:77] + "..."


def write_record(workdir: str, record: RunRecord, *, resumed_at: int | None) -> None:
    """Writes run.json from process 0; a resumption keeps the first entry and adds itself."""
    if jax.process_index():
        return
    path = epath.Path(workdir) / FILE_NAME
    now = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": resumed_at or 0,
        "code": str(code_version()),
        "versions": versions(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }
    starts = []
    if resumed_at is not None:
        starts = _read(path).get("starts", [])
    content = {"format": 1, **record.to_json(), "starts": [*starts, now]}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    if "://" in os.fspath(path):
        path.write_text(text)  # object stores know no halves
    else:
        write_whole(path, text)
