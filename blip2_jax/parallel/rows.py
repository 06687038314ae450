"""The rows of a batch on the mesh of the surrounding `jax.set_mesh`: where they lie, and what devices tell each other.

Rows are divided over the axes `data` and `fsdp`. Without a mesh, and for a batch that the axes do not divide, every
device has all rows and the exchanges below do nothing: one code for one device and for many. (The trainer refuses a
batch that does not divide; recorded batches of three may do as they like.)
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from blip2_jax.parallel.mesh import ROW_AXES

_FREE = PartitionSpec.UNCONSTRAINED


@dataclasses.dataclass(frozen=True)
class Rows:
    """How B rows are divided; its methods but `map` and `keep` are for functions that run on a device's own rows.

    Attributes:
      mesh: the surrounding mesh, or None.
      axes: those over which the rows are divided, the slowest first.
    """

    mesh: AbstractMesh | None
    axes: tuple[str, ...]

    @property
    def shards(self) -> int:
        """Into how many equal parts the rows are divided."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes) if self.axes else 1

    @property
    def spec(self) -> PartitionSpec:
        """Of an array whose first axis is the rows."""
        return PartitionSpec(self.axes or None)

    def map(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`function` run by every device on its own part; specs as `jax.shard_map` takes them."""
        if self.mesh is None:
            return function
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)

    def keep(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """Hold the rows of `x`, its axis number `axis`, where the batch has them."""
        if not self.axes:
            return x
        return jax.lax.with_sharding_constraint(
            x, PartitionSpec(*[_FREE] * axis, self.axes, *[_FREE] * (x.ndim - axis - 1))
        )

    def pieces(self, x: jax.Array, count: int) -> jax.Array:
        """[B, ...] -> [count, B / count, ...], each piece as many rows of every device, neighbours there."""
        own = len(x) // self.shards
        if own % count:
            raise ValueError(f"{len(x)} rows on {self.shards} devices do not divide into {count} pieces")
        split = x.reshape(self.shards, count, own // count, *x.shape[1:])
        return self.keep(split.swapaxes(0, 1).reshape(count, len(x) // count, *x.shape[1:]), axis=1)

    def whole(self, x: jax.Array) -> jax.Array:
        """The inverse of `pieces`."""
        count, rows = x.shape[:2]
        split = x.reshape(count, self.shards, rows // self.shards, *x.shape[2:])
        return self.keep(split.swapaxes(0, 1).reshape(count * rows, *x.shape[2:]))

    def index(self) -> jax.Array | int:
        """Which part is this device's."""
        return jax.lax.axis_index(self.axes) if self.axes else 0

    def sum(self, x: Any) -> Any:
        """Over devices, of the same place in arrays of any shape; so `max` and `min`."""
        return jax.lax.psum(x, self.axes) if self.axes else x

    def max(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmax(x, self.axes) if self.axes else x

    def min(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmin(x, self.axes) if self.axes else x

    def gather(self, x: jax.Array) -> jax.Array:
        """[b, ...] of every device -> [B, ...] on every device."""
        return jax.lax.all_gather(x, self.axes, tiled=True) if self.axes else x

    def scatter_sum(self, x: jax.Array) -> jax.Array:
        """[B, ...] of every device -> the sum over devices of this device's rows, [b, ...]."""
        return jax.lax.psum_scatter(x, self.axes, tiled=True) if self.axes else x


def rows_of(batch: int) -> Rows:
    """How a batch of this many rows lies on the surrounding mesh: over the longest run of axes that divides it."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return Rows(None, ())
    axes: tuple[str, ...] = ()
    for axis in ROW_AXES:
        if batch % math.prod(mesh.shape[name] for name in (*axes, axis)):
            break
        axes += (axis,)
    return Rows(mesh, axes)
