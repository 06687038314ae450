"""The one mesh of a run, and how batches and parameters lie on it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
ROW_AXES = ("data", "fsdp")  # What the rows of a batch are divided over.


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
    """The mesh of all devices, or of `devices`."""
    devices = jax.devices() if devices is None else devices
    # jax.make_mesh allows it for TPU v5e alone: an axis may take a part of a dimension of the chips' network, else
    # fsdp=8 would have no place in a slice of 4x4x4.
    ordered = mesh_utils.create_device_mesh(parse_mesh(text, len(devices)), devices, allow_split_physical_axes=True)
    return Mesh(ordered, AXES, axis_types=(AxisType.Auto,) * 3)


def abstract_mesh(text: str, devices: int) -> AbstractMesh:
    """The mesh of as many devices as are not there, to say how things would lie on it."""
    return AbstractMesh(parse_mesh(text, devices), AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows divided over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(ROW_AXES))


def check_batch_size(batch_size: int, mesh: Mesh) -> None:
    """Raise ValueError unless the batch divides over the devices that share it."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % shards:
        raise ValueError(f"batch_size {batch_size} does not divide over data x fsdp = {shards} devices")
