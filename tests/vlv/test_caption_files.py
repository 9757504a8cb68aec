"""Inputs of the caption command, and an output that survives kills."""

import io
import json
import os
import pathlib
import tarfile

import numpy as np
import pytest
from PIL import Image

from core_jax.data.folder import FolderSource
from core_jax.data.sources import SourceError
from core_jax.resumed_output import shard_path, write_settings
from vlv_jax.batches import sample_index
from vlv_jax.caption_files import list_items, sidecar_paths
from vlv_jax.caption_output import (
    all_records,
    check_settings,
    finish_replacement,
    partial_path,
    read_records,
    recover_replacements,
)


def picture(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_tar(path, names):
    with tarfile.open(path, "w") as tar:
        for name in names:
            buffer = io.BytesIO()
            Image.new("RGB", (40, 40), (5, 90, 7)).save(buffer, "PNG")
            member = tarfile.TarInfo(f"{name}.png")
            member.size = buffer.tell()
            tar.addfile(member, io.BytesIO(buffer.getvalue()))
    return path


@pytest.fixture
def photos(tmp_path):
    for name in ("b.png", "a/x.jpg", "a/deep/y.PNG", ".hidden.png"):
        picture(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.md").write_text("no image")
    return tmp_path / "photos"


def test_folders_are_searched_recursively(photos):
    items = list_items([str(photos)])
    assert [i.id for i in items] == [f"{photos}/{n}" for n in ("a/deep/y.PNG", "a/x.jpg", "b.png")]
    assert items[0].place == {"file_name": f"{photos}/a/deep/y.PNG"}
    assert items[1].example().encoded_image() == (photos / "a/x.jpg").read_bytes()


def test_linked_folders_are_searched_once(photos, tmp_path, caplog):
    picture(tmp_path / "other" / "z.png")
    (photos / "0-linked").symlink_to(tmp_path / "other")
    (photos / "0-same").symlink_to(photos / "a")  # found under its own name
    (photos / "a" / "circle").symlink_to(photos)
    names = ("0-linked/z.png", "a/deep/y.PNG", "a/x.jpg", "b.png")
    assert [i.id for i in list_items([str(photos)])] == [f"{photos}/{n}" for n in names]
    linked = FolderSource(photos, follow_symlinks=True)
    assert [linked[i].id for i in range(len(linked))] == list(names)
    assert not caplog.text
    assert len(FolderSource(photos)) == 3
    assert "3 linked folders are left out" in caplog.text


def test_home_is_expanded(photos, monkeypatch):
    monkeypatch.setenv("HOME", str(photos.parent))
    assert list_items(["~/photos"])[0].path == photos / "a/deep/y.PNG"


def test_tars_in_and_beside_folders(photos):
    write_tar(photos / "000.tar", ["0001", "0002"])
    items = list_items([str(photos / "000.tar"), str(photos)])
    assert len(items) == 2 + 3  # the tar is taken once
    assert items[0].id == f"{photos}/000.tar/0001"
    assert items[0].place == {"file_name": f"{photos}/000.tar", "member": "0001"}
    assert items[0].path is None
    assert items[0].example().encoded_image()[:4] == b"\x89PNG"


def test_nothing_but_broken_tars(tmp_path):
    for name in ("a.tar", "b.tar"):
        (tmp_path / name).write_bytes(b"html" * 300)
    with pytest.raises(SourceError, match=r"(?s)again.*a\.tar.*b\.tar"):
        list_items([str(tmp_path)])


@pytest.mark.parametrize("kind", ["list.jsonl", "list.json", "list.txt"])
def test_manifests(photos, tmp_path, kind):
    elsewhere = picture(tmp_path / "other" / "z.png")
    paths = ["b.png", "a/x.jpg", str(elsewhere), "gone.png"]
    records = [{"file_name": p, "id": f"n{i}"} for i, p in enumerate(paths)]
    content = {
        "list.jsonl": "\n".join(json.dumps(r) for r in records),
        "list.json": json.dumps([paths[0], *records[1:]]),
        "list.txt": "\n".join(paths) + "\n\n",
    }[kind]
    (photos / kind).write_text(content, encoding="utf-8-sig")  # as some editors write it
    items = list_items([str(photos / kind)])
    files = [i.path for i in items]
    assert files == [photos / "b.png", photos / "a/x.jpg", elsewhere, photos / "gone.png"]
    expected = {"list.jsonl": "n2", "list.json": "n2", "list.txt": str(elsewhere)}[kind]
    assert items[2].id == expected


def test_one_file_is_taken_once_and_ids_are_unique(photos, tmp_path):
    again = pathlib.Path(tmp_path / "m.jsonl")
    again.write_text(
        "".join(json.dumps({"file": f"photos/{n}", "id": 7}) + "\n" for n in ("b.png", "a/x.jpg"))
    )
    items = list_items([str(photos / "b.png"), str(photos), str(again)])
    assert len(items) == 3
    assert [i.id for i in list_items([str(again)])] == ["7", "7#2"]


def test_names_that_are_not_utf8_are_found_again(tmp_path):
    raw = os.fsdecode(b"caf\xe9.png")
    picture(tmp_path / "photos" / raw)
    (item,) = list_items([str(tmp_path / "photos")])
    line = json.dumps({"id": item.id, **item.place}, ensure_ascii=False)
    assert line.encode().decode() == line  # strict UTF-8
    assert sidecar_paths([item]) == {item.id: tmp_path / "photos" / os.fsdecode(b"caf\xe9.txt")}
    (tmp_path / "m.jsonl").write_text(line)
    (again,) = list_items([str(tmp_path / "m.jsonl")])
    assert again.id == item.id
    assert again.path == tmp_path / "photos" / raw
    literal = picture(tmp_path / "photos" / r"caf\udce9.png")  # the very name stays another image
    assert len({i.id for i in list_items([str(tmp_path / "photos")])}) == 2
    source = FolderSource(tmp_path / "photos")
    assert sorted(source[i].id for i in range(2)) == [r"caf\udce9.png", r"caf\udce9.png#2"]
    assert len({int(sample_index(source[i].id)) for i in range(2)}) == 2
    assert list_items([str(tmp_path / "m.jsonl")])[0].path == literal


def test_inputs_that_cannot_be_used(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.json").write_text('{"a": 1}')
    (tmp_path / "bad.jsonl").write_text('{"caption": "no path"}\n')
    (tmp_path / "blob.bin").write_bytes(b"\xff\xfe\x00\xd8")
    for name, message in (
        ("nowhere", "no such file"), ("empty", "no image"), ("bad.json", "list"),
        ("bad.jsonl", "file_name"), ("blob.bin", "neither an image"),
    ):  # fmt: skip
        with pytest.raises(SourceError, match=message):
            list_items([str(photos), str(tmp_path / name)])


def test_texts_beside_images_never_collide(tmp_path):
    for name in ("one.png", "two.png", "two.jpg"):
        picture(tmp_path / name)
    write_tar(tmp_path / "t.tar", ["0"])
    paths = sidecar_paths(list_items([str(tmp_path)]))
    assert sorted(p.name for p in paths.values()) == ["one.txt", "two.jpg.txt", "two.png.txt"]


def test_texts_beside_images_are_read_back(tmp_path):
    names = ("a.jpg", "a.png", "a.jpg.png", "b.jpg", "c.v1.PNG", "D.png", "d.jpg")
    for name in names:
        picture(tmp_path / name)
    paths = sidecar_paths(list_items([str(tmp_path)]))
    assert len({path.name.lower() for path in paths.values()}) == len(names)
    assert paths[f"{tmp_path}/b.jpg"].name == "b.txt"
    for name in names:  # whatever else is captioned
        (item,) = list_items([str(tmp_path / name)])
        assert sidecar_paths([item])[item.id] == paths[item.id]
    for name in names[1:]:
        paths[f"{tmp_path}/{name}"].write_text(name)
    source = FolderSource(tmp_path, caption_suffix=".txt")
    found = {e.id: e.caption for e in (source[i] for i in range(len(source)))}
    assert found == {"a.jpg": None} | {name: name for name in names[1:]}
    paths[f"{tmp_path}/a.jpg"].write_text("first")
    paths[f"{tmp_path}/a.jpg.png"].unlink()
    found = {e.id: e.caption for e in (source[i] for i in range(len(source)))}
    assert (found["a.jpg"], found["a.jpg.png"]) == ("first", None)


def test_a_torn_last_line_is_cut_off(tmp_path):
    out = tmp_path / "o.jsonl"
    whole = json.dumps({"id": "a", "caption": "ä cat"}, ensure_ascii=False) + "\n"
    torn = json.dumps({"id": "b", "caption": "ä dog"}, ensure_ascii=False).encode()
    for cut in (1, 20, len(torn)):
        out.write_bytes(whole.encode() + torn[:cut])
        assert list(read_records(out)) == ["a"]
        assert out.stat().st_size > len(whole.encode())  # reading alone changes nothing
        assert list(read_records(out, repair=True)) == ["a"]
        assert out.read_text() == whole


def test_another_file_is_not_taken_for_an_output(tmp_path):
    out = tmp_path / "notes.jsonl"
    out.write_text('{"name": 1}\n{"id": "a"}\n')
    with pytest.raises(SourceError, match=r"notes.jsonl:1.*--output"):
        read_records(out, repair=True)
    assert len(out.read_text()) == 24


def test_processes_write_their_own_files_and_see_all(tmp_path):
    out = tmp_path / "c.jsonl"
    assert shard_path(out, 0, 1) == out
    for i in range(3):
        shard_path(out, i, 3).write_text(json.dumps({"id": str(i)}) + "\n")
    out.write_text('{"id": "old"}\n{"id": "torn')
    assert set(all_records(out)) == {"0", "1", "2", "old"}
    out.write_text('{"id": "2", "error": "broken"}\n')
    assert "error" not in all_records(out)["2"]
    assert shard_path(out, 2, 3).name == "c-00002-of-00003.jsonl"


def write_records(file, *ids):
    file.write_text("".join(json.dumps({"id": i, "caption": "x"}) + "\n" for i in ids))


def begun(out, seed, count):
    """Captions of some processes with some seed."""
    for index in range(count):
        write_records(shard_path(out, index, count), f"{seed}-{index}")
        write_settings(shard_path(out, index, count), {"seed": seed})


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_settings_follow_the_captions_of_a_killed_replacement(tmp_path, monkeypatch, moves):
    """Killed before the captions are moved, between the two moves, and after them."""
    out = tmp_path / "c.jsonl"
    begun(out, 1, 1)
    write_records(partial_path(out, "f"), "new")
    real, left = os.replace, iter(range(moves + 1))

    def killed(source, target):
        if not source.name.endswith(".tmp") and next(left) == moves:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "replace", killed)
    if moves < 2:
        with pytest.raises(KeyboardInterrupt):
            finish_replacement(out, "f", 0, 1, {"seed": 2})
    else:
        finish_replacement(out, "f", 0, 1, {"seed": 2})
    monkeypatch.undo()
    recover_replacements(out)
    made_with = 2 if "new" in read_records(out) else 1
    assert made_with == (2 if moves else 1)
    check_settings(out, {"seed": made_with})
    with pytest.raises(SourceError, match="seed was"):
        check_settings(out, {"seed": 3 - made_with})


def test_a_replacement_removes_what_other_numbers_of_processes_wrote(tmp_path):
    out = tmp_path / "c.jsonl"
    begun(out, 1, 1)
    begun(out, 1, 3)
    for index in (1, 0):
        write_records(partial_path(shard_path(out, index, 2), "f"), f"new-{index}")
        assert {"1-0", "1-2"} <= set(all_records(out))  # until all of them are whole
        finish_replacement(out, "f", index, 2, {"seed": 2})
    assert set(all_records(out)) == {"new-0", "new-1"}
    check_settings(out, {"seed": 2})
    assert len(list(tmp_path.iterdir())) == 4


def test_all_processes_captions_have_one_setting(tmp_path):
    out = tmp_path / "c.jsonl"
    begun(out, 1, 2)
    write_settings(shard_path(out, 1, 2), {"seed": 2})
    for seed in (1, 2):
        with pytest.raises(SourceError, match=r"-0000\d-of-00002\.jsonl was begun with other"):
            check_settings(out, {"seed": seed})
