"""The hub's files beside the weights: tokenizers, processors, licences."""

import pathlib
import shutil
from collections.abc import Collection
from typing import Any

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json", "tokenizer.model")


def load_tokenizer(path: pathlib.Path) -> Any:
    """A tokenizer from a local directory; no code of the repository is run.

    Raises:
      FileNotFoundError: the directory has none.
    """
    from transformers import AutoTokenizer

    if not any((pathlib.Path(path) / name).is_file() for name in _TOKENIZER_FILES):
        raise FileNotFoundError(f"{path} has no tokenizer ({', '.join(_TOKENIZER_FILES)})")
    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def copy_companions(
    source: pathlib.Path, target: pathlib.Path, *, skip: Collection[str] = ()
) -> None:
    """Copies tokenizer, processor and licence files; never weights, configurations or code.

    Args:
      source: a hub directory.
      target: created if needed.
      skip: names of further files to leave out.
    """
    source, target = pathlib.Path(source), pathlib.Path(target)
    if source.resolve() == target.resolve():
        return
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        name = file.name
        is_text = file.suffix in (".json", ".txt", ".jinja", ".model")
        is_licence = name.lower().startswith(("license", "licence", "notice"))
        is_ours = name in ("config.json", "massv_config.json") or name.endswith(".index.json")
        if file.is_file() and (is_text or is_licence) and not is_ours and name not in skip:
            shutil.copyfile(file, target / name)
