"""The files of `massv_jax.generate`: prompts in, answers out, and what they were made with."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from core_jax.data.images import ImageLimits
from core_jax.data.sources import clean_text
from core_jax.files import write_whole
from core_jax.resumed_output import (
    changed_settings,
    read_settings,
    settings_file,
    write_settings,
)

_ANOTHER = "name another file for --output"


class JobError(ValueError):
    """The job's files are not what they should be."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateJob:
    """What to answer, and where answers go.

    Attributes:
      input: JSONL.
      output: JSONL; answers that are there already are kept and not made again. Beside it
        `<output>.settings.json` says what they were made with, and `<output>.windows.jsonl` gets,
        for each batch, ids, seconds and the windows that were chosen.
      image_root: images are relative to it; the input's folder if None.
      batch_size: rows of a call; the last one is filled up.
      options: of `SpeculativeDecoder.generate`.
      limits: what an acceptable image file is.
      process_index, process_count: this process's share.
    """

    input: pathlib.Path
    output: pathlib.Path
    image_root: pathlib.Path | None = None
    batch_size: int = 1
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    limits: ImageLimits = ImageLimits()
    process_index: int = 0
    process_count: int = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """A prompt.

    Attributes:
      id: of the line, or its number; what is no Unicode in it became backslash escapes.
      prompt: a text, or messages.
      images: paths.
    """

    id: str
    prompt: Any
    images: list[Any]


def read_rows(job: GenerateJob) -> Iterator[Row]:
    """The input's rows, paths of images made absolute.

    Raises:
      JobError: a line is no prompt, or two have one id.
    """
    root = job.input.parent if job.image_root is None else job.image_root
    seen: set[str] = set()
    if not job.input.is_file():
        raise JobError(f"{job.input} is missing; give a JSONL file of prompts as --input")
    with job.input.open(encoding="utf-8-sig") as lines:  # with or without a mark
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{job.input}:{number}"
            record = _parse(line, where)
            row_id = clean_text(str(record.get("id", number)))
            if row_id in seen:
                raise JobError(f"{where}: id {row_id!r} was there before; ids must differ")
            seen.add(row_id)
            prompt = record.get("messages", record.get("prompt"))
            if not isinstance(prompt, str) and not _is_conversation(prompt):
                raise JobError(
                    f'{where}: needs "prompt", a text, or "messages", a list of '
                    '{"role": ..., "content": ...}'
                )
            images = record.get("images", record.get("image"))
            images = [] if images is None else images if isinstance(images, list) else [images]
            yield Row(row_id, prompt, [str(root / image) for image in images])


def _is_conversation(prompt: Any) -> bool:
    def is_message(message: Any) -> bool:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return False
        content = message.get("content")
        parts = content if isinstance(content, list) else [content]
        kind = dict if isinstance(content, list) else str
        return all(isinstance(part, kind) for part in parts)

    return isinstance(prompt, list) and bool(prompt) and all(map(is_message, prompt))


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise JobError(f"{where} is not JSON ({error})") from error
    if not isinstance(record, dict):
        raise JobError(f"{where} is no JSON object")
    return record


def read_done(output: pathlib.Path) -> set[str]:
    """Ids that an output has answers for.

    Errors are removed from it, so that their prompts are tried again, and so is a last line that
    was cut off by a kill.

    Raises:
      JobError: the file holds something else.
    """
    if not output.is_file():
        return set()
    data = output.read_bytes()
    try:
        text = data[: data.rfind(b"\n") + 1].decode()
    except UnicodeDecodeError as error:
        raise JobError(f"{output} is no text ({error}); {_ANOTHER}") from error
    done, kept = set(), []
    # Texts may hold what `splitlines` takes for an end of line (U+2028, U+0085).
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            record = _parse(line, f"{output}:{number}")
        except JobError as error:
            raise JobError(f"{error}; {_ANOTHER}") from error
        if "id" not in record or not ("text" in record or "error" in record):
            raise JobError(f"{output}:{number} is no answer; {_ANOTHER}")
        if "text" in record:
            done.add(str(record["id"]))
            kept.append(line + "\n")
    if "".join(kept).encode() != data:
        write_whole(output, "".join(kept))
    return done


def check_settings(output: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Notes what answers are made with in `<output>.settings.json`, or compares with the note.

    Args:
      output: of the job.
      settings: as JSON.

    Raises:
      JobError: the output was begun with other settings; all that differ are named.
    """
    try:
        old = read_settings(output)
    except ValueError:
        raise JobError(f"{settings_file(output)} is damaged; {_ANOTHER}") from None
    if old is None:
        write_settings(output, settings)
    elif changed := changed_settings(old, settings):
        raise JobError(
            f"{output} was begun with other settings: {changed}. Go on with those, or name another "
            "file for --output"
        )
