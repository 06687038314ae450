"""Rows of a batch from other devices: the image tokens of hard negatives, chosen among all images of the global batch.

All ways give the same rows. `ring` passes every device's rows around, and each device picks what it wants as they
come by: it works everywhere, holds one other device's rows at a time, and moves all of them. `ragged` sends what was
chosen and nothing else, through `jax.lax.ragged_all_to_all`, which compiles for TPU and GPU, not for CPU. `gather` is
for small things, such as token ids: every device gets all rows.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from blip2_jax.parallel.rows import Rows, rows_of

EXCHANGES = ("ring", "ragged", "gather")


def take_rows(x: jax.Array, index: jax.Array, how: str = "ring") -> jax.Array:
    """x[index] where both are divided over the devices of the surrounding mesh.

    Differentiable; the gradient travels by the ring, whichever way the rows took. If the mesh does not divide x and
    `index` alike, or there is none, this is plain indexing.

    Args:
      x: [B, ...], of any type.
      index: int32[M], global rows from 0 to B - 1, in any order and as often as one likes.
      how: "ring" (every device receives (n - 1) B / n rows, n the devices), "ragged" (M / n rows, and an error of the
        compiler where there is no such operation) or "gather" (as much as "ring", and has all of them at once).

    Returns:
      [M, ...].

    Raises:
      ValueError: `how` is unknown.
    """
    _check(how)
    rows = rows_of(len(x))
    if not rows.axes or rows_of(len(index)).axes != rows.axes:
        return x[index]
    return _take(rows, how, len(x), x, index)


def exchange_bytes(how: str, rows: int, chosen: int, shards: int, row_bytes: int) -> int:
    """What `take_rows` makes each device receive, at most (`ragged` moves nothing that is there already).

    Args:
      how: as in `take_rows`.
      rows: B, of the global batch.
      chosen: M, the length of the global index.
      shards: the devices that share the rows.
      row_bytes: of one row of x.

    Raises:
      ValueError: `how` is unknown, or the rows do not divide over the devices.
    """
    _check(how)
    if rows % shards or chosen % shards:
        raise ValueError(f"{rows} rows, {chosen} of them chosen, do not divide over {shards} devices")
    if shards == 1:
        return 0
    return row_bytes * (chosen // shards if how == "ragged" else (shards - 1) * rows // shards)


def _check(how: str) -> None:
    if how not in EXCHANGES:
        raise ValueError(f"exchange {how!r}: expected one of {', '.join(EXCHANGES)}")


# The derivative is our own: the one jax has for ragged_all_to_all overwrites where a row was taken more than once.
@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _take(rows: Rows, how: str, batch: int, x: jax.Array, index: jax.Array) -> jax.Array:
    device = functools.partial({"ring": _ring, "ragged": _ragged, "gather": _gather}[how], rows)
    return rows.map(device, (rows.spec, rows.spec), rows.spec)(x, index)


def _take_forward(rows, how, batch, x, index):
    return _take(rows, how, batch, x, index), index


def _take_backward(rows, how, batch, index, gradient):
    def device(gradient: jax.Array, index: jax.Array) -> jax.Array:
        own = jax.ShapeDtypeStruct((batch // rows.shards, *gradient.shape[1:]), gradient.dtype)
        return jax.linear_transpose(lambda x: _ring(rows, x, index), own)(gradient)[0]

    return rows.map(device, (rows.spec, rows.spec), rows.spec)(gradient, index), None


_take.defvjp(_take_forward, _take_backward)


def _ring(rows: Rows, x: jax.Array, index: jax.Array) -> jax.Array:
    """A device's part by n - 1 steps to the next device; the rows that visit at step k are those of device me - k."""
    own, devices = len(x), rows.shards
    owner, place = index // own, index % own
    following = [(device, (device + 1) % devices) for device in range(devices)]

    def pick(visiting: jax.Array, taken: jax.Array, step: jax.Array | int) -> jax.Array:
        here = owner == (rows.index() - step) % devices
        return jnp.where(here.reshape(-1, *[1] * (x.ndim - 1)), visiting[place], taken)

    def step(carry: tuple[jax.Array, jax.Array], number: jax.Array):
        visiting, taken = carry
        visiting = jax.lax.ppermute(visiting, rows.axes, following)
        return (visiting, pick(visiting, taken, number)), None

    taken = pick(x, jnp.zeros((len(index), *x.shape[1:]), x.dtype), 0)
    (_, taken), _ = jax.lax.scan(step, (x, taken), jnp.arange(1, devices))
    return taken


def _gather(rows: Rows, x: jax.Array, index: jax.Array) -> jax.Array:
    return rows.gather(x)[index]


def _ragged(rows: Rows, x: jax.Array, index: jax.Array) -> jax.Array:
    """A device's part by one exchange, straight out of its rows: to each device m updates of a row or of nothing.

    Update k to a device is the row that its index k asks for, if it is here.
    """
    own, devices = len(x), rows.shards
    wanted = rows.gather(index)  # [n m], device by device.
    here = wanted // own == rows.index()
    send_sizes = here.astype(jnp.int32)
    input_offsets = jnp.where(here, wanted % own, 0)
    output_offsets = jnp.tile(jnp.arange(len(index), dtype=jnp.int32), devices)
    receive_sizes = (jnp.arange(devices)[:, None] == (index // own)[None]).astype(jnp.int32).reshape(-1)
    taken = jnp.zeros((len(index), *x.shape[1:]), x.dtype)
    return jax.lax.ragged_all_to_all(
        x, taken, input_offsets, send_sizes, output_offsets, receive_sizes, axis_name=rows.axes
    )
