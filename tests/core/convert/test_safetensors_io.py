"""Safetensors directories: shards and indexes, types, and what is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from core_jax.convert.safetensors_io import CheckpointFormatError, TensorReader
from core_jax.convert.safetensors_write import write_tensors

BF16 = np.dtype(ml_dtypes.bfloat16)
FILE = "model.safetensors"


@pytest.fixture
def tensors(rng):
    """Six tensors of 64 bytes or less, of every type that checkpoints mix."""
    types = (np.float32, np.float16, BF16, np.float32, np.int64, np.float16)
    return {
        f"t{i}": np.asarray(rng.normal(size=(4, 2)) * 9, t) for i, t in enumerate(types)
    }


def _same(reader, tensors):
    assert set(reader.shapes) == set(tensors)
    for name, want in tensors.items():
        got = reader.read(name)
        assert reader.dtypes[name] == got.dtype == want.dtype
        assert reader.shapes[name] == want.shape
        assert got.tobytes() == want.tobytes()


def test_mixed_types_in_one_file_are_bitwise(tensors, tmp_path):
    write_tensors(tmp_path, tensors.items(), file_name=FILE)
    assert [f.name for f in tmp_path.iterdir()] == [FILE]
    _same(TensorReader(tmp_path), tensors)


def test_shards_and_their_index(tensors, tmp_path):
    write_tensors(tmp_path, iter(tensors.items()), file_name=FILE, max_shard_bytes=70)
    index = json.loads((tmp_path / f"{FILE}.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert set(index["weight_map"]) == set(tensors)
    count = len(set(index["weight_map"].values()))
    assert count > 2
    assert index["weight_map"]["t0"] == f"model-00001-of-{count:05d}.safetensors"
    _same(TensorReader(tmp_path), tensors)
    # Written again as one file, nothing of the shards stays.
    write_tensors(tmp_path, tensors.items(), file_name=FILE)
    assert [f.name for f in tmp_path.iterdir()] == [FILE]
    # And the other way round.
    write_tensors(tmp_path, tensors.items(), file_name=FILE, max_shard_bytes=70)
    assert not (tmp_path / FILE).exists()
    _same(TensorReader(tmp_path), tensors)


def test_an_error_while_writing_leaves_the_old_file(tensors, tmp_path):
    write_tensors(tmp_path, tensors.items(), file_name=FILE)

    def breaks():
        yield "t0", tensors["t0"]
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_tensors(tmp_path, breaks(), file_name=FILE)
    assert [f.name for f in tmp_path.iterdir()] == [FILE]
    _same(TensorReader(tmp_path), tensors)


def test_transposed_arrays_are_written_as_they_read(tmp_path, rng):
    array = rng.normal(size=(3, 4)).T
    write_tensors(tmp_path, [("x", array)], file_name=FILE)
    np.testing.assert_array_equal(TensorReader(tmp_path).read("x"), array)


def test_variants_beside_the_canonical_file_are_left_alone(tensors, tmp_path):
    write_tensors(tmp_path, tensors.items(), file_name=FILE)
    write_tensors(tmp_path, [("t0", tensors["t1"])], file_name="model.fp16.safetensors")
    _same(TensorReader(tmp_path), tensors)
    write_tensors(
        tmp_path, tensors.items(), file_name="model.fp32.safetensors", max_shard_bytes=70
    )
    next(tmp_path.glob("model.fp32-00001-of-*")).unlink()  # its index can't be followed now
    _same(TensorReader(tmp_path), tensors)


def test_shards_without_an_index_are_read(tensors, tmp_path):
    names = list(tensors)
    save_file({n: tensors[n] for n in names[:3]}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({n: tensors[n] for n in names[3:]}, tmp_path / "model-00002-of-00002.safetensors")
    _same(TensorReader(tmp_path), tensors)


def test_one_tensor_in_two_files_is_refused(tensors, tmp_path):
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"t3": tensors["t3"]}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointFormatError, match=r"t3 is in both a\.safe\S+ and b\.safe"):
        TensorReader(tmp_path)


@pytest.mark.parametrize("keep", [4, 60, -8])
def test_a_truncated_file_is_refused(tensors, tmp_path, keep):
    write_tensors(tmp_path, tensors.items(), file_name=FILE)
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[:keep])
    with pytest.raises(CheckpointFormatError, match="not a whole safetensors file"):
        TensorReader(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"t0": "../x.safetensors"}}, "outside"),
        ({"weight_map": {"t0": "sub/x.safetensors"}}, "outside"),
        ({"weight_map": {"t0": "/x.safetensors"}}, "outside"),
        ({"weight_map": {"t0": "x-2.safetensors"}}, "download is incomplete"),
        ({"weight_map": ["x"]}, "damaged"),
        ({}, "damaged"),
        ("{", "damaged"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(index, message, tensors, tmp_path):
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    for place in (tmp_path, directory / "sub"):  # the file is there: that is the danger
        save_file(tensors, place / "x.safetensors")
    text = index if isinstance(index, str) else json.dumps(index)
    (directory / f"{FILE}.index.json").write_text(text)
    with pytest.raises(CheckpointFormatError, match=message):
        TensorReader(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "flax.msgpack"])
def test_pickles_are_refused_with_the_remedy(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointFormatError) as caught:
        TensorReader(tmp_path)
    assert name in str(caught.value)
    assert "docs/converting-pickles.md" in str(caught.value)


def test_pickles_beside_safetensors_are_ignored(tensors, tmp_path):
    write_tensors(tmp_path, tensors.items(), file_name=FILE)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    _same(TensorReader(tmp_path), tensors)


def test_no_weights_no_directory_and_strange_types(tmp_path):
    with pytest.raises(CheckpointFormatError, match=r"no \.safetensors"):
        TensorReader(tmp_path)
    with pytest.raises(CheckpointFormatError, match="not a directory"):
        TensorReader(tmp_path / "nowhere")
    header = json.dumps({"x": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
    content = len(header).to_bytes(8, "little") + header + b"\0\0"
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(CheckpointFormatError, match="F8_E4M3, which is not supported"):
        TensorReader(tmp_path)


def test_written_files_are_as_readable_as_any_other(tmp_path):
    (tmp_path / "other").touch()
    write_tensors(tmp_path, [("a", np.ones(2, np.float32))], file_name="model.safetensors")
    mode = (tmp_path / "model.safetensors").stat().st_mode
    assert mode == (tmp_path / "other").stat().st_mode
