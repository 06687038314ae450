"""The one mesh of a run, and how batches and parameters lie on it."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")  # What the rows of a batch are divided over.
_AUTO = (AxisType.Auto,) * len(AXES)  # Versions of jax differ in what they take without being told.


def parse_mesh(text: str, devices: int) -> tuple[int, ...]:
    """Sizes of the axes from "data=-1,fsdp=1,tensor=1"; one of them may be -1, which takes what remains.

    Raises:
      ValueError: an unknown axis, or sizes that do not fit the number of devices.
    """
    sizes = dict.fromkeys(AXES, 1)
    for item in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\w+)\s*=\s*(-?\d+)\s*", item)
        if match is None or match[1] not in AXES:
            raise ValueError(f"mesh {text!r}: expected AXIS=SIZE with AXIS one of {', '.join(AXES)}, found {item!r}")
        sizes[match[1]] = int(match[2])
    known = math.prod(size for size in sizes.values() if size != -1)
    unknown = [axis for axis, size in sizes.items() if size == -1]
    if len(unknown) == 1 and known > 0 and devices % known == 0:
        sizes[unknown[0]] = devices // known
    if math.prod(sizes.values()) != devices or min(sizes.values()) < 1:
        raise ValueError(f"mesh {text!r} does not fit {devices} devices: the product of its axes must be {devices}")
    return tuple(sizes[axis] for axis in AXES)


def make_mesh(text: str, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices, or of `devices`.

    A TPU pod of several slices has a fast network within each and a slower one between them: there `data` is divided
    over the slices first, so that parts of one parameter never cross the slower network.

    Raises:
      ValueError: the mesh does not fit the devices, or `data` does not divide by the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes, slices = parse_mesh(text, len(devices)), count_slices(devices)
    if sizes[0] % slices:
        raise ValueError(
            f"mesh {text!r}: data = {sizes[0]} does not divide by the {slices} slices of {len(devices) // slices} "
            f"chips each: make it a multiple of {slices}, so that fsdp and tensor stay within a slice"
        )
    # Where no product of a chip network's axes makes an axis of ours, one of them may be divided.
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        placed = mesh_utils.create_device_mesh(sizes, **options)
    else:
        placed = mesh_utils.create_hybrid_device_mesh((sizes[0] // slices, *sizes[1:]), (slices, 1, 1), **options)
    return Mesh(placed, AXES, axis_types=_AUTO)


def one_device() -> Mesh:
    """Of the first device of this process alone."""
    return make_mesh("", jax.local_devices()[:1])


def count_slices(devices: Sequence[jax.Device]) -> int:
    """Into how many slices a TPU pod's devices are divided; 1 elsewhere, where a slice_index says nothing of networks.

    Raises:
      ValueError: the slices are of different sizes.
    """
    if devices[0].platform != "tpu":
        return 1
    sizes = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the slices must have equally many chips, found {dict(sorted(sizes.items()))}")
    return len(sizes)


def abstract_mesh(text: str, devices: int) -> AbstractMesh:
    """The mesh of as many devices as are not there, to say how things would lie on it."""
    return AbstractMesh(parse_mesh(text, devices), AXES, axis_types=_AUTO)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows divided over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are divided."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def check_batch_size(batch_size: int, mesh: Mesh, multiple: int = 1, name: str = "batch_size") -> None:
    """Raise ValueError unless every device that shares a batch gets as many rows as the others, a multiple of some.

    Args:
      batch_size: B.
      mesh: that the batch is divided over.
      multiple: what a device's rows are to be a multiple of.
      name: of the setting.
    """
    shards = batch_shards(mesh)
    if batch_size < 1 or batch_size % shards:
        raise ValueError(f"{name} {batch_size} does not divide over data x fsdp = {shards} devices: take a multiple")
    if multiple < 1 or batch_size % (multiple * shards):
        raise ValueError(
            f"{name} {batch_size} gives each of data x fsdp = {shards} devices {batch_size // shards} rows: "
            f"expected a multiple of {multiple}, for pieces of one size and, in stage 1, every n-th row in ITM and ITG"
        )


def own_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """int[b]: which rows of a batch the devices of this process need, in ascending order; all if it is the only one."""
    needed = batch_sharding(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(np.concatenate([np.arange(batch_size)[index] for index in needed]))


def global_batch(batch: Mapping[str, np.ndarray], batch_size: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The batch on the mesh, made of what every process has: the rows that `own_rows` says, [b, ...] -> [B, ...].

    Raises:
      ValueError: a field has another number of rows.
    """
    rows, sharding = own_rows(batch_size, mesh), batch_sharding(mesh)
    for name, array in batch.items():
        if len(array) != len(rows):
            raise ValueError(f"{name} has {len(array)} rows, but the devices of this process need {len(rows)}")

    def place(array: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            return array[np.searchsorted(rows, np.arange(batch_size)[index[0]])]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), sharding, part)

    return {name: place(np.asarray(array)) for name, array in batch.items()}
