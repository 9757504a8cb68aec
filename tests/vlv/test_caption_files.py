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
from core_jax.data.images import BadImage
from core_jax.data.sources import SourceError
from core_jax.resumed_output import shard_path
from vlv_jax.batches import sample_index
from vlv_jax.caption_files import (
    all_records,
    list_items,
    read_records,
    sidecar_paths,
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


def test_tars_in_and_beside_folders(photos):
    write_tar(photos / "000.tar", ["0001", "0002"])
    items = list_items([str(photos / "000.tar"), str(photos)])
    assert len(items) == 2 + 3  # the tar is taken once
    assert items[0].id == f"{photos}/000.tar/0001"
    assert items[0].place == {"file_name": f"{photos}/000.tar", "member": "0001"}
    assert items[0].path is None
    assert items[0].example().encoded_image()[:4] == b"\x89PNG"


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
    (photos / kind).write_text(content)
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
    picture(tmp_path / "two.jpg.png")  # whose own text would be two.jpg.txt
    names = [p.name for p in sidecar_paths(list_items([str(tmp_path)])).values()]
    assert sorted(names) == ["one.txt", "two.jpg.png.txt", "two.jpg.txt", "two.png.txt"]
    for name in names:
        (tmp_path / name).write_text(f"of {name}")
    source = FolderSource(tmp_path, caption_suffix=".txt")
    read = [source[i].caption for i in range(len(source))]
    assert sorted(read) == sorted(f"of {name}" for name in names)


def test_names_that_are_no_utf_8_stay_different(tmp_path):
    for byte in (b"\xe9", b"\xe8"):
        picture(tmp_path / os.fsdecode(b"caf" + byte + b".png"))
    items = list_items([str(tmp_path)])
    assert len({item.id for item in items}) == 2
    assert all(r"caf\xe" in item.id for item in items)
    json.dumps([dict(item.place) for item in items], ensure_ascii=False).encode()
    assert all(item.example().encoded_image() for item in items)
    source = FolderSource(tmp_path)
    assert len({int(sample_index(source[i].id)) for i in range(2)}) == 2


def test_linked_folders_are_searched_and_circles_end(photos, tmp_path):
    picture(tmp_path / "other" / "z.png")
    (photos / "link").symlink_to(tmp_path / "other")
    (photos / "a" / "circle").symlink_to(photos)
    names = [item.path.name for item in list_items([str(photos)])]
    assert sorted(names) == ["b.png", "x.jpg", "y.PNG", "z.png"]


def test_a_broken_tar_is_one_item_that_cannot_be_used(photos):
    write_tar(photos / "0.tar", ["a"])
    whole = write_tar(photos / "1.tar", ["a", "b"])
    whole.write_bytes(whole.read_bytes()[:900])
    write_tar(photos / "2.tar", [])
    items = list_items([str(photos)])
    names = [f"{photos}/{name}" for name in ("0.tar/a", "1.tar", "2.tar")]
    assert [item.id for item in items[3:]] == names
    assert items[3].example().encoded_image()
    for item, reason in ((items[4], "broken"), (items[5], "no_image")):
        with pytest.raises(BadImage, match=reason):
            item.example()


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
    assert shard_path(out, 2, 3).name == "c-00002-of-00003.jsonl"
