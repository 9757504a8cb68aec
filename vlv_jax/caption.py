"""Captions for files, folders, tars and manifests.

    python -m vlv_jax.caption --config configs/vlv_stage2.py:mini --workdir RUN \
        --input photos --input more.tar --output captions.jsonl [--sidecar]
    python -m vlv_jax.caption --from EXPORTED --input photos --output captions.jsonl

Running the same command again goes on where it stopped, and tries images and tars that could not be
used once more. With several processes, process i takes
every n-th image and writes captions-0000i-of-0000n.jsonl.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from core_jax.config import ConfigError
from core_jax.data.images import BadImage, decode_image
from core_jax.data.sources import SourceError
from core_jax.resumed_output import shard_path, write_settings
from core_jax.stopping import stop_between
from core_jax.watchdog import HEARTBEATS, Watchdog
from vlv_jax.batches import ImageViews, sample_index
from vlv_jax.caption_files import Item, list_items, sidecar_paths, write_sidecar
from vlv_jax.caption_output import (
    all_records,
    as_line,
    check_settings,
    drop_old_errors,
    finish_replacement,
    partial_path,
    read_records,
    recover_replacements,
)
from vlv_jax.caption_settings import caption_settings, replacement_name, whole_views
from vlv_jax.commands import run_command
from vlv_jax.experiment import Experiment
from vlv_jax.host_work import Progress, map_ahead
from vlv_jax.inference import Captioner, load_for_command


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionJob:
    """What to caption, and where captions go.

    Attributes:
      inputs: image files, folders (searched recursively, linked ones too), .tar files, manifests.
      output: JSONL, an object an image: id, file_name (and member, in a tar), caption, finished,
        num_tokens; or id, file_name and error.
      sidecar: also a `.txt` beside each image that is a file of its own.
      overwrite: "skip" keeps every caption and text that is there already; "replace" makes all of
        them anew (the old output stays in place until the new one is whole).
      num_threads: of image decoding.
      process_index, process_count: this process's share.
    """

    inputs: Sequence[str]
    output: pathlib.Path
    sidecar: bool = False
    overwrite: str = "skip"
    num_threads: int = 8
    process_index: int = 0
    process_count: int = 1


def caption_inputs(
    captioner: Captioner, job: CaptionJob, *, at: Callable[[str], None] = lambda place: None
) -> pathlib.Path:
    """Captions everything that is not captioned yet; returns the file with this process's part.

    A sampled caption depends on the weights, the settings and the image's id, not on what else is
    in its batch, nor on how often the job was stopped. `at` is told where the job is
    (`Watchdog.at`).

    Raises:
      SourceError: an input or an existing output is not what it should be.
    """
    items = list_items(job.inputs)
    own = items[job.process_index :: job.process_count]
    texts = sidecar_paths(items) if job.sidecar else {}
    _check_sidecars(texts, job.inputs)
    final = shard_path(job.output, job.process_index, job.process_count)
    final.parent.mkdir(parents=True, exist_ok=True)
    settings = caption_settings(captioner)
    fingerprint = replacement_name(settings, job.inputs)
    mended = {item.place["file_name"] for item in items if "member" in item.place}
    path, done = _begin(job, final, settings, fingerprint, mended)
    replacing = job.overwrite == "replace"
    again = {i.id for i in own if "error" in done.get(i.id, {})} if not replacing else set()
    todo = [item for item in own if item.id not in done or item.id in again]
    _announce(items, len(own), len(todo), path)
    if not replacing:
        _complete_sidecars(own, done, texts)
    failed = _write_captions(captioner, job, todo, path, done, texts, at)
    if again:
        drop_old_errors(path, mended)
    if replacing:
        finish_replacement(job.output, fingerprint, job.process_index, job.process_count, settings)
    if failed:
        how = " without --overwrite=replace" if replacing else ""
        print(
            f'{failed} images could not be used; see "error" in {final}. Run it again{how} to try '
            "them once more",
            flush=True,
        )
    return final


def _begin(
    job: CaptionJob,
    final: pathlib.Path,
    settings: Mapping[str, Any],
    fingerprint: str,
    mended: Collection[str],
) -> tuple[pathlib.Path, dict[str, dict[str, Any]]]:
    """The file to go on with, repaired, and the records by id that need not be made.

    Args:
      job: the job.
      final: where this process's captions are in the end.
      settings: of the captions.
      fingerprint: of a replacement.
      mended: see `drop_old_errors`.

    Raises:
      SourceError: an output that is there has other settings, or is none.
    """
    recover_replacements(job.output)
    if job.overwrite == "replace":
        path = partial_path(final, fingerprint)
        drop_old_errors(path, mended)
        return path, read_records(path)
    check_settings(job.output, settings)
    drop_old_errors(final, mended)
    write_settings(final, settings)
    return final, all_records(job.output)


def _write_captions(
    captioner: Captioner,
    job: CaptionJob,
    todo: Sequence[Item],
    path: pathlib.Path,
    done: Mapping[str, Mapping[str, Any]],
    texts: Mapping[str, pathlib.Path],
    at: Callable[[str], None],
) -> int:
    """Appends records, batch by batch, and writes texts; returns how many are errors."""
    progress, failed = Progress(len(todo), at=at), 0
    with path.open("a", encoding="utf-8") as out:
        for records in _caption(captioner, todo, job.num_threads):
            for record in records:
                text = texts.get(record["id"])
                wanted = text is not None and (job.overwrite == "replace" or not text.exists())
                if wanted and "caption" in record:
                    write_sidecar(text, record["caption"])
                if record != done.get(record["id"]):  # the same error is there already
                    out.write(as_line(record))
            out.flush()  # what was computed survives a kill
            failed += sum("error" in record for record in records)
            progress.add(len(records))
        os.fsync(out.fileno())  # and what was finished, a power cut
    if todo:
        progress.close()
    return failed


def _check_sidecars(texts: dict[str, pathlib.Path], inputs: Sequence[str]) -> None:
    given = {os.path.abspath(os.path.expanduser(path)) for path in inputs}
    for item_id, text in texts.items():
        if os.path.abspath(text) in given:
            raise SourceError(f"--sidecar would write the caption of {item_id} over --input {text}")


def _announce(items: Sequence[Item], total: int, todo: int, path: pathlib.Path) -> None:
    sources = {id(item.source): item.source for item in items}.values()
    if left_out := sum(getattr(source, "left_out", 0) for source in sources):
        print(
            f"{left_out} images are left out: further fields of a sample, such as x.seg.png "
            "beside x.png (docs/data.md)",
            flush=True,
        )
    if broken := [item.id for item in items if item.error]:
        print(
            f"{len(broken)} tars cannot be read to their end, or are empty, and get a record with "
            f"an error; make or fetch them again: {', '.join(broken)}",
            flush=True,
        )
    had = f", {total - todo} of them are in {path} already" if todo < total else ""
    print(f"{total} images{had}", flush=True)


def _complete_sidecars(items: Sequence[Item], done: dict, texts: dict) -> None:
    """Texts of images that were captioned without --sidecar."""
    for item in items:
        record, text = done.get(item.id, {}), texts.get(item.id)
        if text is not None and "caption" in record and not text.exists():
            write_sidecar(text, record["caption"])


def _caption(
    captioner: Captioner, items: Sequence[Item], num_threads: int
) -> Iterator[list[dict[str, Any]]]:
    """Lists of records, in the items' order, a batch of usable images each."""
    size = captioner.sampling.batch_size
    views = whole_views(captioner)

    def load(item: Item) -> tuple[Item, np.ndarray | str]:
        return item, _view_of(item, views, captioner)

    loaded = map_ahead(load, items, num_threads=num_threads, ahead=2 * size + num_threads)
    while True:
        block, good = [], 0
        for item, view in loaded:
            block.append((item, view))
            good += isinstance(view, np.ndarray)
            if good == size:
                break
        if not block:
            return
        yield _records(captioner, block)


def _view_of(item: Item, views: ImageViews, captioner: Captioner) -> np.ndarray | str:
    """The view, or why there is none. A failing disk stops the job: it can be continued."""
    if item.error:
        return item.error
    try:
        data = item.example().encoded_image(captioner.limits)
        return views(decode_image(data, captioner.limits))["florence_image"]
    except BadImage as error:
        return str(error.reason)
    except PermissionError:
        return "permission_denied"


def _records(
    captioner: Captioner, block: Sequence[tuple[Item, np.ndarray | str]]
) -> list[dict[str, Any]]:
    good = [(item, view) for item, view in block if isinstance(view, np.ndarray)]
    captions = iter(())
    if good:
        rows = np.array([sample_index(item.id) for item, _ in good])
        captions = iter(captioner.caption_views(np.stack([v for _, v in good]), rows=rows))
    records = []
    for item, view in block:
        record: dict[str, Any] = {"id": item.id, **item.place}
        if isinstance(view, np.ndarray):
            caption = next(captions)
            record |= {
                "caption": caption.text, "finished": caption.finished,
                "num_tokens": caption.num_tokens,
            }  # fmt: skip
        else:
            record["error"] = view
        records.append(record)
    return records


def load_captioner(
    experiment: Experiment | None,
    workdir: pathlib.Path | None,
    source: str | None,
    **changes: Any,
) -> Captioner:
    """The captioner of a run or of an exported directory.

    Args:
      experiment: from the config file; its sampling, precision and execution are used. None: the
        directory's own.
      workdir: of a run.
      source: an exported directory (or another run), in the place of `workdir`.
      **changes: fields of `SamplingConfig`; None leaves one as it is.

    Raises:
      WorkdirError: none or both directories given, or not such a directory.
      ConfigError: an impossible setting.
    """
    loaded = load_for_command(Captioner, experiment, workdir, source, **changes)
    if loaded.sampling.num_beams > 1 and loaded.sampling.temperature > 0:
        raise ConfigError("beams and sampling exclude each other: num_beams=1, or temperature=0")
    return loaded


def _define_flags() -> dict[str, Any]:
    return {
        "from": flags.DEFINE_string("from", None, "Exported directory, instead of --workdir."),
        "input": flags.DEFINE_multi_string("input", None, "File, folder, .tar or manifest."),
        "output": flags.DEFINE_string("output", None, "JSONL file to write."),
        "sidecar": flags.DEFINE_bool("sidecar", False, "Also a .txt beside each image."),
        "overwrite": flags.DEFINE_enum(
            "overwrite", "skip", ["skip", "replace"], "What happens to captions that exist."
        ),
        "threads": flags.DEFINE_integer("threads", 8, "Threads that decode images."),
        "num_beams": flags.DEFINE_integer("num_beams", None, "Overrides the config's."),
        "temperature": flags.DEFINE_float("temperature", None, "Overrides the config's."),
        "max_new_tokens": flags.DEFINE_integer("max_new_tokens", None, "Overrides the config's."),
        "batch_size": flags.DEFINE_integer("batch_size", None, "Overrides the config's."),
        "seed": flags.DEFINE_integer("seed", None, "Overrides the config's."),
        "hang_seconds": flags.DEFINE_float(
            "hang_seconds", 1800.0, "A job that comes no further for so long ends; 0: never."
        ),
    }


def main() -> None:
    """The command."""
    given = _define_flags()
    flags.mark_flags_as_required(["input", "output"])

    def job(experiment: Experiment | None, workdir: pathlib.Path | None) -> None:
        value = {name: flag.value for name, flag in given.items()}
        changes = ("num_beams", "temperature", "max_new_tokens", "batch_size", "seed")
        wanted = CaptionJob(
            inputs=value["input"],
            output=pathlib.Path(value["output"]).expanduser(),
            sidecar=value["sidecar"],
            overwrite=value["overwrite"],
            num_threads=value["threads"],
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        heartbeats = wanted.output.parent / f"{wanted.output.name}.{HEARTBEATS}"
        with Watchdog(
            heartbeats, seconds=value["hang_seconds"], index=wanted.process_index
        ) as watchdog:
            at = stop_between(watchdog.at)
            try:
                captioner = load_captioner(
                    experiment, workdir, value["from"], **{name: value[name] for name in changes}
                )
            except ConfigError as error:
                raise SystemExit(f"error: {error}") from error
            at("the first image")
            caption_inputs(captioner, wanted, at=at)

    run_command(job, workdir=False, config=False)


if __name__ == "__main__":
    main()
