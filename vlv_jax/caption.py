"""Captions for files, folders, tars and manifests.

    python -m vlv_jax.caption --config configs/vlv_stage2.py:mini --workdir RUN \
        --input photos --input more.tar --output captions.jsonl [--sidecar]
    python -m vlv_jax.caption --from EXPORTED --input photos --output captions.jsonl

Running the same command again goes on where it stopped. With several processes, process i takes
every n-th image and writes captions-0000i-of-0000n.jsonl.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from core_jax.config import ConfigError
from core_jax.data.images import BadImage, decode_image
from core_jax.data.sources import SourceError
from core_jax.files import sync_file
from core_jax.partition import tree_hash
from core_jax.resumed_output import shard_path
from core_jax.stopping import stop_between
from core_jax.watchdog import HEARTBEATS, Watchdog
from vlv_jax.batches import ImageViews, sample_index
from vlv_jax.caption_files import (
    Item,
    all_records,
    begin_replacing,
    check_settings,
    end_replacing,
    list_items,
    read_records,
    sidecar_paths,
    write_sidecar,
)
from vlv_jax.commands import run_command
from vlv_jax.experiment import Experiment
from vlv_jax.host_work import Progress, map_ahead
from vlv_jax.inference import Captioner, load_for_command
from vlv_jax.networks import PROJECTOR

_DECIDING = ("num_beams", "temperature", "top_k", "top_p", "max_new_tokens", "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionJob:
    """What to caption, and where captions go.

    Attributes:
      inputs: image files, folders (searched recursively), .tar files, manifests.
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
    if job.overwrite == "replace":
        path = final.with_name(f"{final.name}.{_fingerprint(captioner, job)}.partial")
        done = read_records(path, repair=True)
    else:
        path = final
        read_records(path, repair=True)
        done = all_records(job.output)
    if job.overwrite == "replace":
        begin_replacing(job.output)
    else:
        check_settings(job.output, _settings(captioner))
    todo = [item for item in own if item.id not in done]
    _announce(len(own), len(todo), path)
    if job.overwrite == "skip":
        _complete_sidecars(own, done, texts)
    progress, failed = Progress(len(todo), at=at), 0
    with path.open("a", encoding="utf-8") as out:
        for records in _caption(captioner, todo, job.num_threads):
            for record in records:
                text = texts.get(record["id"])
                wanted = text is not None and (job.overwrite == "replace" or not text.exists())
                if wanted and "caption" in record:
                    write_sidecar(text, record["caption"])
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
            out.flush()  # what was computed survives a kill
            failed += sum("error" in record for record in records)
            progress.add(len(records))
    sync_file(path)  # before old captions go, or anything is said of these
    if job.overwrite == "replace":
        os.replace(path, final)
        end_replacing(
            job.output, _settings(captioner), job.process_count, _fingerprint(captioner, job)
        )
    if todo:
        progress.close()
    if failed:
        print(f'{failed} images could not be used; see "error" in {final}', flush=True)
    return final


def _settings(captioner: Captioner) -> dict[str, Any]:
    """What captions follow from, beside the image; batch size and threads are not among it."""
    sampling = dataclasses.asdict(captioner.sampling)
    weights = tree_hash(captioner.params[PROJECTOR])  # small, and every captioner trains it
    return {"weights": weights, **{name: sampling[name] for name in _DECIDING}}


def _check_sidecars(texts: dict[str, pathlib.Path], inputs: Sequence[str]) -> None:
    given = {os.path.abspath(path) for path in inputs}
    for item_id, text in texts.items():
        if os.path.abspath(text) in given:
            raise SourceError(f"--sidecar would write the caption of {item_id} over --input {text}")


def _announce(total: int, todo: int, path: pathlib.Path) -> None:
    had = f", {total - todo} of them are in {path} already" if todo < total else ""
    print(f"{total} images{had}", flush=True)


def _complete_sidecars(items: Sequence[Item], done: dict, texts: dict) -> None:
    """Texts of images that were captioned without --sidecar."""
    for item in items:
        record, text = done.get(item.id, {}), texts.get(item.id)
        if text is not None and "caption" in record and not text.exists():
            write_sidecar(text, record["caption"])


def _fingerprint(captioner: Captioner, job: CaptionJob) -> str:
    """Tells replacements apart, so that only the same command goes on with a part."""
    weights = tree_hash(captioner.params[PROJECTOR])
    content = [weights, dataclasses.asdict(captioner.sampling), list(job.inputs)]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:8]


def _caption(
    captioner: Captioner, items: Sequence[Item], num_threads: int
) -> Iterator[list[dict[str, Any]]]:
    """Lists of records, in the items' order, a batch of usable images each."""
    size = captioner.sampling.batch_size
    views = captioner.views
    if views.crop == "random":  # of training; a caption of a random part would be no caption
        views = dataclasses.replace(views, crop="center")

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
            caption_inputs(captioner, wanted, at=at)

    run_command(job, workdir=False, config=False)


if __name__ == "__main__":
    main()
