"""The files of a distillation: chunks that are there whole or not at all, and what they make.

    distill.json             what every process of the run must agree on
    parts/00007.jsonl        answers of a chunk, in the instructions' order
    parts/00007.json         its manifest; a chunk without one does not count
    answers.jsonl            all chunks' answers, once all are there
    problems.json            what failed or was skipped, and why
    manifest.json            counts and hashes

Nothing in them tells time, place or process: the same settings make the same bytes.
"""

import collections
import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from core_jax.data.sources import clean_text
from core_jax.files import remove_unfinished, write_whole
from massv_jax.answers import FORMAT, MANIFEST

ANSWERS = "answers.jsonl"
PROBLEMS = "problems.json"
SETTINGS = "distill.json"
PARTS = "parts"
_MANIFEST_KEYS = {"ids", "succeeded", "failed", "skipped", "counts", "sha256"}  # of a chunk


class DistillError(ValueError):
    """A distillation cannot go on; the message has the remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """An instruction without an answer.

    Attributes:
      id, index: of the instruction.
      reason: for people and for counting.
    """

    id: str
    index: int
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """What became of a list of instructions.

    Attributes:
      number: from 0.
      ids: all of them, in order.
      lines: answers, as `AnswerRecord.to_json` gives them.
      failed: an image is broken, a prompt too long, ...
      skipped: nothing to ask.
      counts: of answers, turns, tokens, ... for the manifest.
    """

    number: int
    ids: tuple[str, ...]
    lines: tuple[str, ...]
    failed: tuple[Problem, ...]
    skipped: tuple[Problem, ...]
    counts: Mapping[str, int]


class ChunkFolder:
    """Chunks on disk.

    Args:
      root: the run's folder.
    """

    def __init__(self, root: pathlib.Path):
        self.root = root
        self.parts = root / PARTS

    def agree(self, settings: Mapping[str, Any]) -> None:
        """Writes the settings, or compares them with those that are there.

        Raises:
          DistillError: the folder was begun with other settings, all that differ are named; or
            what is there cannot be read.
        """
        self.parts.mkdir(parents=True, exist_ok=True)
        file = self.root / SETTINGS
        new = json.loads(json.dumps(settings))
        if not file.is_file():
            write_whole(file, _dump(new))
        old = _read_object(
            file, "name another folder for --out; or, if the command is the one that began this "
            "folder, delete that file, and it goes on"
        )  # fmt: skip
        wrong = sorted(_differences(old, new))
        if wrong:
            raise DistillError(
                f"{self.root} was begun with other settings: {'; '.join(wrong)}. Go on with "
                "those, or name another folder for --out"
            )

    def commit(self, chunk: Chunk) -> None:
        """Writes a chunk; its manifest comes last, when the answers are safely on disk."""
        data = "".join(line + "\n" for line in chunk.lines).encode()
        problems = {
            name: [dataclasses.asdict(p) for p in found]
            for name, found in (("failed", chunk.failed), ("skipped", chunk.skipped))
        }
        manifest = {
            "format": FORMAT, "chunk": chunk.number, "ids": chunk.ids,
            "succeeded": len(chunk.lines), **problems, "counts": dict(chunk.counts),
            "sha256": hashlib.sha256(data).hexdigest(),
        }  # fmt: skip
        for file in (self._answers(chunk.number), self._manifest(chunk.number)):
            remove_unfinished(file)
        write_whole(self._answers(chunk.number), data)
        write_whole(self._manifest(chunk.number), _dump(manifest))

    def is_committed(self, number: int) -> bool:
        """Whether a chunk is there."""
        return self._manifest(number).is_file()

    def manifest(self, number: int) -> dict[str, Any]:
        """A committed chunk's.

        Raises:
          DistillError: it cannot be read.
        """
        file = self._manifest(number)
        remedy = "delete it and run the command again to answer the chunk anew"
        found = _read_object(file, remedy)
        if missing := _MANIFEST_KEYS - found.keys():
            raise DistillError(
                f"{file} is damaged, it lacks {', '.join(sorted(missing))}; {remedy}"
            )
        return found

    def answers(self, number: int) -> bytes:
        """A committed chunk's answers, compared with its manifest.

        Raises:
          DistillError: they are not what was written.
        """
        file = self._answers(number)
        data = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(data).hexdigest() != self.manifest(number)["sha256"]:
            raise DistillError(
                f"{file} is not what was written; delete {self._manifest(number)} and run the "
                "command again to answer the chunk anew"
            )
        return data

    def _answers(self, number: int) -> pathlib.Path:
        return self.parts / f"{number:05d}.jsonl"

    def _manifest(self, number: int) -> pathlib.Path:
        return self.parts / f"{number:05d}.json"


def merge_chunks(
    folder: ChunkFolder,
    num_chunks: int,
    *,
    num_instructions: int,
    left_out: Mapping[str, int],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Joins all chunks; returns the manifest that is written beside the answers.

    Args:
      folder: where they are; all must be committed.
      num_chunks: of the run.
      num_instructions: in the source.
      left_out: reason -> instructions that are in no chunk.
      settings: for the manifest.

    Raises:
      DistillError: a chunk is damaged, an id occurs twice, or instructions are unaccounted for.
    """
    counts: collections.Counter[str] = collections.Counter()
    problems: dict[str, list[Any]] = {"failed": [], "skipped": []}
    seen: set[str] = set()
    hashed = hashlib.sha256()

    def parts() -> Iterable[bytes]:
        for number in range(num_chunks):
            manifest, data = folder.manifest(number), folder.answers(number)
            twice = [i for i in manifest["ids"] if i in seen]
            if twice or len(set(manifest["ids"])) != len(manifest["ids"]):
                raise DistillError(f"ids occur twice in the instructions: {twice[:5]}; number them")
            seen.update(manifest["ids"])
            counts.update(manifest["counts"])
            counts["succeeded"] += manifest["succeeded"]
            for name, found in problems.items():
                found += manifest[name]
            hashed.update(data)
            yield data

    write_whole(folder.root / ANSWERS, parts())
    skipped = collections.Counter(left_out)
    skipped.update(p["reason"] for p in problems["skipped"])
    reasons = collections.Counter(p["reason"] for p in problems["failed"])
    sums = {
        "input": num_instructions, "succeeded": counts.pop("succeeded", 0),
        "failed": len(problems["failed"]), "skipped": sum(skipped.values()),
    }  # fmt: skip
    check_sums(sums)
    manifest = {
        "format": FORMAT, **sums, "failed_by_reason": dict(sorted(reasons.items())),
        "skipped_by_reason": dict(sorted((k, v) for k, v in skipped.items() if v)),
        "counts": dict(sorted(counts.items())), "chunks": num_chunks,
        "sha256": hashed.hexdigest(), "settings": settings,
    }  # fmt: skip
    write_whole(folder.root / PROBLEMS, _dump(problems))
    write_whole(folder.root / MANIFEST, _dump(manifest))
    return manifest


def check_sums(sums: Mapping[str, int]) -> None:
    """Raises unless every instruction is accounted for.

    Raises:
      DistillError: succeeded + failed + skipped is not input.
    """
    found = sums["succeeded"] + sums["failed"] + sums["skipped"]
    if found != sums["input"]:
        raise DistillError(
            f"{found} of {sums['input']} instructions are accounted for ({dict(sums)}); the "
            "instruction file changed, or chunks of another run are in the folder"
        )


def _read_object(file: pathlib.Path, remedy: str) -> dict[str, Any]:
    """An object that this module wrote.

    Raises:
      DistillError: it is something else by now; the message has the remedy.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DistillError(f"{file} is damaged, it is not JSON ({error}); {remedy}") from error
    if not isinstance(found, dict):
        raise DistillError(f"{file} is damaged, it is no JSON object; {remedy}")
    return found


def _dump(value: Any) -> bytes:
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    return (clean_text(text) + "\n").encode()


def _differences(old: Any, new: Any, where: Sequence[str] = ()) -> Iterable[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in old.keys() | new.keys():
            yield from _differences(old.get(key), new.get(key), (*where, key))
    elif old != new:
        yield f"{'.'.join(where)} was {old!r:.60}, is {new!r:.60}"
