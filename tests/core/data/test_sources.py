import io
import json
import os
import pickle
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from core_jax.data.check import check_source, format_report
from core_jax.data.images import BadImage, ImageLimits, Reason
from core_jax.data.sources import (
    EmptySourceError,
    SourceError,
    SourceSpec,
    checked_relative,
    open_source,
)
from tests.core.data.image_files import encode, noise

LIMITS = ImageLimits()
PNG = [encode(noise(i, 33, 40)) for i in range(4)]


def open_kind(kind, path, **fields):
    return open_source(SourceSpec(kind=kind, path=str(path), **fields))


def contents(source):
    again = pickle.loads(pickle.dumps(source))
    assert len(again) == len(source)
    found = []
    for i in reversed(range(len(source))):  # random access: any order
        example, other = source[i], again[i]
        assert example == other
        found.append((example.id, example.encoded_image(LIMITS), example.caption))
    return found[::-1]


def write_images(folder, names):
    for name, data in zip(names, PNG, strict=False):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


class TestFolder:
    names = ("a.png", "b/c.PNG", "b/d/e.jpg")

    def test_recursive_and_sorted(self, tmp_path):
        write_images(tmp_path, self.names)
        (tmp_path / "notes.md").write_text("no image")
        (tmp_path / ".hidden.png").write_bytes(PNG[0])
        want = [(name, data, None) for name, data in zip(self.names, PNG, strict=False)]
        assert contents(open_kind("folder", tmp_path)) == want
        assert contents(open_kind("auto", tmp_path)) == want
        assert contents(open_kind("auto", tmp_path / "a.png")) == want[:1]

    @pytest.mark.parametrize("keys", [("file_name", "caption"), ("image", "text")])
    def test_jsonl_captions(self, tmp_path, keys):
        write_images(tmp_path / "img", self.names)
        lines = [
            {keys[0]: self.names[2], keys[1]: "drei", "score": 0.5},
            {keys[0]: self.names[0], keys[1]: "eins é"},
            {keys[0]: self.names[0], keys[1]: "eins again"},
            {keys[0]: str(tmp_path / "img" / "b" / "c.PNG"), "id": "named"},
        ]
        manifest = tmp_path / "captions.jsonl"
        manifest.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
        source = open_kind("folder", tmp_path / "img", manifest=str(manifest))
        assert contents(source) == [
            ("b/d/e.jpg", PNG[2], "drei"),
            ("a.png", PNG[0], "eins é"),
            ("a.png#2", PNG[0], "eins again"),
            ("named", PNG[1], None),
        ]
        assert source[0].extras == {"score": 0.5}
        source = open_kind("auto", manifest, images=str(tmp_path / "img"))
        assert len(source) == 4

    def test_metadata_jsonl_is_found(self, tmp_path):
        write_images(tmp_path, self.names)
        (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n')
        assert contents(open_kind("folder", tmp_path)) == [("a.png", PNG[0], "x")]

    def test_json_list(self, tmp_path):
        write_images(tmp_path, self.names)
        (tmp_path / "ids.json").write_text(json.dumps([self.names[1], {"image": self.names[0]}]))
        got = contents(open_kind("folder", tmp_path, manifest=str(tmp_path / "ids.json")))
        assert got == [("b/c.PNG", PNG[1], None), ("a.png", PNG[0], None)]

    def test_captions_beside_images(self, tmp_path):
        write_images(tmp_path, self.names)
        (tmp_path / "b/c.txt").write_text(" beside \n")
        got = contents(open_kind("folder", tmp_path, caption_suffix=".txt"))
        assert [caption for _, _, caption in got] == [None, "beside", None]

    def test_a_listed_file_that_is_not_there_is_a_bad_image(self, tmp_path):
        (tmp_path / "l.json").write_text('["gone.png"]')
        source = open_kind("folder", tmp_path, manifest=str(tmp_path / "l.json"))
        with pytest.raises(BadImage, match="missing_file"):
            source[0].encoded_image(LIMITS)

    @pytest.mark.parametrize(
        "entry", ["../x.png", "/etc/x.png", "a/../../x.png", "", 3, "a\0b", {"caption": "x"}]
    )
    def test_manifest_paths_stay_inside(self, tmp_path, entry):
        (tmp_path / "l.json").write_text(json.dumps(["fine.png", entry]))
        with pytest.raises(SourceError, match="1 bad entries"):
            open_kind("folder", tmp_path, manifest=str(tmp_path / "l.json"))

    def test_links_that_lead_out_are_refused(self, tmp_path):
        write_images(tmp_path / "out", ("secret.png",))
        write_images(tmp_path / "in", self.names[:1])
        os.symlink(tmp_path / "out/secret.png", tmp_path / "in/link.png")
        os.symlink(tmp_path / "in/a.png", tmp_path / "in/z.png")
        os.symlink(tmp_path / "out", tmp_path / "in/folder")
        source = open_kind("folder", tmp_path / "in")
        assert [source[i].id for i in range(3)] == ["a.png", "link.png", "z.png"]
        assert source[2].encoded_image(LIMITS) == PNG[0]
        with pytest.raises(BadImage) as caught:
            source[1].encoded_image(LIMITS)
        assert caught.value.reason == Reason.OUTSIDE_ROOT
        source = open_kind("folder", tmp_path / "in", follow_symlinks=True)
        assert len(contents(source)) == 4

    def test_errors_name_file_and_line(self, tmp_path):
        (tmp_path / "l.jsonl").write_text('{"image": "a.png"}\nnot json\n')
        with pytest.raises(SourceError, match=r"l\.jsonl:2: not valid JSON"):
            open_kind("folder", tmp_path, manifest=str(tmp_path / "l.jsonl"))
        (tmp_path / "l.json").write_text('{"a": 1}')
        with pytest.raises(SourceError, match="is a list, not dict"):
            open_kind("folder", tmp_path, manifest=str(tmp_path / "l.json"))
        with pytest.raises(SourceError, match="no image"):
            open_kind("folder", tmp_path)
        with pytest.raises(SourceError, match="no such"):
            open_kind("folder", tmp_path / "none")


class TestParquet:
    def write(self, path, images, row_group_size=2, **columns):
        pq.write_table(pa.table({"image": images, **columns}), path, row_group_size=row_group_size)

    def test_bytes(self, tmp_path):
        self.write(tmp_path / "a.parquet", PNG[:3], caption=["x", None, "z"], n=[1, 2, 3])
        self.write(tmp_path / "b.parquet", PNG[3:], caption=["w"], n=[4])
        source = open_kind("auto", tmp_path)
        assert contents(source) == [
            ("a.parquet#0", PNG[0], "x"),
            ("a.parquet#1", PNG[1], None),
            ("a.parquet#2", PNG[2], "z"),
            ("b.parquet#0", PNG[3], "w"),
        ]
        assert source[3].extras == {"n": 4}
        with pytest.raises(IndexError):
            source[4]

    def test_hub_struct_and_paths(self, tmp_path):
        write_images(tmp_path / "img", ("a.png", "b.png"))
        structs = [{"bytes": PNG[2], "path": "x"}, {"bytes": None, "path": "b.png"}]
        self.write(tmp_path / "s.parquet", structs, text=["s", "t"], key=["k1", "k2"])
        source = open_kind(
            "parquet", tmp_path / "s.parquet", images=str(tmp_path / "img"), id_key="key"
        )
        assert contents(source) == [("k1", PNG[2], "s"), ("k2", PNG[1], "t")]
        self.write(tmp_path / "p.parquet", ["a.png", "../s.parquet"])
        source = open_kind("parquet", tmp_path / "p.parquet", images=str(tmp_path / "img"))
        assert source[0].encoded_image(LIMITS) == PNG[0]
        assert source[0].caption is None
        with pytest.raises(SourceError, match=r"p\.parquet#1.*leads out"):
            source[1]

    def test_no_row(self, tmp_path):
        self.write(tmp_path / "a.parquet", pa.array([], pa.binary()))
        with pytest.raises(EmptySourceError, match=r"without an example: path=.*a\.parquet"):
            open_kind("auto", tmp_path / "a.parquet")
        self.write(tmp_path / "b.parquet", PNG[:1])  # an empty file beside others is no harm
        assert contents(open_kind("auto", tmp_path)) == [("b.parquet#0", PNG[0], None)]

    def test_null_image_is_a_bad_image(self, tmp_path):
        self.write(tmp_path / "a.parquet", pa.array([None], pa.binary()))
        with pytest.raises(BadImage, match="no_image"):
            open_kind("parquet", tmp_path)[0].encoded_image(LIMITS)

    def test_errors(self, tmp_path):
        self.write(tmp_path / "a.parquet", PNG[:1], caption=["x"])
        with pytest.raises(SourceError, match=r"no column \['pixels'\]; it has \['caption', 'ima"):
            open_kind("parquet", tmp_path, image_key="pixels")
        (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing")
        with pytest.raises(SourceError, match=r"a\.parquet: not a readable"):
            open_kind("parquet", tmp_path)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


class TestWebdataset:
    def shards(self, folder):
        folder.mkdir(exist_ok=True)
        write_tar(
            folder / "00000.tar",
            {
                "000000000.jpg": PNG[0],
                "000000000.json": b'{"caption": "j0", "width": 40}',
                "000000000.txt": b"t0\n",
                "000000001.json": b'{"caption": "j1"}',
                "000000001.jpg": PNG[1],
            },
        )
        write_tar(
            folder / "00001.tar", {"sub/x.seg.png": b"no", "sub/x.png": PNG[2], "y.txt": b"alone"}
        )
        return folder

    def test_samples(self, tmp_path):
        source = open_kind("auto", self.shards(tmp_path))
        want = [
            ("00000/000000000", PNG[0], "t0"),
            ("00000/000000001", PNG[1], "j1"),
            ("00001/sub/x", PNG[2], None),
        ]
        assert len(source) == 4
        assert [(s.id, s.image, s.caption) for s in (source[0], source[1], source[2])] == want
        assert source[0].extras == {"caption": "j0", "width": 40}
        assert (source[3].image, source[3].caption) == (None, "alone")
        assert pickle.loads(pickle.dumps(source))[2] == source[2]
        with pytest.raises(BadImage, match="no_image"):
            source[3].encoded_image(LIMITS)
        assert len(open_kind("auto", tmp_path / "00000.tar")) == 2

    def test_names_of_plain_tars(self, tmp_path):
        names = ("IMG_2020.01.05.jpg", "photo.v1.png", "photo.v2.png", "a.jpg", "a.png", "ok.png")
        members = {name: name.encode() for name in names}
        texts = {"a.txt": b"of a", "photo.v2.txt": b"second", "ok.seg.png": b"", "b.v1.txt": b""}
        write_tar(tmp_path / "t.tar", texts | members)
        source = open_kind("auto", tmp_path)
        found = {e.id: (e.image.decode(), e.caption) for e in (source[i] for i in range(6))}
        assert found == {
            "t/IMG_2020.01.05": ("IMG_2020.01.05.jpg", None),
            "t/photo.v1": ("photo.v1.png", None),
            "t/photo.v2": ("photo.v2.png", "second"),
            "t/a": ("a.jpg", "of a"),
            "t/a.png": ("a.png", "of a"),
            "t/ok": ("ok.png", None),
        }
        assert (len(source), source.left_out) == (6, 1)
        again = open_kind("auto", tmp_path)
        assert again.left_out == 1  # from the stored index, too
        report = check_source(again, header_only=True)
        assert "left out       1 images" in format_report(report)

    def test_one_member_twice(self, tmp_path):
        with tarfile.open(tmp_path / "t.tar", "w") as tar:
            for data in (b"1", b"2", b"3"):
                info = tarfile.TarInfo("x/a.png")
                info.size = 1
                tar.addfile(info, io.BytesIO(data))
        found = contents(open_kind("auto", tmp_path))
        want = [("t/x/a", b"1"), ("t/x/a.png", b"2"), ("t/x/a.png#2", b"3")]
        assert [f[:2] for f in found] == want

    def test_index_is_built_once_and_follows_the_tar(self, tmp_path, monkeypatch):
        from core_jax.data import webdataset

        folder, cache = self.shards(tmp_path / "tars"), tmp_path / "cache"
        scans, scan = [], webdataset.scan_tar
        monkeypatch.setattr(webdataset, "scan_tar", lambda f: scans.append(f.name) or scan(f))
        for _ in range(2):
            source = open_kind("webdataset", folder, cache_dir=str(cache))
            assert source[2].image == PNG[2]
        assert scans == ["00000.tar", "00001.tar"]
        assert not list(folder.glob("*.npz"))
        write_tar(folder / "00001.tar", {"new.png": PNG[3]})
        assert open_kind("webdataset", folder, cache_dir=str(cache))[2].image == PNG[3]
        assert scans[2:] == ["00001.tar"]
        for index in cache.glob("*.npz"):
            index.write_bytes(b"damaged")
        assert len(open_kind("webdataset", folder, cache_dir=str(cache))) == 3

    def test_no_place_for_the_index(self, tmp_path):
        (tmp_path / "file").write_text("")
        folder = self.shards(tmp_path / "tars")
        source = open_kind("webdataset", folder, cache_dir=str(tmp_path / "file" / "cache"))
        assert len(source) == 4

    def test_broken_tars_are_all_named(self, tmp_path):
        folder = self.shards(tmp_path)
        data = (folder / "00000.tar").read_bytes()
        (folder / "00002.tar").write_bytes(data[: len(PNG[0]) // 2 + 512])
        (folder / "00003.tar").write_bytes(b"html" * 300)
        with pytest.raises(SourceError, match=r"(?s)again.*00002\.tar.*00003\.tar"):
            open_kind("webdataset", folder)

    def test_links_in_a_tar_are_ignored(self, tmp_path):
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            link = tarfile.TarInfo("evil.png")
            link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(link)
            info = tarfile.TarInfo("b.png")
            info.size = len(PNG[0])
            tar.addfile(info, io.BytesIO(PNG[0]))
        assert [e[0] for e in contents(open_kind("webdataset", tmp_path))] == ["a/b"]


class TestCoco:
    def write(self, root):
        images = root / "val2014"
        write_images(images, ("COCO_1.jpg", "COCO_2.jpg", "COCO_3.jpg"))
        notes = [(12, 1, "one b"), (11, 1, " one a\n"), (13, 2, "two")]
        parsed = {
            "info": {},
            "images": [
                {"id": i, "file_name": f"COCO_{i}.jpg", "width": 40, "height": 33}
                for i in (2, 1, 3)
            ],
            "annotations": [{"id": a, "image_id": b, "caption": c} for a, b, c in notes],
        }
        file = root / "annotations" / "captions_val2014.json"
        file.parent.mkdir()
        file.write_text(json.dumps(parsed))
        return file

    def test_all_and_first(self, tmp_path):
        file = self.write(tmp_path)
        everything = open_kind("coco", tmp_path)
        assert contents(everything) == [
            ("1#11", PNG[0], "one a"),
            ("1#12", PNG[0], "one b"),
            ("2#13", PNG[1], "two"),
            ("3", PNG[2], None),
        ]
        first = open_kind("auto", file, captions="first")
        assert [(e[0], e[2]) for e in contents(first)] == [
            ("1", "one a"),
            ("2", "two"),
            ("3", None),
        ]
        assert first[0].extras["captions"] == ["one a", "one b"]
        assert first[0].extras["width"] == 40
        moved = open_kind("coco", file, images=str(tmp_path / "val2014"), captions="first")
        assert contents(moved) == contents(first)

    def test_errors(self, tmp_path):
        file = self.write(tmp_path)
        with pytest.raises(SourceError, match="'all' or 'first'"):
            open_kind("coco", file, captions="some")
        with pytest.raises(SourceError, match="give `images`"):
            open_kind("coco", file, images=str(tmp_path / "none"))
        file.write_text('{"images": [{"id": 1, "file_name": "../x.jpg"}], "annotations": []}')
        with pytest.raises(SourceError, match="leads out"):
            open_kind("coco", file)
        file.write_text("[]")
        with pytest.raises(SourceError, match="'annotations'"):
            open_kind("coco", file)


class TestSpec:
    def test_unknown_kind_lists_the_kinds(self):
        with pytest.raises(SourceError, match=r"'lmdb'.*'coco', 'folder', 'llava', 'parquet"):
            open_source(SourceSpec(kind="lmdb", path="x"))

    def test_unused_fields_are_refused(self):
        with pytest.raises(SourceError, match=r"no use for \['split'\]"):
            open_source(SourceSpec(kind="folder", path="x", split="train"))

    def test_nothing_to_open(self, tmp_path):
        with pytest.raises(SourceError, match="needs `path`"):
            open_source(SourceSpec(kind="folder"))
        with pytest.raises(SourceError, match="no such file"):
            open_source(SourceSpec(path=str(tmp_path / "none")))
        (tmp_path / "x.bin").write_bytes(b"")
        with pytest.raises(SourceError, match="cannot tell"):
            open_source(SourceSpec(path=str(tmp_path / "x.bin")))

    def test_relative_paths(self, tmp_path):
        assert checked_relative("a/./b/../c.png", tmp_path, "x") == "a/c.png"
        assert checked_relative(str(tmp_path / "a.png"), tmp_path, "x") == "a.png"
        with pytest.raises(SourceError, match=r"x: .*outside"):
            checked_relative(str(tmp_path) + "2/a.png", tmp_path, "x")
