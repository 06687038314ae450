"""What the devices of a compiled program send each other in a step."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np

from blip2_jax.parallel.hlo import Array, Computation, Instruction, Program

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_REDUCING = ("all-reduce", "reduce-scatter")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^()]*(?:\([^()]*\))?)\))? \{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction by which devices exchange arrays; sizes are those of one device and one execution.

    Attributes:
      kind: one of KINDS.
      arrays: what comes out of an all-gather, what goes into any other.
      bytes: of these.
      sent: bytes that a device puts on the wire if data go round in a ring, the way that sends least.
      count: executions in a step.
      group: the devices of the first group, by their place in the mesh.
      between_slices: data leave the slice, over the slower network.
      origin: what of the traced program it stems from.
    """

    kind: str
    arrays: tuple[Array, ...]
    bytes: int
    sent: float
    count: int
    group: tuple[int, ...]
    between_slices: bool
    origin: str


def _iota(text: str) -> np.ndarray:
    """Device numbers as XLA abbreviates them: [4,2]<=[2,4]T(1,0), or [2,4]T(1,0), or a plain list of numbers."""
    match = re.fullmatch(r"(?:\[([\d,]+)\]<=)?\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if match is None:
        return np.array([int(number) for number in text.split(",")])
    numbers = lambda part: [int(number) for number in part.split(",")]
    ids = np.arange(math.prod(numbers(match[2]))).reshape(numbers(match[2]))
    ids = ids.transpose(numbers(match[3])) if match[3] else ids
    return ids.reshape(numbers(match[1])) if match[1] else ids


def _mesh_groups(axes: str, devices: str, grouped: str) -> np.ndarray:
    """Groups by axes of a mesh: 'a'=4,'b'=2 and {'b','a':(2)2}, where (2)2 is the part of size 2 behind one of 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = (_iota(devices) if devices else np.arange(math.prod(sizes.values()))).reshape(-1)
    wanted = [
        (name, int(before or 1), int(size or sizes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", grouped)
    ]
    shape, places = [], {}
    for name, whole in sizes.items():
        edges = {1, whole} | {edge for part, before, size in wanted if part == name for edge in (before, before * size)}
        for start, end in itertools.pairwise(sorted(edges)):
            places[name, start, end] = len(shape)
            shape.append(end // start)
    inner = [
        place
        for name, before, size in wanted
        for (part, start, end), place in places.items()
        if part == name and before <= start and end <= before * size
    ]
    outer = [axis for axis in range(len(shape)) if axis not in inner]
    size = math.prod(shape[axis] for axis in inner)
    return ids.reshape(shape).transpose(outer + inner).reshape(-1, size)


def replica_groups(attributes: str, devices: int) -> list[list[int]]:
    """The groups that exchange data, in any of the ways that XLA writes them; of a permutation its pairs.

    Raises:
      ValueError: none of these ways.
    """
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if pairs:
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])]
    mesh = _MESH.search(attributes)
    if mesh:
        return _mesh_groups(mesh[1], mesh[2] or "", mesh[3]).tolist()
    iota = re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", attributes)
    if iota:
        return _iota(iota[1]).tolist()
    if "replica_groups={}" in attributes:
        return [list(range(devices))]
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", attributes)
    if listed is None:
        raise ValueError(f"no replica groups that are understood in {attributes[:200]!r}")
    return [[int(number) for number in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]


def _sent(kind: str, size: int, members: int) -> float:
    """Bytes that a device sends, of `size` as `Collective.bytes`."""
    others = (members - 1) / members
    return {"all-reduce": 2 * others * size, "collective-permute": size, "collective-broadcast": size}.get(
        kind, others * size
    )


def _collective(
    item: Instruction, computation: Computation, count: int, devices: int, per_slice: int
) -> Collective | None:
    kind = item.opcode.removesuffix("-start")
    groups = replica_groups(item.attributes, devices)
    if not groups:
        return None  # The part within a slice of a permutation that has none.
    operands = tuple(array for name in item.operands for array in computation[name].results)
    arrays = operands[:1] if kind == "ragged-all-to-all" else operands
    if kind == "all-gather":
        arrays = item.results[len(operands) :] if item.opcode.endswith("-start") else item.results
    size = sum(array.bytes for array in arrays)
    apart = any(len({member // per_slice for member in group}) > 1 for group in groups)
    members = devices if kind == "collective-permute" else len(groups[0])
    return Collective(kind, arrays, size, _sent(kind, size, members), count, tuple(groups[0]), apart, item.origin)


def _transfer(item: Instruction, computation: Computation, count: int, slices: int) -> Collective:
    """What XLA for TPUs makes of a collective between slices: each device's host sends a part, and gets others."""
    meeting = item.attribute(r'rendezvous="([^"]*)"')
    kind = next((kind for kind in KINDS if meeting.replace("_", "-").startswith(kind)), "collective-permute")
    array = computation[item.operands[0]].results[0]
    sent = _sent(kind, array.bytes, slices) if kind in _REDUCING else (slices - 1) * array.bytes
    return Collective(kind, (array,), array.bytes, sent, count, (), True, item.origin or meeting)


def collectives(program: Program, devices: int, slices: int = 1) -> list[Collective]:
    """All exchanges of a step, those that send most first.

    Args:
      program: of one device.
      devices: all that run it.
      slices: equal parts of these, in order, with a slower network between them.
    """
    found, chains = [], set()
    for item, computation, count in program.instructions():
        if item.opcode.removesuffix("-start") in KINDS:
            # An exchange that goes on beside several fusions stands in each of them, as links of one chain.
            chain = item.attribute(r'chain_id="(\d+)"')
            if chain and (chain, item.attribute(r"channel_id=(\d+)")) in chains:
                continue
            chains.add((chain, item.attribute(r"channel_id=(\d+)")))
            found.append(_collective(item, computation, count, devices, devices // slices))
        elif item.opcode == "send" and "xla_megascale" in item.attributes:
            found.append(_transfer(item, computation, count, slices))
    return sorted(filter(None, found), key=lambda collective: -collective.sent * collective.count)
