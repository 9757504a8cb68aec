import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from core_jax.data import check, convert
from core_jax.data.bad import DataPolicy
from core_jax.data.convert import ConvertError, convert_source
from core_jax.data.images import ImageLimits, Reason, decode_image
from core_jax.data.pipeline import image_transform, make_batches
from core_jax.data.resize import CropSpec
from core_jax.data.sources import Example, SourceError, SourceSpec, open_source
from tests.core.data.image_files import encode, noise

tfds = pytest.importorskip("tensorflow_datasets")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
LIMITS = ImageLimits()


class Memory:
    def __init__(self, n=13, bad=()):
        self.examples = []
        for i in range(n):
            data = encode(noise(i, 40, 48), FORMATS[i % 6])
            data = data[: len(data) // 2] if i in bad else data
            extras = {"n": np.int64(i), "words": ["a", "b"]}
            caption = f"caption {i} é" if i % 5 else None
            self.examples.append(Example(f"id/{i}", data, caption, extras))

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, i):
        return self.examples[i]


def test_round_trip_keeps_every_byte(tmp_path):
    memory = Memory()
    report = convert_source(memory, tmp_path, name="mine", examples_per_shard=4)
    assert report.written == 13
    assert report.dropped == {}
    assert len(list(report.path.glob("*.array_record-*-of-00004"))) == 4
    assert not list(report.path.glob(".*"))
    by_path = open_source(SourceSpec(kind="auto", path=str(report.path)))
    above = open_source(SourceSpec(kind="tfds", path=str(tmp_path)))
    by_name = open_source(SourceSpec(path=str(tmp_path), name="mine", split="train"))
    for source in (by_path, above, by_name, pickle.loads(pickle.dumps(by_path))):
        assert len(source) == 13
        for i in reversed(range(13)):
            got, want = source[i], memory[i]
            assert (got.id, got.image, got.caption) == (want.id, want.image, want.caption)
            assert got.extras == {"n": i, "words": ["a", "b"]}
    part = open_source(SourceSpec(path=str(report.path), split="train[10:]"))
    assert [part[i].id for i in range(len(part))] == ["id/10", "id/11", "id/12"]


def test_ids_that_are_not_utf8(tmp_path):
    memory = Memory(1)
    memory.examples = [Example("caf\udce9.png", memory[0].image, "caf\udce9")]
    report = convert_source(memory, tmp_path, name="mine")
    example = open_source(SourceSpec(path=str(report.path)))[0]
    assert (example.id, example.caption) == (r"caf\udce9.png", r"caf\udce9")


def test_tfds_itself_reads_it(tmp_path):
    convert_source(Memory(2), tmp_path, name="mine")
    records = tfds.data_source("mine", split="train", data_dir=tmp_path)
    want = np.asarray(decode_image(Memory(2)[0].image))
    np.testing.assert_array_equal(records[0]["image"], want)


def test_splits_are_added(tmp_path):
    convert_source(Memory(5), tmp_path)
    report = convert_source(Memory(3), tmp_path, split="test", examples_per_shard=2)
    for split, n in (("train", 5), ("test", 3)):
        source = open_source(SourceSpec(path=str(report.path), split=split))
        assert [source[i].image for i in range(len(source))] == [
            Memory(n)[i].image for i in range(n)
        ]
    with pytest.raises(ConvertError, match="'test' already"):
        convert_source(Memory(3), tmp_path, split="test")


def test_drop_bad(tmp_path):
    memory = Memory(12, bad=(1, 4, 5, 6, 7))
    memory.examples.append(Example("none", None, "text only"))
    kept = convert_source(memory, tmp_path, name="kept", examples_per_shard=4)
    assert kept.dropped == {"none": Reason.NO_IMAGE}
    source = open_source(SourceSpec(path=str(kept.path)))
    assert source[4].image == memory[4].image  # broken, but untouched
    # A shard of which nothing is left must not break the others.
    dropped = convert_source(memory, tmp_path, name="dropped", examples_per_shard=4, drop_bad=True)
    assert set(dropped.dropped) == {"none", "id/1", "id/4", "id/5", "id/6", "id/7"}
    source = open_source(SourceSpec(path=str(dropped.path)))
    want = [0, 2, 3, 8, 9, 10, 11]
    assert [source[i].id for i in range(len(source))] == [f"id/{i}" for i in want]
    saved = json.loads((dropped.path / "conversion-train.json").read_text())
    assert saved["dropped"]["none"] == "no_image"
    with pytest.raises(ConvertError, match="not one"):
        convert_source(Memory(2, bad=(0, 1)), tmp_path, name="empty", drop_bad=True)


def test_a_stopped_conversion_goes_on(tmp_path):
    class Stops(Memory):
        reads = 0

        def __getitem__(self, i):
            self.reads += 1
            if i == 9 and self.reads < 100:
                raise OSError("stopped")
            return super().__getitem__(i)

    stopping = Stops(13)
    options = {"examples_per_shard": 4, "num_threads": 1}
    with pytest.raises(OSError, match="stopped"):
        convert_source(stopping, tmp_path, **options)
    with pytest.raises(ConvertError, match="another conversion"):
        convert_source(Memory(12), tmp_path, **options)
    first = next(tmp_path.rglob("*.array_record-00000-of-*"))
    first.write_bytes(first.read_bytes()[:-1])
    stopping.reads = 100
    report = convert_source(stopping, tmp_path, **options)
    # First and last for the stamp, then shards 2 and 3, and the first, which was cut short.
    assert stopping.reads == 100 + 2 + 5 + 4
    source = open_source(SourceSpec(path=str(report.path)))
    assert [source[i].image for i in range(13)] == [e.image for e in Memory(13).examples]
    assert not list(report.path.glob(".*"))


def test_training_batches_from_a_converted_folder(tmp_path):
    for i in range(6):
        Image.fromarray(noise(i, 40, 48)).save(tmp_path / f"{i}.png")
    folder = open_source(SourceSpec(path=str(tmp_path)))
    report = convert_source(folder, tmp_path / "out")
    tfds_source = open_source(SourceSpec(path=str(report.path)))
    options = {
        "batch_size": 4, "seed": 3, "transform": image_transform(CropSpec(size=32)),
        "policy": DataPolicy(max_bad_fraction=0), "num_threads": 2,
    }  # fmt: skip
    with make_batches(folder, **options) as one, make_batches(tfds_source, **options) as two:
        for _ in range(3):
            a, b = next(one), next(two)
            assert a["ids"] == b["ids"]
            np.testing.assert_array_equal(a["image"], b["image"])


def test_tfds_nested_features_and_errors(tmp_path):
    features = tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "image/id": np.int64,
            "captions": tfds.features.Sequence({"text": tfds.features.Text(), "id": np.int64}),
        }
    )
    from array_record.python.array_record_module import ArrayRecordWriter

    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    folder = tmp_path / "coco_like" / "1.0.0"
    folder.mkdir(parents=True)
    writer = ArrayRecordWriter(
        str(folder / "coco_like-val.array_record-00000-of-00001"), "group_size:1"
    )
    for i in range(2):
        captions = [{"text": f"c{i}{j}", "id": j} for j in range(2)]
        example = {"image": io.BytesIO(Memory()[i].image), "image/id": 70 + i, "captions": captions}
        writer.write(serializer.serialize_example(features.encode_example(example)))
    writer.close()
    convert.write_metadata(folder, "coco_like", "val", [2], 10, [], features)
    source = open_source(SourceSpec(path=str(tmp_path), kind="tfds", split="val"))
    assert source[1].image == Memory()[1].image
    assert (source[1].id, source[1].caption) == ("71", "c10")
    assert source[1].extras["captions"] == ["c10", "c11"]
    for bad, message in (
        ({"image_key": "picture"}, r"no feature 'picture'; it has \['captions/id'"),
        ({"caption_key": "alt"}, "no feature 'alt'"),
        ({"split": "train"}, r"one of \['val'\]"),
    ):
        with pytest.raises(SourceError, match=message):
            open_source(SourceSpec(path=str(folder), kind="tfds", **{"split": "val", **bad}))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(SourceError, match="expected one version folder"):
        open_source(SourceSpec(path=str(tmp_path / "nothing"), kind="tfds"))
    with pytest.raises(SourceError, match="no_such_dataset"):
        open_source(SourceSpec(name="no_such_dataset"))


class TestCommands:
    def pictures(self, folder):
        folder.mkdir()
        for i in range(5):
            (folder / f"{i}.jpg").write_bytes(encode(noise(i, 70 * (i + 1), 400), "JPEG"))
        (folder / "bad.png").write_bytes(b"<html>")
        return folder

    def test_convert(self, tmp_path, capsys):
        folder = self.pictures(tmp_path / "in")
        out = tmp_path / "out"
        argv = ["--from", str(folder), "--out", str(out), "--name", "pics", "--drop-bad"]
        assert convert.main(argv) == 0
        assert "5 examples, 1 dropped\n  dropped bad.png: not_an_image" in capsys.readouterr().out
        assert len(open_source(SourceSpec(path=str(out / "pics" / "1.0.0")))) == 5
        assert convert.main(argv) == 2
        assert "already" in capsys.readouterr().err
        assert convert.main(["--from", str(tmp_path / "none"), "--out", str(out)]) == 2

    def test_check(self, tmp_path, capsys):
        folder = self.pictures(tmp_path / "in")
        argv = ["--from", str(folder), "--json", str(tmp_path / "r.json")]
        assert check.main(argv) == 1
        assert "bad.png: not_an_image" in capsys.readouterr().out
        report = json.loads((tmp_path / "r.json").read_text())
        assert report["examples"] == report["checked"] == 6
        assert report["reasons"] == {"not_an_image": 1}
        assert report["formats"] == {"JPEG": 5}
        assert report["shorter_side"] == {"64": 1, "128": 2, "256": 2}
        assert check.main([*argv, "--max-bad-fraction", "0.5", "--header-only"]) == 0
        assert check.main([*argv, "--sample", "2", "--max-bad-fraction", "1"]) == 0
        assert json.loads((tmp_path / "r.json").read_text())["checked"] == 2

    @pytest.mark.slow
    def test_no_tensorflow_no_torch_no_jax_arrays(self, tmp_path):
        folder = self.pictures(tmp_path / "in")
        code = (
            "import sys; from core_jax.data import convert; "
            f"convert.main(['--from', {str(folder)!r}, '--out', {str(tmp_path / 'o')!r}]); "
            "assert not {'tensorflow', 'torch', 'transformers'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code], check=True)
