"""Arithmetic and traffic of compiled programs."""

import jax
import jax.numpy as jnp
import pytest

from launch.hlo import parse, trip_count
from launch.hlo_cost import count_cost


def _shape(*dims):
    return jax.ShapeDtypeStruct(dims, jnp.float32)


def _program(lines, extra=""):
    return parse(f"{extra}ENTRY %main (x: f32[4]) -> f32[4] {{\n" + "\n".join(lines) + "\n}\n")


def test_a_scan_counts_every_layer_and_once_as_the_compiler_does():
    def f(w, x):
        return jax.lax.scan(lambda h, k: (h @ k, None), x, w)[0]

    compiled = jax.jit(f).lower(_shape(5, 128, 128), _shape(64, 128)).compile()
    program = parse(compiled.as_text())
    loops = [i for i, _, _ in program.running() if i.opcode == "while"]
    assert [trip_count(program, loop) for loop in loops] == [5]
    cost = count_cost(program)
    if cost.flops:  # a CPU may call a library for the product
        assert cost.flops == 5 * cost.flops_once == 5 * 2 * 64 * 128 * 128


@pytest.mark.parametrize(
    ("left", "right", "out", "rest", "flops"),
    [
        # A product, as the TPU writes it.
        ("bf16[8,16]", "bf16[16,4]", "f32[8,4]", "dim_labels=bf_io->bf", 2 * 8 * 16 * 4),
        # Padding is not multiplied: 3x3 on 4x4 has (2+3+3+2)^2 pairs.
        ("f32[1,4,4,2]", "f32[3,3,2,5]", "f32[1,4,4,5]",
         "window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_01io->b01f", 2 * 100 * 2 * 5),
        # A batch of products as a dilated convolution: every place meets its own matrix.
        ("f32[3,8,16]", "f32[3,16,4]", "f32[3,8,4]",
         "window={size=3 pad=0_0 stride=2 lhs_dilate=3}, dim_labels=0bf_0io->0bf",
         2 * 3 * 8 * 16 * 4),
    ],
    ids=["product", "padded", "batched"],
)  # fmt: skip
def test_convolutions(left, right, out, rest, flops):
    program = _program([
        f"  %l = {left} parameter(0)", f"  %r = {right} parameter(1)",
        f"  ROOT %c = {out} convolution(%l, %r), {rest}",
    ])  # fmt: skip
    assert count_cost(program).flops == flops


def test_a_slice_of_stacked_weights_in_a_fusion_reads_that_slice():
    fused = (
        "%body (p0: f32[24,64], p1: s32[]) -> f32[1,64] {\n"
        "  %p0 = f32[24,64] parameter(0)\n  %p1 = s32[] parameter(1)\n"
        "  ROOT %s = f32[1,64] dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,64}\n}\n"
    )
    program = _program([
        "  %w = f32[24,64] parameter(0)", "  %i = s32[] parameter(1)",
        "  ROOT %f = f32[1,64] fusion(%w, %i), kind=kLoop, calls=%body",
    ], fused)  # fmt: skip
    assert count_cost(program).hbm_bytes == 64 * 4 + 64 * 4 + 4  # and the index


@pytest.mark.parametrize("fused", [True, False])
def test_what_is_scattered_into_a_cache_moves_the_new_rows(fused):
    """As decoding writes one token a row: TPU's compiler aliases the cache with the result."""
    add = (
        "%one (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n"
        "  ROOT %b = f32[] parameter(1)\n}\n"
    )
    scatter = "scatter(%p0, %p1, %p2), update_window_dims={1}, to_apply=%one"
    arguments = [
        f"  %p{i} = {kind} parameter({i})"
        for i, kind in enumerate(("f32[24,64]", "s32[2]", "f32[2,64]"))
    ]
    body = "%body (p: f32[24,64]) -> f32[24,64] {\n" + "\n".join(
        line.replace("%p", "%q") for line in [*arguments, f"  ROOT %s = f32[24,64] {scatter}"]
    ) + "\n}\n"
    call = "fusion(%p0, %p1, %p2), kind=kCustom, calls=%body" if fused else scatter
    program = _program(
        [*arguments, f"  ROOT %r = f32[24,64] {call}"], add + (body if fused else "")
    )
    moved = count_cost(program).hbm_bytes
    assert 2 * 2 * 64 * 4 <= moved <= 2 * 2 * 64 * 4 + 2 * 4  # and perhaps the indices


def test_what_stays_on_the_chip_is_no_traffic():
    program = _program([
        "  %x = f32[1024] parameter(0)",
        "  %y = f32[1024]{0:T(1024)S(1)} copy(%x)",
        "  ROOT %z = f32[1024]{0:T(1024)} negate(%y)",
    ])  # fmt: skip
    assert count_cost(program).hbm_bytes == 2 * 1024 * 4


def test_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        parse("HloModule nothing")


def test_a_kernel_s_metadata_of_several_lines_ends_no_computation():
    kernel = (
        '  %k = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", '
        'frontend_attributes={kernel_metadata={\n"xprof_metadata":"{\\"block_q\\": 256}"\n'
        '}}, metadata={op_name="jit(f)/pallas_call"}'
    )
    program = parse(
        "HloModule m\n\nFileNames\n1 \"a.py\"\n\n"
        f"%body (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n{kernel}\n"
        '  ROOT %r = f32[8]{0} negate(%k)\n}, execution_thread="host"\n\n'
        "ENTRY %main (y: f32[8]) -> f32[8] {\n  %y = f32[8]{0} parameter(0)\n"
        "  ROOT %c = f32[8]{0} call(%y), to_apply=%body\n}\n"
    )
    assert [i.name for i in program.computations["body"]] == ["x", "k", "r"]
    assert program.root("body").operands == ("k",)
    assert 'op_name="jit(f)/pallas_call"' in program.by_name["k"].attributes
    assert program.entry == "main"
