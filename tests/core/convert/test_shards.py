"""Stored tensors to shards and back: the right values, and only the bytes that are needed."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from core_jax.convert import safetensors_io, shards_in, shards_out
from core_jax.convert.header import CheckpointFormatError, read_header
from core_jax.convert.rules import Assignment, Entry, Layout
from core_jax.convert.safetensors_io import TensorReader
from core_jax.convert.shards_in import fill, read_leaf
from core_jax.convert.shards_out import host_pieces, stored_blocks
from core_jax.sharding import make_mesh

FILE = "model.safetensors"
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
SPECS = [(), ("fsdp",), (None, "fsdp"), ("tensor", "fsdp"), (("fsdp", "tensor"),),
         ("data", None), (None, ("data", "fsdp", "tensor"))]  # fmt: skip


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


@pytest.fixture
def read(monkeypatch):
    """The byte ranges [start, stop) of the file that were read, in order."""
    ranges = []
    really = safetensors_io.read_at

    def counting(descriptor, target, offset, *, where):
        ranges.append((offset, offset + len(target)))
        really(descriptor, target, offset, where=where)

    monkeypatch.setattr(safetensors_io, "read_at", counting)
    return ranges


@pytest.fixture(params=["host", "devices"])
def place(request, monkeypatch):
    """Where stacks are put together; without an accelerator the second way must be asked for."""
    if request.param == "devices":
        monkeypatch.setattr(shards_in, "STAGED_BYTES", 0)
        for module in (shards_in, shards_out):
            monkeypatch.setattr(module, "shares_memory", lambda sharding: False)
    return request.param


def _stack(folder, layout, shape, layers, *, transpose=False, dtype=F32):
    """Writes a parameter's tensors; returns (reader, assignments, the parameter itself)."""
    rng = np.random.default_rng(1)
    whole = rng.normal(size=(layers, *shape)).astype(dtype)
    stored, parts = {}, []
    for i in range(layers):
        tensor = layout.to_stored(whole[i])
        name = f"layers.{i}.weight"
        entry = Entry(name, "layers/kernel", i, layout, tensor.shape)
        parts.append(Assignment(entry, name, transpose))
        stored[name] = np.ascontiguousarray(tensor.T if transpose else tensor)
    save_file(stored, folder / FILE)
    return TensorReader(folder), parts, whole


FORMS = [(Layout.SAME, (8,)), (Layout.SAME, (8, 16)), (Layout.LINEAR, (8, 16)),
         (Layout.CONV, (4, 8, 8, 16)), (Layout.SAME, (4, 8, 2, 2, 2))]  # fmt: skip


@pytest.mark.parametrize(("layout", "shape"), FORMS)
def test_any_sharding_of_a_stack_has_the_same_values(layout, shape, mesh, place, tmp_path):
    reader, parts, whole = _stack(tmp_path, layout, shape, 4)
    specs = [(None, *spec) for spec in SPECS if len(spec) <= len(shape)]
    if place == "devices":  # each is compiled
        specs = specs[-1:]
    for spec in [*specs, ("fsdp",), (("data", "tensor"), "fsdp")]:
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        leaf = read_leaf(reader, parts, whole.shape, F32, sharding)
        assert leaf.sharding == sharding
        np.testing.assert_array_equal(leaf, whole)
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(shard.data, whole[shard.index])
        _same_when_stored(leaf, parts, reader)
    alone = read_leaf(reader, parts, whole.shape, F32)
    assert not alone.committed
    np.testing.assert_array_equal(alone, whole)


def _same_when_stored(leaf, parts, reader):
    for part in parts:
        blocks = list(stored_blocks(leaf, part.entry, reader.dtypes[part.stored_name]))
        want = reader.read(part.stored_name)
        assert b"".join(b.tobytes() for b in blocks) == want.tobytes()


def test_layers_of_a_stack_are_put_together_on_devices(mesh, monkeypatch, tmp_path):
    """The host holds a layer: no buffer is larger."""
    monkeypatch.setattr(shards_in, "STAGED_BYTES", 0)
    monkeypatch.setattr(shards_in, "shares_memory", lambda sharding: False)
    sizes = []
    really = shards_in.aligned_empty

    def counting(shape, dtype):
        sizes.append(int(np.prod(shape)))
        return really(shape, dtype)

    monkeypatch.setattr(shards_in, "aligned_empty", counting)
    reader, parts, whole = _stack(tmp_path, Layout.LINEAR, (8, 16), 6)
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    np.testing.assert_array_equal(read_leaf(reader, parts, whole.shape, F32, sharding), whole)
    assert max(sizes) == 8 * 16 // 2
    assert len(sizes) == 6 * 2


@pytest.mark.parametrize("layout", [Layout.SAME, Layout.LINEAR])
@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16, np.dtype(np.float16)])
def test_transposed_files_and_other_types(layout, transpose, dtype, mesh, tmp_path):
    reader, parts, whole = _stack(tmp_path, layout, (8, 16), 2, transpose=transpose, dtype=BF16)
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp", "tensor"))
    leaf = read_leaf(reader, parts, whole.shape, dtype, sharding)
    assert leaf.dtype == dtype
    np.testing.assert_array_equal(np.asarray(leaf), whole.astype(dtype))


def test_scalars_and_vectors(mesh, tmp_path):
    tensors = {"s": np.asarray(3, np.float32), "v": np.arange(6, dtype=np.float32)}
    save_file(tensors, tmp_path / FILE)
    reader = TensorReader(tmp_path)
    for name, sharding in itertools.product("sv", (None, NamedSharding(mesh, PartitionSpec()))):
        entry = Entry(name, name, None, Layout.SAME, reader.shapes[name])
        leaf = read_leaf(reader, [Assignment(entry, name, False)], entry.shape, F32, sharding)
        np.testing.assert_array_equal(leaf, reader.read(name))
        (block,) = stored_blocks(leaf, entry, F32)
        assert block.tobytes() == reader.read(name).tobytes()


def _bytes_of(ranges):
    return [i for start, stop in ranges for i in range(start, stop)]


ROWS, COLUMNS = 4, 4096  # of a stored tensor: a row is four pages


def test_a_shard_of_a_transposed_layer_reads_its_own_columns(read, tmp_path):
    reader, parts, whole = _stack(tmp_path, Layout.LINEAR, (COLUMNS, ROWS), 3)
    box = ((1, 3), (1024, 2048), (0, 2))  # two layers, a quarter of the columns, half of the rows
    found = fill(reader, parts, whole.shape, F32, [box])[box]
    np.testing.assert_array_equal(found, whole[1:3, 1024:2048, 0:2])
    header = read_header(tmp_path / FILE)
    want = [
        (at + 4 * 1024, at + 4 * 2048)
        for layer, row in itertools.product((1, 2), (0, 1))
        for at in [header[f"layers.{layer}.weight"].offset + 4 * COLUMNS * row]
    ]
    assert read == want


def test_rows_are_read_in_one_piece(read, tmp_path):
    reader, parts, whole = _stack(tmp_path, Layout.LINEAR, (COLUMNS, ROWS), 1)
    box = ((0, 1), (0, COLUMNS), (1, 3))
    found = fill(reader, parts, whole.shape, F32, [box])[box]
    np.testing.assert_array_equal(found, whole[..., 1:3])
    start = read_header(tmp_path / FILE)["layers.0.weight"].offset + 4 * COLUMNS
    assert read == [(start, start + 2 * 4 * COLUMNS)]


def test_the_shards_of_several_processes_are_the_file_once(read, mesh, tmp_path):
    """Devices are dealt out to pretended processes; together they read every byte once."""
    reader, parts, whole = _stack(tmp_path, Layout.LINEAR, (COLUMNS, ROWS), 2)
    sharding = NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp"), "tensor"))
    indices = sharding.devices_indices_map(whole.shape)
    boxes = [shards_in.box_of(indices[d], whole.shape) for d in mesh.devices.flat]
    for first in range(0, 8, 2):
        before = len(read)
        for box, found in fill(reader, parts, whole.shape, F32, boxes[first : first + 2]).items():
            np.testing.assert_array_equal(found, whole[tuple(slice(*e) for e in box)])
        assert sum(b - a for a, b in read[before:]) == whole.nbytes // 4
    numbers = _bytes_of(read)
    assert len(numbers) == len(set(numbers)) == whole.nbytes


def test_replicas_are_read_once(read, mesh, tmp_path):
    reader, parts, whole = _stack(tmp_path, Layout.LINEAR, (64, 8), 2)
    read_leaf(reader, parts, whole.shape, F32, NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    assert sum(b - a for a, b in read) == whole.nbytes


def test_cpu_devices_hold_the_buffers_that_were_read(mesh, tmp_path):
    """No copy on the way in (replicas share one), none on the way out, and donating is safe."""
    reader, parts, whole = _stack(tmp_path, Layout.LINEAR, (64, 8), 2)
    sharding = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    leaf = read_leaf(reader, parts, whole.shape, F32, sharding)
    places = {s.data.unsafe_buffer_pointer() for s in leaf.addressable_shards}
    assert len(places) == 2
    for _, piece in host_pieces(leaf, 1):
        assert any(0 <= piece.ctypes.data - p < whole.nbytes // 2 for p in places)
    # A replica that wrote into what it shares would double it once more.
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(leaf)
    for shard in doubled.addressable_shards:
        np.testing.assert_array_equal(shard.data, whole[shard.index] * 2)


def test_a_file_that_becomes_shorter_is_an_error(tmp_path):
    reader, parts, whole = _stack(tmp_path, Layout.SAME, (64, 64), 2)
    with (tmp_path / FILE).open("r+b") as file:
        file.truncate(20_000)
    with pytest.raises(CheckpointFormatError, match="became shorter"):
        read_leaf(reader, parts, whole.shape, F32)


def test_a_file_that_is_replaced_does_not_matter(tmp_path):
    reader, parts, whole = _stack(tmp_path, Layout.SAME, (8, 8), 2)
    (tmp_path / FILE).rename(tmp_path / "old")
    save_file({"layers.0.weight": np.zeros(3, np.float32)}, tmp_path / FILE)
    np.testing.assert_array_equal(read_leaf(reader, parts, whole.shape, F32), whole)


def test_numpy_arrays_are_stored_as_well(rng):
    whole = rng.normal(size=(2, 4, 6))
    entry = Entry("x", "x", 1, Layout.LINEAR, (6, 4))
    (block,) = stored_blocks(whole, entry, BF16)
    np.testing.assert_array_equal(block, whole[1].T.astype(BF16))
    (block,) = stored_blocks(jnp.asarray(whole), entry, F32)
    np.testing.assert_array_equal(block, whole[1].T.astype(F32))
