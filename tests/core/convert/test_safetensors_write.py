"""Files written block by block: the bytes of the safetensors package, or nothing."""

import functools
import json
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save

from core_jax.convert.safetensors_io import TensorReader
from core_jax.convert.safetensors_write import Outgoing, write_stream, write_tensors

FILE = "model.safetensors"
TYPES = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int8,
         np.uint8, np.bool_)  # fmt: skip


def test_bytes_are_those_of_the_package(tmp_path, rng):
    shapes = [(), (3,), (2, 5), (0, 4), (1, 2, 3, 4)]
    tensors = {
        f"{name}.{np.dtype(kind).name}.{len(shape)}": np.asarray(9 * rng.normal(size=shape), kind)
        for name, shape in zip(["z", "a", "layers.10", "layers.9", "ü"], shapes, strict=True)
        for kind in TYPES
    }
    write_tensors(tmp_path, tensors.items(), file_name=FILE)
    assert (tmp_path / FILE).read_bytes() == save(tensors, metadata={"format": "pt"})
    reader = TensorReader(tmp_path)
    for name, want in tensors.items():
        assert reader.read(name).tobytes() == want.tobytes()
        assert b"".join(c.tobytes() for c in reader.chunks(name)) == want.tobytes()


def _outgoing(name, shape, blocks):
    return Outgoing(name, shape, np.dtype(np.float32), lambda: iter(blocks))


def test_blocks_are_written_in_their_order(tmp_path):
    blocks = [np.arange(3, dtype=np.float32), np.arange(3, 10, dtype=np.float32)]
    first = _outgoing("b", (5, 2), blocks)
    write_stream(tmp_path, [first, _outgoing("a", (3,), blocks[:1])], file_name=FILE)
    reader = TensorReader(tmp_path)
    np.testing.assert_array_equal(reader.read("b"), np.arange(10).reshape(5, 2))
    np.testing.assert_array_equal(reader.read("a"), np.arange(3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (_outgoing("x", (3,), [np.zeros(2, np.float32)]), "8 bytes instead of 12"),
        (_outgoing("x", (3,), [np.zeros(4, np.float32)]), "16 bytes instead of 12"),
        (_outgoing("x", (3,), [np.zeros(3, np.float16)]), "float16 instead of float32"),
        (_outgoing("good", (1,), [np.zeros(1, np.float32)]), "the same name"),
    ],
)
def test_what_does_not_fit_leaves_the_old_file(wrong, message, tmp_path):
    good = _outgoing("good", (3,), [np.ones(3, np.float32)])
    write_stream(tmp_path, [good], file_name=FILE)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(ValueError, match=message):
        write_stream(tmp_path, [good, wrong], file_name=FILE)
    assert [f.name for f in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).read_bytes() == before


def test_a_full_disk_leaves_the_old_file(tmp_path):
    write_tensors(tmp_path, [("x", np.ones(3, np.float32))], file_name=FILE)

    def blocks():
        yield np.zeros(2, np.float32)
        raise OSError(28, "No space left on device")

    new = Outgoing("x", (4,), np.dtype(np.float32), blocks)
    with pytest.raises(OSError, match="No space"):
        write_stream(tmp_path, [new], file_name=FILE)
    np.testing.assert_array_equal(TensorReader(tmp_path).read("x"), 1)


def test_only_a_block_is_in_memory(tmp_path):
    def blocks():
        for _ in range(32):
            yield np.zeros(2**18, np.float32)

    tensors = [
        Outgoing(f"t{i}", (32, 2**18), np.dtype(np.float32), blocks) for i in range(2)
    ]
    tracemalloc.start()
    write_stream(tmp_path, tensors, file_name=FILE, max_shard_bytes=40 * 2**20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 2**20
    index = json.loads((tmp_path / f"{FILE}.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    reader = TensorReader(tmp_path)
    chunks = functools.reduce(lambda n, c: n + c.size, reader.chunks("t1"), 0)
    assert chunks == 32 * 2**18
