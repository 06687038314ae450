"""How long a step takes at best: the roofline of a chip's arithmetic, its memory and its networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

from blip2_jax.parallel.chips import Topology
from blip2_jax.parallel.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds a step if one thing alone took time; every rate is the datasheet's, which no program reaches.

    Attributes:
      compute: the matrix products, at the peak rate.
      memory: what instructions read from the main memory and write to it.
      network: what chips of a slice send each other.
      slices: what slices send each other.
    """

    compute: float
    memory: float
    network: float
    slices: float

    @property
    def seconds(self) -> float:
        """With everything at the same time: the roofline, below which no step can be."""
        return max(self.by_name().values())

    @property
    def seconds_in_turn(self) -> float:
        """With nothing at the same time."""
        return sum(self.by_name().values())

    @property
    def bound(self) -> str:
        """What takes longest."""
        times = self.by_name()
        return max(times, key=times.get)

    def by_name(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def links(coordinates: Sequence[Sequence[int]], topology: Topology) -> int:
    """How many of a chip's links an exchange among chips at such coordinates can use, all in one direction.

    Along a dimension that the exchange spans whole and whose ends are linked, data go both ways round; along others the
    chip at the end has one neighbour, and the exchange its pace.
    """
    count = 0
    for side, places in zip(topology.sides, zip(*coordinates, strict=True), strict=False):
        spanned = len(set(places))
        if spanned > 1:
            count += 2 if spanned == side and side >= topology.chip.ring else 1
    return count


def seconds(collective: Collective, devices: Sequence[jax.Device], topology: Topology) -> float:
    """How long one execution of an exchange occupies the network.

    Args:
      collective: the exchange.
      devices: of the mesh, in its order.
      topology: where they are.
    """
    if collective.between_slices:
        return collective.sent / topology.chip.dcn_bandwidth
    if collective.kind == "collective-permute":
        return collective.sent / topology.chip.link_bandwidth
    used = links([devices[member].coords for member in collective.group], topology)
    return collective.sent / (topology.chip.link_bandwidth * used) if used else 0.0


def estimate(
    flops: float, traffic: float, collectives: Sequence[Collective], devices: Sequence[jax.Device], topology: Topology
) -> Estimate:
    """The estimate of a step.

    Args:
      flops: operations of one device, recomputed ones too.
      traffic: bytes of one device's main memory that are read or written.
      collectives: of the compiled step.
      devices: of the mesh, in its order.
      topology: where they are.
    """
    network = {True: 0.0, False: 0.0}
    for collective in collectives:
        network[collective.between_slices] += collective.count * seconds(collective, devices, topology)
    chip = topology.chip
    return Estimate(flops / chip.flops, traffic / chip.hbm_bandwidth, network[False], network[True])
