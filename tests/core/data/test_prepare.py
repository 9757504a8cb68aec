"""Everything of core_jax.data.prepare that needs no Beam."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

import core_jax.data
from core_jax.data import prepare, prepare_job
from core_jax.data.prepare import PrepareError
from core_jax.data.prepare_options import Options
from core_jax.data.prepare_rules import (
    Rules,
    account,
    shard_of,
)  # fmt: skip
from core_jax.data.sources import SourceSpec, open_source
from tests.core.data.raw_tars import jpeg, smooth, tree, without_beam, write_mixture, write_tar

RULES = Rules(side_above=32)
CLEAN = {"pwatermark": 0.1}


class TestBuckets:
    def record(self, position, own, reason=""):
        return (position, own, reason, False, b"", 0, b"", 1, 1)

    def test_choose(self):
        records = [
            self.record(5, "b"), self.record(0, "b"), self.record(1, "a", "broken"),
            self.record(2, "c"), self.record(3, "d"), self.record(4, "a"),
        ]  # fmt: skip
        drops = [
            (2, "near_duplicate", "a"), (2, "duplicate_bytes", "b"), (3, "near_duplicate", "c"),
            (3, "near_duplicate", "a"),
        ]  # fmt: skip
        kept, dropped = prepare_job.choose(records, drops)
        assert [record[0] for record in kept] == [4, 0]
        assert dropped == [
            {"id": "a", "reason": "broken"},
            {"id": "b", "reason": "duplicate_id"},
            {"id": "c", "reason": "duplicate_bytes", "kept": "b"},
            {"id": "d", "reason": "near_duplicate", "kept": "a"},
        ]
        assert prepare_job.choose(records[::-1], drops[::-1]) == (kept, dropped)

    def test_account(self):
        account(5, 3, {"x": 1, "y": 1})
        with pytest.raises(AssertionError, match="are not the 6"):
            account(6, 3, {"x": 1, "y": 1})

    def test_shards(self):
        counts = np.bincount([shard_of(f"00000/{i:09d}", 8) for i in range(4000)])
        assert counts.min() > 400
        assert shard_of("größe", 1000) == 239  # must not change: restarts depend on it

    def test_units_cover_every_example_once(self):
        units, starts = prepare_job.units_of([5, 0, 3], 2)
        assert starts == [0, 5, 5]
        assert [(u.part, u.start, u.stop) for u in units] == [
            (0, 0, 2), (0, 2, 4), (0, 4, 5), (2, 0, 2), (2, 2, 3),
        ]  # fmt: skip
        assert [u.position for u in units] == [0, 2, 4, 5, 7]


@pytest.fixture
def here(monkeypatch):
    """`prepare` with small defaults and the pipeline in this thread."""

    def run(source, out, before=lambda what, item: None, **fields):
        pipeline = without_beam(before)
        monkeypatch.setitem(sys.modules, "core_jax.data.prepare_pipeline", pipeline)
        monkeypatch.setattr(core_jax.data, "prepare_pipeline", pipeline, raising=False)
        rules = dataclasses.replace(RULES, **fields.pop("rules", {}))
        settings = {"rules": rules, "examples_per_shard": 8, "examples_per_unit": 7, **fields}
        options = Options(**settings)
        return prepare.prepare(SourceSpec(path=str(source)), out, name="raw", options=options)

    prepare_job.open_part.cache_clear()
    prepare_job.load_exclusion.cache_clear()
    return run


def test_everything_ends_in_one_bucket(tmp_path, here):
    want = write_mixture(tmp_path / "tars")
    path, summary, worked = here(tmp_path / "tars", tmp_path / "out")
    assert worked
    assert summary == json.loads((path / "prepare-train.json").read_text())
    assert (summary["input"], summary["kept"]) == (43, 32)
    assert sum(summary["dropped"].values()) == 11
    lines = [
        json.loads(line)
        for file in sorted((path / "prepare-train-dropped").iterdir())
        for line in file.read_text().splitlines()
    ]
    assert {line["id"]: line["reason"] for line in lines} == want
    by_id = {line["id"]: line for line in lines}
    assert by_id["00002/copy"]["kept"] == "00000/0002"
    assert by_id["00002/near"]["kept"] == "00000/0003"
    raw = open_source(SourceSpec(path=str(tmp_path / "tars")))
    raw = {raw[i].id: raw[i] for i in range(len(raw))}
    data = open_source(SourceSpec(path=str(path), kind="tfds"))
    assert len(data) == 32
    for i in range(len(data)):
        example = raw.pop(data[i].id)
        assert (data[i].image, data[i].caption) == (example.image, example.caption)
        assert data[i].extras["prepared"]["sha256"] == hashlib.sha256(example.image).hexdigest()
        assert data[i].extras["pwatermark"] == 0.1
    assert set(raw) == set(want)
    assert not list(path.glob(".*"))


def test_rules_reach_the_data(tmp_path, here):
    write_mixture(tmp_path / "tars", good=4)
    _, summary, _ = here(tmp_path / "tars", tmp_path / "1", rules={"missing_watermark": "keep"})
    assert summary["kept_without_watermark_score"] == 2
    assert "no_watermark_score" not in summary["dropped"]
    _, summary, _ = here(tmp_path / "tars", tmp_path / "2", rules={"near_distance": None})
    assert "near_duplicate" not in summary["dropped"]
    assert summary["dropped"]["duplicate_bytes"] == 1


def test_evaluation_images_are_excluded(tmp_path, here):
    write_mixture(tmp_path / "tars", good=4)
    held_out = tmp_path / "val"
    held_out.mkdir()
    (held_out / "x.jpg").write_bytes(jpeg(0))
    smooth(1).resize((96, 80)).save(held_out / "y.png")
    (tmp_path / "ids").write_text("00000/0002\n", encoding="utf-8")
    (tmp_path / "sha").write_text(hashlib.sha256(jpeg(107)).hexdigest() + "\n")
    files = {
        "exclude_images": str(held_out), "exclude_ids": str(tmp_path / "ids"),
        "exclude_sha256": str(tmp_path / "sha"),
    }  # fmt: skip
    _, summary, _ = here(tmp_path / "tars", tmp_path / "out", **files)
    for key, number in (("excluded_bytes", 2), ("excluded_near", 1), ("excluded_id", 1)):
        assert summary["dropped"][key] == number
    # The first of a pair is excluded by its id, so its copy is no duplicate of anything.
    assert "duplicate_bytes" not in summary["dropped"]
    (tmp_path / "sha").write_text("nonsense\n")
    with pytest.raises(PrepareError, match="'nonsense' is not a sha256"):
        here(tmp_path / "tars", tmp_path / "other", **files)
    (held_out / "z.jpg").write_bytes(b"<html>")
    files["exclude_sha256"] = None
    with pytest.raises(PrepareError, match=r"z\.jpg is unusable"):
        here(tmp_path / "tars", tmp_path / "other", **files)


def test_a_stopped_run_goes_on_and_gives_the_same_bytes(tmp_path, here):
    write_mixture(tmp_path / "tars")
    whole = tree(here(tmp_path / "tars", tmp_path / "whole")[0])
    for stop in ("count", "look", "write"):
        done = []

        def once(what, item, stop=stop, done=done):
            done.append(what)
            if done.count(stop) == 3 and "stopped" not in done:
                done.append("stopped")
                raise KeyboardInterrupt

        out = tmp_path / stop
        with pytest.raises(KeyboardInterrupt):
            here(tmp_path / "tars", out, once)
        with pytest.raises(PrepareError, match=r"part of another(.|\n)*rules: then"):
            here(tmp_path / "tars", out, rules={"side_above": 33})
        path, _, worked = here(tmp_path / "tars", out, once)
        assert worked
        # Each piece is begun once, but for the one that was stopped.
        assert done.count("count") == 3 + (stop == "count")
        assert done.count("look") == 8 + (stop == "look")
        assert tree(path) == whole
    different = tree(here(tmp_path / "tars", tmp_path / "o", examples_per_shard=7)[0])
    assert different != whole


def test_shards_that_are_there_are_not_written_again(tmp_path, here):
    write_mixture(tmp_path / "tars")

    def stop(what, item):
        if (what, item) == ("write", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here(tmp_path / "tars", tmp_path / "out", stop)
    path = tmp_path / "out" / "raw" / "1.0.0"
    files = sorted(path.glob("*.array_record-*"))
    assert len(files) == 2
    (path / ".raw-train.array_record-00003-of-00005.beef.tmp").write_bytes(b"half")
    for name in (".prepare-train.json.beef.tmp", "prepare-train-dropped/.00003.jsonl.beef.tmp"):
        (path / name).write_bytes(b"half")
    before = [file.stat().st_mtime_ns for file in files]
    here(tmp_path / "tars", tmp_path / "out")
    assert [file.stat().st_mtime_ns for file in files] == before
    assert not list(path.glob("**/.*"))


def test_a_shard_that_was_cut_short_is_written_again(tmp_path, here):
    write_mixture(tmp_path / "tars")
    whole = tree(here(tmp_path / "tars", tmp_path / "whole")[0])

    def stop(what, item):
        if (what, item) == ("write", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        here(tmp_path / "tars", tmp_path / "out", stop)
    path = tmp_path / "out" / "raw" / "1.0.0"
    shards = sorted(path.glob("*.array_record-*"))
    os.truncate(shards[0], shards[0].stat().st_size // 2)
    (path / ".prepare-train" / "shards" / "00001.json").write_text('{"kept": 1')
    here(tmp_path / "tars", tmp_path / "out")
    assert tree(path) == whole
    os.truncate(shards[0], shards[0].stat().st_size // 2)  # after all is done
    with pytest.raises(PrepareError, match=r"were written(.|\n)*prepare it again"):
        here(tmp_path / "tars", tmp_path / "out")


def test_done_is_done_and_others_are_refused(tmp_path, here):
    write_mixture(tmp_path / "tars")
    path, summary, _ = here(tmp_path / "tars", tmp_path / "out")
    before = tree(path)

    def never(what, item):
        raise AssertionError("there is nothing to do")

    assert here(tmp_path / "tars", tmp_path / "out", never) == (path, summary, False)
    assert tree(path) == before
    with pytest.raises(PrepareError, match=r"other options(.|\n)*shard: then 8, now 9"):
        here(tmp_path / "tars", tmp_path / "out", examples_per_shard=9)
    write_tar(tmp_path / "tars" / "00003.tar", [("a", jpeg(300), CLEAN)])
    with pytest.raises(PrepareError, match="files: then"):
        here(tmp_path / "tars", tmp_path / "out")
    assert tree(path) == before


def test_broken_files(tmp_path, here):
    write_mixture(tmp_path / "tars", good=4)
    (tmp_path / "tars" / "00003.tar").write_bytes(b"no tar at all" * 100)
    whole = (tmp_path / "tars" / "00000.tar").read_bytes()
    (tmp_path / "tars" / "00004.tar").write_bytes(whole[:1500])
    write_tar(tmp_path / "tars" / "00005.tar", [])
    with pytest.raises(PrepareError, match=r"2 of 6 files(.|\n)*00003(.|\n)*00004(.|\n)*--skip"):
        here(tmp_path / "tars", tmp_path / "out")
    _, summary, _ = here(tmp_path / "tars", tmp_path / "out", skip_unreadable=True)
    assert summary["unreadable_files"] == ["00003.tar", "00004.tar"]
    assert summary["input"] == 17


def test_nothing_to_keep(tmp_path, here):
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    with pytest.raises(PrepareError, match=r"no_watermark_score(.|\n)*--missing-watermark=keep"):
        here(tmp_path, tmp_path / "out")
    _, summary, _ = here(tmp_path, tmp_path / "out", rules={"watermark_below": None})
    assert summary["kept"] == 3
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="no image"):
        here(tmp_path / "nothing", tmp_path / "out2")


def test_a_source_that_changes_meanwhile(tmp_path, here):
    write_mixture(tmp_path / "tars", good=4)

    def change(what, item):
        if what == "write" and item == 0:
            prepare_job.open_part.cache_clear()
            write_tar(
                tmp_path / "tars" / "00000.tar",
                [(f"{i:04d}", jpeg(i + 50), CLEAN) for i in range(4)],
            )

    with pytest.raises(PrepareError, match="has changed since"):
        here(tmp_path / "tars", tmp_path / "out", change)


def test_names_that_are_not_unicode_and_ids_that_repeat(tmp_path, here):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_tar(tmp_path / "a.tar", [("x\udce9", jpeg(0), CLEAN), ("x\udcea", jpeg(1), CLEAN)])
    path, _, _ = here(tmp_path / "a.tar", tmp_path / "out")
    data = open_source(SourceSpec(path=str(path)))
    assert sorted(data[i].id for i in range(2)) == ["a/x\\xe9", "a/x\\xea"]
    rows = {"image": [jpeg(i) for i in range(4)], "key": ["p", "q", "p", "r"]}
    pq.write_table(pa.table(rows), tmp_path / "b.parquet")
    spec = SourceSpec(path=str(tmp_path / "b.parquet"), id_key="key")
    options = Options(rules=dataclasses.replace(RULES, watermark_below=None))
    path, summary, _ = prepare.prepare(spec, tmp_path / "out", name="b", options=options)
    assert summary["dropped"] == {"duplicate_id": 1}
    data = open_source(SourceSpec(path=str(path)))
    assert {data[i].id: data[i].image for i in range(3)}["p"] == jpeg(0)


def test_command_without_beam(tmp_path, monkeypatch, capsys):
    write_mixture(tmp_path / "tars", good=2)
    argv = ["--from", str(tmp_path / "tars"), "--out", str(tmp_path / "out"), "--side-above", "32"]
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.delitem(sys.modules, "core_jax.data.prepare_pipeline", raising=False)
    monkeypatch.delattr(core_jax.data, "prepare_pipeline", raising=False)
    assert prepare.main(argv) == 2
    assert "pip install '.[beam]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    pipeline = without_beam()
    monkeypatch.setattr(core_jax.data, "prepare_pipeline", pipeline, raising=False)
    monkeypatch.setitem(sys.modules, "core_jax.data.prepare_pipeline", pipeline)
    assert prepare.main([*argv, "--", "--project=x"]) == 0
    out = capsys.readouterr().out
    assert "of 15 examples in 1 shards" in out
    assert "dropped 2: no_watermark_score" in out
    assert prepare.main(argv) == 0
    assert "done already, nothing to do" in capsys.readouterr().out
    assert prepare.main([*argv, "--max-aspect", "3"]) == 2
    assert "rules: then" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        prepare.main([*argv, "--max-aspekt", "3"])


def test_progress(tmp_path, capsys):
    with prepare._progress(tmp_path, 4, "units", every=0.01):
        time.sleep(0.05)
        (tmp_path / ".half.tmp").touch()
        (tmp_path / "1").touch()
        time.sleep(0.1)
    text = capsys.readouterr().err
    assert "0 of 4 units, 0 s\n" in text
    assert "1 of 4 units, 0 s, 0 s left\n" in text
    assert "2 of 4" not in text


def test_no_module_but_the_pipeline_imports_beam():
    code = (
        "import sys; import core_jax.data.prepare, core_jax.data.prepare_job; "
        "assert 'apache_beam' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
