"""load_model and save_model over meshes and processes: same values, own bytes, checks first."""

import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from core_jax.convert import safetensors_io
from core_jax.convert.header import read_header
from core_jax.convert.rules import WeightsError
from core_jax.models import load_model, save_model
from core_jax.models.autoencoder_kl import FAMILY as VAE
from core_jax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from core_jax.models.qwen2 import FAMILY as QWEN2
from core_jax.models.qwen2 import Qwen2Config, Qwen2ForCausalLM
from core_jax.partition import flatten
from core_jax.sharding import DEFAULT_RULES, make_mesh

FILE = "model.safetensors"
QWEN = Qwen2Config(
    vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=8,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
MESHES = [{"fsdp": 8}, {"data": 8}, {"fsdp": 2, "tensor": 2, "data": 2}, {"data": 4, "tensor": 2}]


def _random(family, model, dtype):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), family.abstract_params(model)
    )


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    model = Qwen2ForCausalLM(config=QWEN)
    params = _random(QWEN2, model, jnp.bfloat16)
    folder = tmp_path_factory.mktemp("qwen")
    save_model(folder, model, params)
    return folder, model, params


def _same(a, b):
    a, b = flatten(a), flatten(b)
    assert set(a) == set(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert np.asarray(a[name]).tobytes() == np.asarray(b[name]).tobytes(), name


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("rules", [None, {}, {"layers": "fsdp", "embed": None}])
def test_any_mesh_to_any_mesh(shape, rules, qwen, tmp_path):
    folder, model, params = qwen
    rules = None if rules is None else {**DEFAULT_RULES, **rules}
    mesh = make_mesh(shape)
    _, loaded = load_model(folder, mesh=mesh, rules=rules)
    _same(loaded, params)
    assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(loaded))
    save_model(tmp_path, model, loaded)
    assert (tmp_path / FILE).read_bytes() == (folder / FILE).read_bytes()


def test_convolutions_round_trip_over_a_mesh(tmp_path, monkeypatch):
    config = AutoencoderKLConfig(
        block_out_channels=(16,), norm_num_groups=4, mid_block_add_attention=False
    )
    model = AutoencoderKL(config=config)
    params = _random(VAE, model, jnp.float32)
    save_model(tmp_path / "a", model, params)
    from core_jax.models import auto
    from core_jax.sharding import fsdp_by_size

    monkeypatch.setattr(auto, "fsdp_by_size", lambda tree, mesh: fsdp_by_size(
        tree, mesh, min_size=64))  # fmt: skip
    _, loaded = load_model(tmp_path / "a", mesh=make_mesh({"fsdp": 8}))
    assert any(not x.sharding.is_fully_replicated for x in jax.tree.leaves(loaded) if x.ndim == 4)
    _same(loaded, params)
    save_model(tmp_path / "b", model, loaded)
    name = VAE.file_name
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.fixture
def read(monkeypatch):
    """(offset, length) of what was read of tensors; headers are not among it."""
    ranges = []
    really = safetensors_io.read_at

    def counting(descriptor, target, offset, *, where):
        ranges.append((offset, len(target)))
        really(descriptor, target, offset, where=where)

    monkeypatch.setattr(safetensors_io, "read_at", counting)
    return ranges


def test_each_byte_is_read_once(qwen, read):
    folder = qwen[0]
    load_model(folder, mesh=make_mesh({"fsdp": 4, "data": 2}))
    size = sum(stored.nbytes for stored in read_header(folder / FILE).values())
    assert sum(length for _, length in read) == size


def test_part_of_a_model_reads_only_that(qwen, read):
    folder = qwen[0]
    load_model(folder, only=(r"layers/mlp/up_proj/.*",))
    header = read_header(folder / FILE)
    want = {s.offset: s.nbytes for n, s in header.items() if "up_proj" in n}
    assert len(want) == 8
    assert dict(read) == want


def test_what_headers_show_is_found_before_anything_is_read(qwen, read, tmp_path):
    folder, model, params = qwen
    save_model(tmp_path, model, params)
    tensors = load_file(tmp_path / FILE)
    tensors["model.norm.weight"] = np.zeros(3, np.float32)
    del tensors["lm_head.weight"]
    save_file({**tensors, "other": np.zeros(2, np.float32)}, tmp_path / FILE)
    with pytest.raises(WeightsError) as caught:
        load_model(tmp_path)
    for name in ("lm_head.weight", "other", "norm.weight: (3,)"):
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="'mlp' has no rule"):
        load_model(folder, mesh=make_mesh({"fsdp": 8}), rules={})
    assert read == []


def test_a_copy_of_another_type_may_be_tied(tmp_path):
    """The head repeats the table's values, in a type that halves the bytes of a chunk."""
    import dataclasses

    config = dataclasses.replace(QWEN, tie_word_embeddings=True)
    model = Qwen2ForCausalLM(config=config)
    params = _random(QWEN2, model, jnp.bfloat16)
    save_model(tmp_path, model, params)
    tensors = load_file(tmp_path / FILE)
    table = tensors["model.embed_tokens.weight"].astype(np.float32)
    save_file({**tensors, "lm_head.weight": table}, tmp_path / FILE)
    _same(load_model(tmp_path)[1], params)


_TWO = """
import sys, pathlib, jax
from core_jax.convert import safetensors_io
index, port, folder, out = int(sys.argv[1]), *sys.argv[2:]
jax.distributed.initialize("127.0.0.1:" + port, 2, index)
count, really = [0], safetensors_io.read_at
def counting(descriptor, target, offset, *, where):
    count[0] += len(target)
    really(descriptor, target, offset, where=where)
safetensors_io.read_at = counting
from core_jax.models import load_model, save_model
from core_jax.sharding import DEFAULT_RULES, make_mesh
rules = {**DEFAULT_RULES, "vocab": "fsdp", "embed": None, "heads": "fsdp", "kv_heads": "fsdp",
         "mlp": "fsdp"}
model, params = load_model(folder, mesh=make_mesh({"fsdp": 2, "data": 2}), rules=rules)
print("read", count[0], flush=True)
save_model(out, model, params, max_shard_bytes=4000)
print("saved", len(list(pathlib.Path(out).glob("*.safetensors"))), flush=True)
"""


@pytest.mark.slow
def test_two_processes_read_half_each_and_write_one_directory(qwen, tmp_path):
    folder, _, params = qwen
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = "--xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _TWO, str(i), port, str(folder), str(tmp_path / "out")],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for i in range(2)
    ]  # fmt: skip
    texts = [p.communicate(timeout=300)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    tensors = read_header(folder / FILE)
    sharded = sum(s.nbytes for n, s in tensors.items() if "norm" not in n)
    norms = sum(s.nbytes for n, s in tensors.items() if "norm" in n)
    for text in texts:
        words = text.split()
        read = int(words[words.index("read") + 1])
        # The mesh's first axis lies over the processes. Shards of a row are narrower than a page
        # here, so where rows are cut all of them are read: the table, the head and biases are not.
        assert norms + sharded // 2 <= read < norms + sharded
        assert int(words[words.index("saved") + 1]) > 3
    _same(load_model(tmp_path / "out")[1], params)
