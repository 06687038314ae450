"""Rows, exchanges and the mesh: blip2_jax/parallel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from blip2_jax.checkpoints.store import TrainState
from blip2_jax.parallel import exchange, mesh, sharding
from blip2_jax.parallel.rows import Rows
from tests.shapes.lengths import B, D, E, N, P, T, U, W, b
from tests.shapes.promises import KEY, MESH, ROWS, Late, bfloat16, float32, int32, int64, on_a_device, ran, traced

OWN, ALL = bfloat16[b, T], bfloat16[B, T]
DEVICES = Late(lambda _: mesh.make_mesh("data=2,fsdp=2", jax.local_devices()[:N]))
PARAMETERS = {"vision_proj": {"kernel": float32[D, E], "bias": float32[E]}}
STATE = TrainState(int32[()], KEY, PARAMETERS, {"mu": PARAMETERS, "count": int32[()]}, int32[2])


def everywhere(value: Any, tree: Any) -> Any:
    """A value at every leaf of a tree."""
    return jax.tree.map(lambda _: value, tree)


PROMISES = [
    # Each device has one row of what comes of its rows.
    traced(
        Rows.map,
        *(ROWS, lambda x: x[:1], PartitionSpec(("data", "fsdp")), PartitionSpec(("data", "fsdp"))),
        then=lambda mapped: mapped(jnp.zeros((B, T))),
        on=(MESH,),
        gives=float32[N, T],
    ),
    traced(Rows.keep, ROWS, bfloat16[T, B], 1, on=(MESH,), gives=bfloat16[T, B]),
    traced(Rows.pieces, ROWS, ALL, 3, on=(MESH,), gives=bfloat16[3, 8, T]),
    traced(Rows.whole, ROWS, bfloat16[3, 8, T], on=(MESH,), gives=ALL),
    on_a_device(Rows.index, ROWS, gives=int32[()]),
    on_a_device(Rows.sum, ROWS, (OWN, int32[T]), gives=(OWN, int32[T])),
    on_a_device(Rows.max, ROWS, OWN, gives=OWN),
    on_a_device(Rows.min, ROWS, OWN, gives=OWN),
    on_a_device(Rows.gather, ROWS, OWN, gives=ALL),
    on_a_device(Rows.scatter_sum, ROWS, ALL, gives=OWN),
    *[
        traced(exchange.take_rows, bfloat16[B, P, W], int32[U], how, gives=bfloat16[U, P, W])
        for how in ("ring", "ragged", "gather")
    ],
    ran(mesh.own_rows, B, DEVICES, gives=int64[B]),
    ran(mesh.global_batch, {"x": float32[B, T], "y": int32[B]}, B, DEVICES, gives={"x": float32[B, T], "y": int32[B]}),
    traced(sharding.specs, PARAMETERS, MESH, gives=everywhere(PartitionSpec, PARAMETERS)),
    traced(sharding.shardings, PARAMETERS, MESH, gives=everywhere(NamedSharding, PARAMETERS)),
    traced(sharding.state_shardings, STATE, MESH, gives=everywhere(NamedSharding, STATE)),
    ran(sharding.put, float32[D, E], DEVICES.then(mesh.replicated), gives=float32[D, E]),
    ran(
        sharding.placer,
        *(PARAMETERS, DEVICES),
        then=lambda place: place("vision_proj/kernel", np.zeros((D, E), np.float32)),
        gives=float32[D, E],
    ),
]
