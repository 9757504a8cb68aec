"""What ties a drafter to its target: both must see, read and be asked the same.

A drafter on another tower, with other ids or under another template would still decode without an
error, and lose what it was made for in silence: verification keeps the output right whatever is
drafted. So a drafter's directory says what it was made for, and loading it checks that.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from core_jax.convert.rules import assign, derive_entries
from core_jax.convert.safetensors_io import TensorReader
from core_jax.data.prompts import read_chat_template, read_image_processor_config
from core_jax.data.qwen2_5_vl_images import Qwen2_5_VLImageProcessor
from core_jax.models.auto import load_config
from core_jax.partition import flatten, tree_hash

# The frozen tower of either family, without its projector.
TOWERS = {"qwen2_5_vl": r"visual/(?!merger/).*", "gemma3": r"vision_tower/.*"}
_PIXELS = ("min_pixels", "max_pixels", "size")


class BindingError(ValueError):
    """A drafter was made for another target; the message says in what they differ."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Binding:
    """Fingerprints of a target (SHA-256, hex).

    Attributes:
      name: the directory's name, for people; it is not compared.
      weights: of all tensors by canonical name, however they are spread over files.
      tower: of the vision tower's tensors; "" where there is none to share.
      tokenizer: of the vocabulary.
      template: of the chat template; "" without one.
      pixels: limits of images under which the drafter was trained: the image processor's, or the
        config's in their place.
    """

    name: str
    weights: str
    tower: str
    tokenizer: str
    template: str
    pixels: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def check(self, target: "Binding", *, where: str) -> None:
        """Compares with the target at hand.

        Args:
          target: of that directory.
          where: the drafter's directory, for the message.

        Raises:
          BindingError: naming every fingerprint that differs.
        """
        wrong = [
            f"{field} ({_MEANING[field]}): made for {_short(getattr(self, field))}, "
            f"this target has {_short(getattr(target, field))}"
            for field in _MEANING
            if _compared(self, field) != _compared(target, field)
        ]
        if not wrong:
            return
        remedy = "Use the target it was made for, or make and train a drafter for this one"
        if len(wrong) == 1 and wrong[0].startswith("pixels"):
            remedy = (
                "Set the limits that it was trained under: data.min_pixels and data.max_pixels in "
                "the config, --min_pixels and --max_pixels of massv_jax.generate, `limits` of "
                "load_drafter with massv_jax.limit_pixels for the target"
            )
        raise BindingError(
            f"the drafter {where} was made for {self.name!r}, and {target.name!r} is used as "
            "another target:\n  " + "\n  ".join(wrong) + f"\n{remedy}"
        )


_MEANING = {
    "weights": "the model's tensors",
    "tower": "the vision tower",
    "tokenizer": "the vocabulary",
    "template": "the chat template",
    "pixels": "limits of the image processor",
}


def _compared(binding: Binding, field: str) -> Any:
    value = getattr(binding, field)
    if field != "pixels":
        return value
    both = "min_pixels" in value and "max_pixels" in value  # then `size` says them once more
    return {k: v for k, v in value.items() if k != "size" or not both}


def hash_params(params: Any) -> str:
    """SHA-256 of parameters as they are used; "" without any."""
    return tree_hash(params) if jax.tree.leaves(params) else ""


def _short(value: Any) -> str:
    return value[:12] + "..." if isinstance(value, str) and len(value) > 12 else repr(value)


def bind(path: pathlib.Path, tokenizer: Any, limits: Mapping[str, int] | None = None) -> Binding:
    """Reads the fingerprints of a target's hub directory; every tensor is read once.

    Args:
      path: the directory.
      tokenizer: the target's, as transformers loads it.
      limits: `min_pixels`, `max_pixels` of images in the place of the image processor's.
    """
    path = pathlib.Path(path)
    weights, tower = (
        weight_hashes(path) if (path / "config.json").is_file() else (_hash_files(path), "")
    )
    template = read_chat_template(path) or getattr(tokenizer, "chat_template", None) or ""
    return Binding(
        name=path.name,
        weights=weights,
        tower=tower,
        tokenizer=_hash_text(json.dumps(sorted(tokenizer.get_vocab().items()))),
        template=_hash_text(str(template)) if template else "",
        pixels=_pixel_limits(path, limits or {}),
    )


def weight_hashes(path: pathlib.Path) -> tuple[str, str]:
    """(all tensors, those of the tower or "") of a hub directory, by canonical name.

    Every tensor is read, once a process as long as the files stay as they are.
    """
    path = pathlib.Path(path).absolute()
    files = [*sorted(path.glob("*.safetensors*")), path / "config.json"]
    stamps = tuple((f.name, (s := f.stat()).st_size, s.st_mtime_ns) for f in files)
    return _weight_hashes(path, stamps)


@functools.lru_cache(maxsize=8)
def _weight_hashes(path: pathlib.Path, stamps: Any) -> tuple[str, str]:
    del stamps  # another content is another entry
    family, config = load_config(path)
    reader = TensorReader(path)
    model = family.model(config=config)
    rules = family.rules(config)
    shapes = {p: x.shape for p, x in flatten(family.abstract_params(model)).items()}
    assignments, _ = assign(reader.shapes, derive_entries(shapes, rules), rules)
    pattern = TOWERS.get(family.name)
    whole, tower = hashlib.sha256(), hashlib.sha256()
    for a in sorted(assignments, key=lambda a: (a.entry.path, a.entry.layer or 0)):
        tensor = reader.read(a.stored_name)
        tensor = np.ascontiguousarray(tensor.T if a.transpose else tensor)
        head = f"{a.entry.path}\0{a.entry.layer}\0{tensor.dtype}\0{tensor.shape}\0".encode()
        line = head + hashlib.sha256(tensor.view(np.uint8).data).digest()
        whole.update(line)
        if pattern and re.fullmatch(pattern, a.entry.path):
            tower.update(line)
    return whole.hexdigest(), tower.hexdigest() if pattern else ""


def _hash_files(path: pathlib.Path) -> str:
    """Of a composite directory: names and bytes of all safetensors files."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")):
        digest.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _pixel_limits(path: pathlib.Path, limits: Mapping[str, int]) -> dict[str, Any]:
    try:
        config = read_image_processor_config(path)
    except FileNotFoundError:
        return {}
    has_config = (path / "config.json").is_file()
    if has_config and load_config(path)[0].name == "qwen2_5_vl":  # spelled in two ways, or not
        images = Qwen2_5_VLImageProcessor.from_hf(config)
        return {"min_pixels": images.min_pixels, "max_pixels": images.max_pixels, **limits}
    return {k: config[k] for k in _PIXELS if config.get(k) is not None}


def check_vocabularies(target: Any, drafter: Any, *, vocab_size: int, hidden: tuple) -> None:
    """Raises unless the drafter's tokenizer gives the target's tokens the target's ids.

    Args:
      target: the target's tokenizer.
      drafter: the language model's own.
      vocab_size: rows of the drafter's table.
      hidden: ids that no drafter reads, such as Gemma's placeholder (outside its table).

    Raises:
      BindingError: some token has another id, or an id that the drafter's table lacks.
    """
    theirs, ours = target.get_vocab(), drafter.get_vocab()
    moved = sorted(t for t, i in theirs.items() if ours.get(t, i) != i)
    by_id = {i: t for t, i in ours.items()}
    moved += sorted(t for t, i in theirs.items() if by_id.get(i, t) != t and t not in moved)
    if moved:
        shown = ", ".join(f"{t!r} is {theirs[t]}, not {ours.get(t)}" for t in moved[:5])
        raise BindingError(
            f"the language model has another tokenizer: {len(moved)} of the target's tokens have "
            f"other ids ({shown}); choose a language model of the target's family"
        )
    beyond = sorted(i for i in theirs.values() if i >= vocab_size and i not in hidden)
    if beyond:
        raise BindingError(
            f"the language model's table has {vocab_size} rows, but the target's tokenizer has "
            f"{len(beyond)} tokens past them ({beyond[:5]}...); choose another language model"
        )
