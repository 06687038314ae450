"""Rows from other devices: those asked for, by either way."""

import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax.parallel import exchange
from tests.meshes import MESHES, surrounding


def emulated(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What jax.lax.ragged_all_to_all documents, update after update, by gathering everything: for CPU."""
    mine, devices = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    gather = lambda x: jax.lax.all_gather(x, axis_name)
    operands, starts, sizes, places = map(gather, (operand, input_offsets, send_sizes, output_offsets))
    each = len(input_offsets) // devices
    row = jnp.arange(len(output))
    for source in range(devices):
        for number in range(each):
            update = mine * each + number  # Of what `source` sends, those to this device.
            start, size, place = starts[source, update], sizes[source, update], places[source, update]
            here = (row >= place) & (row < place + size)
            sent = operands[source][jnp.clip(start + row - place, 0, len(operand) - 1)]
            output = jnp.where(here.reshape(-1, *[1] * (output.ndim - 1)), sent, output)
    # Sizes that sender and receiver do not agree on hang or destroy memory on a real machine: here, nothing comes.
    agreed = (sizes.reshape(devices, devices, each)[:, mine].reshape(-1) == recv_sizes).all()
    return jnp.where(agreed, output, jnp.zeros_like(output))


@pytest.fixture(params=exchange.EXCHANGES)
def how(request, monkeypatch):
    if request.param == "ragged":
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    return request.param


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_and_gradients_are_those_of_indexing(rng, mesh, how):
    x = jnp.asarray(rng.normal(size=(16, 3, 2)), jnp.float32)
    index = jnp.asarray(rng.integers(0, 16, 16), jnp.int32)
    assert len(set(index.tolist())) < 16  # A row is taken more than once, and another not at all.
    weight = jnp.asarray(rng.normal(size=(16, 3, 2)), jnp.float32)
    expected = jax.value_and_grad(lambda x: (x[index] * weight).sum())(x)
    with surrounding(mesh):
        taken = jax.jit(exchange.take_rows, static_argnums=2)(x, index, how)
        loss = lambda x: (exchange.take_rows(x, index, how) * weight).sum()
        found = jax.jit(jax.value_and_grad(loss))(x)
    chex.assert_shape(taken, (16, 3, 2))
    chex.assert_trees_all_equal(taken, x[index])
    chex.assert_trees_all_close(found, expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32, jnp.uint32, jnp.bool_])
def test_rows_of_any_type(rng, dtype, how):
    x = jnp.asarray(rng.integers(0, 2**31, (8, 5)), jnp.int32).astype(dtype)
    index = jnp.asarray(rng.integers(0, 8, 8), jnp.int32)
    with surrounding("data=4"):
        taken = jax.jit(exchange.take_rows, static_argnums=2)(x, index, how)
    assert taken.dtype == dtype
    chex.assert_trees_all_equal(taken, x[index])


def test_ids_are_taken_inside_of_a_gradient(rng, how):
    """Token ids travel beside features; they have no gradient to give."""
    ids, x = jnp.arange(8), jnp.asarray(rng.normal(size=(8, 2)), jnp.float32)
    index = jnp.asarray(rng.integers(0, 8, 8), jnp.int32)
    loss = lambda x: (exchange.take_rows(x, index, how) * exchange.take_rows(ids, index, how)[:, None]).sum()
    with surrounding("data=2,fsdp=2"):
        found = jax.jit(jax.grad(loss))(x)
    np.testing.assert_allclose(found, jax.grad(lambda x: (x[index] * ids[index][:, None]).sum())(x), rtol=1e-6)


@pytest.mark.parametrize(("batch", "chosen"), [(16, 4), (4, 16), (16, 6), (6, 8), (1, 1)])
def test_as_many_rows_as_are_asked_for(rng, batch, chosen, how):
    """Of a piece of the batch, for instance; where the mesh does not divide both, the compiler exchanges."""
    x = jnp.asarray(rng.normal(size=(batch, 3)), jnp.float32)
    index = jnp.asarray(rng.integers(0, batch, chosen), jnp.int32)
    with surrounding("data=2,fsdp=2"):
        take = lambda x: exchange.take_rows(x, index, how)
        found = jax.jit(lambda x: (take(x), jax.grad(lambda x: (take(x) ** 2).sum())(x)))(x)
    chex.assert_trees_all_close(found, (x[index], jax.grad(lambda x: (x[index] ** 2).sum())(x)), rtol=1e-6)


def compiled(function, rows: int = 64, width: int = 32) -> str:
    """The program of one of eight devices."""
    with surrounding("data=8"):
        split = jax.NamedSharding(jax.sharding.get_mesh(), jax.P("data"))
        x = jax.ShapeDtypeStruct((rows, width), jnp.float32, sharding=split)
        index = jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=split)
        return jax.jit(function, out_shardings=split).lower(x, index).compile().as_text()


@pytest.mark.parametrize("function", [exchange.take_rows, lambda x, i: jax.vjp(exchange.take_rows, x, i)[1](x)[0]])
def test_the_ring_never_holds_all_rows(function):
    text = compiled(function)
    assert "collective-permute" in text
    assert not re.search("all-gather|all-reduce|all-to-all", text)
    sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    assert max(sizes) < 64 * 32
    plain = compiled(lambda x, index: x[index])  # The compiler's own way holds them all: this can fail.
    assert max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", plain)) >= 64 * 32


def test_ragged_lowers_to_one_exchange_out_of_the_own_rows():
    """For TPU; compiling it needs one."""
    with surrounding("data=4,fsdp=2"):
        arguments = jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.int32)
        traced = jax.jit(lambda x, index: exchange.take_rows(x, index, "ragged")).trace(*arguments)
        text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("@ragged_all_to_all(") == 1
    operand = re.search(r"@ragged_all_to_all\(.*?: \(tensor<([^>]*)>, tensor<([^>]*)>, tensor<([^>]*)>", text)
    assert operand.groups() == ("8x32xf32", "8x32xf32", "64xi32")


def test_bytes():
    sizes = {"rows": 64, "chosen": 32, "shards": 8, "row_bytes": 100}
    assert exchange.exchange_bytes("ring", **sizes) == 7 * 8 * 100
    assert exchange.exchange_bytes("ragged", **sizes) == 4 * 100
    for how in exchange.EXCHANGES:
        assert exchange.exchange_bytes(how, **sizes | {"shards": 1}) == 0
    with pytest.raises(ValueError, match="64 rows, 32 of them chosen, do not divide over 48 devices"):
        exchange.exchange_bytes("ring", **sizes | {"shards": 48})


def test_an_unknown_way_is_an_error():
    with pytest.raises(ValueError, match="exchange 'bus': expected one of ring, ragged, gather"):
        exchange.take_rows(jnp.zeros((4, 2)), jnp.zeros(4, jnp.int32), "bus")
    with pytest.raises(ValueError, match="exchange 'bus'"):
        exchange.exchange_bytes("bus", 8, 8, 2, 1)
