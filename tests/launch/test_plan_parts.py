"""Memory, roofline, topologies, fingerprints, fitting: what of a plan needs no compiler."""

import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from core_jax.sharding import make_mesh
from launch.chips import CHIPS
from launch.collectives import Collective
from launch.errors import PlanError
from launch.fingerprint import fingerprint, fingerprint_text
from launch.fitting import largest_below, line_through, search
from launch.jobs import job_of
from launch.memory import Memory, compiled_memory, parse_out_of_memory, shard_bytes
from launch.roofline import roofline, run_of
from launch.topology import parse_topology

OUT_OF_MEMORY = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used \
20.11G of 15.75G hbm. Exceeded hbm capacity by 4.36G.

Largest program allocations in hbm:

  1. Size: 2.25G
     Operator: op_name="jit(on_mesh)/jvp(UNet)/attn/softmax"
     Shape: bf16[32,5,2304,2304]{3,2,1,0:T(8,128)(2,1)}
     Unpadded size: 2.25G
     ==========================

  2. Size: 576.0M
     Operator: op_name="jit(on_mesh)/transpose(jvp(UNet))/conv"
     Shape: f32[32,96,96,512]{3,2,1,0:T(8,128)}
     ==========================
"""


def test_the_compiler_s_complaint_is_read():
    found = parse_out_of_memory(OUT_OF_MEMORY)
    assert found is not None
    assert (round(found.used / 2**30, 2), found.limit) == (20.11, round(15.75 * 2**30))
    assert found.largest == (
        (round(2.25 * 2**30), "bf16[32,5,2304,2304]", "jit(on_mesh)/jvp(UNet)/attn/softmax"),
        (576 * 2**20, "f32[32,96,96,512]", "jit(on_mesh)/transpose(jvp(UNet))/conv"),
    )
    seen = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (20.00G) exceeds available HBM (15.75G)."
    )
    found = parse_out_of_memory(seen)
    assert found is not None
    assert (found.used, found.limit) == (20 * 2**30, round(15.75 * 2**30))
    assert parse_out_of_memory("INVALID_ARGUMENT: something else") is None


def test_memory_is_split_and_adds_up():
    known = Memory(frozen=100, trained=50, optimizer=101, ema=0, batch=9, limit=1000)
    stats = types.SimpleNamespace(
        argument_size_in_bytes=280, temp_size_in_bytes=500, output_size_in_bytes=160,
        alias_size_in_bytes=150, generated_code_size_in_bytes=40,
    )  # fmt: skip
    found = compiled_memory(known, stats)
    assert (found.padding, found.outputs) == (20, 10)
    assert found.total == 280 + 500 + 10 + 40
    assert found.headroom == 1000 - found.total


def test_bytes_of_shards():
    mesh = make_mesh({"data": 2, "fsdp": 4})
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    tree = {
        "a": jax.ShapeDtypeStruct((3, 8), jnp.bfloat16, sharding=split),
        "b": jax.ShapeDtypeStruct((5,), jnp.float32, sharding=whole),
    }
    assert shard_bytes(tree) == 3 * 2 * 2 + 5 * 4


def _collective(wire, *, dcn):
    return Collective(
        kind="all-gather", axes=("data",), group_size=2, crosses_slices=dcn, count=1, bytes=wire,
        wire_bytes=wire, largest=wire, largest_name="x",
    )  # fmt: skip


def test_the_slowest_resource_sets_the_pace():
    chip = CHIPS["v5e"]
    line = roofline(chip, flops=197e12, hbm_bytes=819e9 / 2, collectives=[_collective(2e9, dcn=0)])
    assert (line.compute, line.hbm, line.ici, line.dcn) == (1.0, 0.5, 0.01, 0.0)
    assert (line.seconds, line.bound) == (1.0, "compute")
    slow = roofline(chip, flops=0.0, hbm_bytes=0.0, collectives=[_collective(3.125e9, dcn=True)])
    assert (slow.seconds, slow.bound) == (1.0, "dcn")


def test_hours_and_money():
    run = run_of(
        0.5, steps=7200, units={"images": 512}, num_chips=256, price_per_chip_hour=1.2
    )
    assert (run.hours, run.chip_hours, run.rates) == (1.0, 256.0, {"images": 1024.0})
    assert run.price == pytest.approx(307.2)
    free = run_of(0.5, steps=1, units={}, num_chips=1, price_per_chip_hour=None)
    assert free.price is None


def test_topologies():
    found = parse_topology("v5p:4x4x8", slices=2)
    assert (found.num_chips, found.name) == (256, "v5p:4x4x8")
    for text, slices, message in (
        ("v5e", 1, "write chip:AxB"), ("v9:2x2", 1, "chips are v4"), ("h200:2x2", 1, "chips are"),
        ("v5e:4x4x4", 1, "two numbers"), ("v5p:4x4", 1, "three numbers"), ("v5e:4x4", 0, "slices"),
    ):  # fmt: skip
        with pytest.raises(PlanError, match=message):
            parse_topology(text, slices)


def test_a_fingerprint_does_not_see_where_a_program_was_written():
    def lower(source):
        scope = {}
        exec(compile(source, "anywhere.py", "exec"), {"jnp": jnp}, scope)
        return jax.jit(scope["f"]).lower(jax.ShapeDtypeStruct((3,), jnp.float32))

    one = lower("def f(x):\n  return jnp.sin(x) + 1")
    moved = lower("\n\n\n# further down\ndef f(x):\n  return jnp.sin(x) + 1")
    other = lower("def f(x):\n  return jnp.sin(x) + 2")
    assert fingerprint(one) == fingerprint(moved) != fingerprint(other)
    located = one.as_text(debug_info=True)
    assert "loc(" in located
    assert fingerprint_text(located) == fingerprint(one)


def test_a_fingerprint_sees_a_kernel_and_not_where_it_was_written():
    """Lowered for TPUs with and without source locations inside the kernel's own program."""
    from core_jax.ops.splash import Causal, splash_attention

    def lower(causal, frames):
        jax.config.update("jax_traceback_in_locations_limit", frames)
        jax.clear_caches()

        def f(q, k, v):
            return splash_attention(q, k, v, mask=Causal() if causal else None, scale=1.0)

        x = jax.ShapeDtypeStruct((1, 128, 1, 128), jnp.bfloat16)
        return jax.jit(f).trace(x, x, x).lower(lowering_platforms=("tpu",))

    frames = jax.config.jax_traceback_in_locations_limit
    try:
        bare, located, other = lower(True, 0), lower(True, 10), lower(False, 0)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", frames)
    assert bare.as_text() != located.as_text()
    assert fingerprint(bare) == fingerprint(located) != fingerprint(other)


def test_a_line_says_the_largest_batch():
    fixed, slope = line_through((4, 1000), (8, 1800))
    assert (fixed, slope) == (200, 200)
    assert largest_below(fixed, slope, 3199, 1) == 14
    assert largest_below(fixed, slope, 3199, 4) == 12
    assert largest_below(fixed, slope, 100, 1) == 0
    assert largest_below(fixed, 0.0, 100, 1) == 0


def test_jobs_that_are_not_planned_are_named():
    with pytest.raises(PlanError, match="task 'lossless'"):
        job_of({"task": "lossless"})
    with pytest.raises(PlanError, match="job 'cache' of this config"):
        job_of({"task": "distill"}, "cache")
    with pytest.raises(PlanError, match="neither a stage nor a task"):
        job_of({})


def test_a_job_changes_its_batch_and_its_remat():
    from configs import vlv_stage2

    job = job_of(vlv_stage2.get_config().to_dict())
    assert job.units == {"images": 64, "tokens": 64 * 300}
    larger = job.with_batch(96)
    assert (larger.experiment.data.batch_size, larger.units["tokens"]) == (96, 96 * 300)
    assert job.experiment.model.execution.remat == "full"
    assert job.without_remat().experiment.model.execution.remat == "none"
    assert dataclasses.replace(job) == job


def test_remedies_leave_what_is_learned_as_it_is():
    from configs import vlv_stage2
    from launch.remedies import candidates

    job = job_of(vlv_stage2.get_config().to_dict())
    plan: Any = types.SimpleNamespace(mesh={"data": 1, "fsdp": 16}, num_chips=16)
    assert list(candidates(job, plan)) == [{"run.grad_accum": 2}, {"run.grad_accum": 4}]
    plan = types.SimpleNamespace(mesh={"data": 16}, num_chips=16)
    first, second, *_ = candidates(job.without_remat(), plan)
    assert first == {"model.execution.remat": "full"}
    assert second == first | {"run.mesh": {"data": 1, "fsdp": -1}}
    assert job.flags_of({"run.grad_accum": 2}) == "--config.run.grad_accum=2"


def test_caching_and_decoding_have_remedies_too():
    from configs import massv_distill, vlv_stage1
    from launch.remedies import candidates

    cache = job_of(vlv_stage1.get_config().to_dict(), "cache")
    plan: Any = types.SimpleNamespace(mesh={"data": 4}, num_chips=4)
    first, *rest = candidates(cache, plan)
    assert first == {"data.batch_size": 16}
    assert rest[-1] == {"data.batch_size": 1}
    assert cache.flags_of(first) == "--batch_size=16"  # the command's own flag, not the config's
    decoding = job_of(massv_distill.get_config("qwen2_5_vl_7b").to_dict())
    first, second, *_ = candidates(decoding, plan)
    assert first == {"run.mesh": {"data": 1, "tensor": -1}}
    assert second == first | {"distill.batch_size": decoding.batch_size // 2}
    plan = types.SimpleNamespace(mesh={"data": 1, "tensor": 4}, num_chips=4)
    assert next(candidates(decoding, plan)) == {"distill.batch_size": decoding.batch_size // 2}


def _needs(prompts, rounds, limit):
    """Compiles in two programs; the second is not compiled where the first does not fit."""

    def at(batch):
        needs = (prompts[0] + prompts[1] * batch, rounds[0] + rounds[1] * batch)
        return (needs, max(needs) <= limit) if needs[0] <= limit else (needs[:1], False)

    return at


def test_the_batch_that_fits_is_that_of_the_larger_program():
    at = _needs(prompts=(100, 50), rounds=(400, 10), limit=1000)
    found = search(8, at(8), at, limit=1000, multiple=1)
    assert (found.largest, found.fixed, found.per_example) == (18, 100, 50)
    at = _needs(prompts=(100, 1), rounds=(400, 10), limit=1000)
    assert search(8, at(8), at, limit=1000, multiple=4).largest == 60
    at = _needs(prompts=(100, 50), rounds=(700, 10), limit=1000)  # the prompts alone do not fit
    assert search(32, at(32), at, limit=1000, multiple=1).largest == 18
