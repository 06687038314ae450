"""Compiled programs are read right: loops count as often as they go round, and slices of arrays as slices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax.parallel import hlo


def compiled(function, *shapes):
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.parse(jax.jit(function).lower(*arguments).compile().as_text())


def runs(program, opcode):
    return sum(count for item, _, count in program.instructions() if item.opcode == opcode)


def test_nested_loops_multiply():
    def function(x, w):
        inner = lambda x, _: (jnp.tanh(x @ w), None)
        outer = lambda x, _: (jax.lax.scan(inner, x, None, length=5)[0] @ w, None)
        return jax.lax.scan(outer, x, None, length=3)[0]

    program = compiled(function, (64, 64), (64, 64))
    assert runs(program, "dot") == 3 * 5 + 3
    assert program.unknown_loops == []


def test_a_loop_that_does_not_start_at_zero():
    body = lambda index, x: x @ x + index
    assert runs(compiled(lambda x: jax.lax.fori_loop(4, 11, body, x), (64, 64)), "dot") == 7


def test_a_loop_that_depends_on_data_counts_once_and_is_named():
    def function(x):
        return jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x @ x, x)

    program = compiled(function, (64, 64))
    assert runs(program, "dot") == 1
    assert len(program.unknown_loops) == 1
    assert "while" in program.unknown_loops[0]


def test_traffic_of_a_product():
    """Two operands are read and one result is written."""
    program = compiled(lambda a, b: a @ b, (128, 256), (256, 512))
    assert program.traffic() == 4 * (128 * 256 + 256 * 512 + 128 * 512)


def test_a_loop_over_layers_reads_each_layer_once():
    """The stacked weights are an operand of every round, of which one layer is read; the stacked outputs likewise."""
    layers, width = 16, 256

    def function(x, stack):
        return jax.lax.scan(lambda x, w: ((y := jnp.tanh(x @ w)), y), x, stack)

    traffic = compiled(function, (width, width), (layers, width, width)).traffic()
    matrix = 4 * width**2
    # At the least a layer's weights, its input and its output, twice; at the most some copies of these.
    assert 4 * layers * matrix <= traffic <= 14 * layers * matrix


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("f32[2,3]{1,0}", [("f32", (2, 3), 24)]),
        (
            "(bf16[8,65]{1,0:T(8,128)(2,1)S(1)}, s32[], token[])",
            [("bf16", (8, 65), 1040), ("s32", (), 4), ("token", (), 0)],
        ),
        ("(pred[7]{0}, (u4[5]{0}, f8e4m3fn[3]{0}))", [("pred", (7,), 7), ("u4", (5,), 3), ("f8e4m3fn", (3,), 3)]),
    ],
)
def test_arrays(text, expected):
    line = f'  ROOT %a.1 = {text} custom-call(%b), custom_call_target="x"'
    program = hlo.parse(f"ENTRY %main (b: f32[]) -> f32[] {{\n  %b = f32[] parameter(0)\n{line}\n}}")
    root = program.computations["main"]["a.1"]
    assert [(array.dtype, array.shape, array.bytes) for array in root.results] == expected
    assert [array.near for array in root.results] == ["S(1)" in text] + [False] * (len(expected) - 1)
    assert (root.opcode, root.operands, root.root) == ("custom-call", ("b",), True)


def test_what_is_no_program_is_an_error():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.parse("module @jit_step {}")


def test_a_sliced_update_writes_the_slice():
    """As XLA for TPUs writes it: the fusion returns the whole array, of which it has replaced one row."""
    text = """
%fused (p0: f32[100,8], p1: f32[1,8], p2: s32[]) -> f32[100,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = f32[1,8]{1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[100,8]{1,0} dynamic-update-slice(%p0, %p1, %p2, %zero)
}

ENTRY %main (a: f32[100,8], b: f32[1,8], c: s32[]) -> f32[100,8] {
  %a = f32[100,8]{1,0} parameter(0)
  %b = f32[1,8]{1,0} parameter(1)
  %c = s32[] parameter(2)
  ROOT %fusion = f32[100,8]{1,0} fusion(%a, %b, %c), kind=kLoop, calls=%fused
}
"""
    assert hlo.parse(text).traffic() == 2 * 32 + 4


def test_sizes_agree_with_numpy():
    for dtype in ("bfloat16", "float32", "int8", "uint32", "bool"):
        x = jax.ShapeDtypeStruct((3, 5), dtype)
        program = hlo.parse(jax.jit(lambda x: x).lower(x).compile().as_text())
        parameter = next(item for item, _, _ in program.instructions() if item.opcode == "parameter")
        assert parameter.results[0].bytes == 15 * np.dtype(x.dtype).itemsize
