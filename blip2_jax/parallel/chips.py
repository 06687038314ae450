"""Chips by name: what their datasheets promise, and the topologies of TPU pods that can be compiled for without one.

Sources: for GPUs NVIDIA's datasheet of each; for TPUs the pages "TPU v4", "TPU v5e", "TPU v5p" and "TPU v6e" of
https://docs.cloud.google.com/tpu/docs for operations, memory and networks; that of v4 between chips (2,400 Gbit/s each)
is in Google's announcement of v5p.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re

import jax
from jax.experimental import topologies

GIB = 2**30

# Else libtpu asks a cloud's metadata server what machine this is, complains when there is no answer, and refuses to be
# used by two processes at once, which only a TPU's owner must be.
_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU; a chip is one device to jax.

    Attributes:
      name: in a topology, as in "v5e:16x16".
      flops: dense bfloat16 operations a second.
      hbm_bytes: of memory.
      hbm_limit_bytes: of it for a program; the rest is the runtime's. No page tells it: it is what the compiler of
        libtpu 0.0.42 names when a program is too large.
      hbm_bandwidth: bytes a second.
      dimensions: of the torus that the chips of a slice form.
      link_bandwidth: bytes a second from a chip to one neighbour, in one direction; a chip has two neighbours in each
        dimension.
      ring: the smallest side of a slice whose ends are linked, too.
      dcn_bandwidth: bytes a second that a chip's share of its host's network takes to other slices.
      options: how libtpu is told that a chip is one device.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_limit_bytes: int
    hbm_bandwidth: float
    dimensions: int
    link_bandwidth: float
    ring: int
    dcn_bandwidth: float
    options: dict = dataclasses.field(default_factory=dict)


CHIPS = {
    chip.name: chip
    for chip in (
        # 275 TFLOP/s, 32 GiB, 1,200 GB/s; 2,400 Gbit/s over six links. Its page is silent about the data center
        # network: as v5p, which has the same hosts of four chips.
        Chip("v4", 275e12, 32 * GIB, int(30.75 * GIB), 1.2e12, 3, 50e9, 4, 6.25e9, {"chip_config_name": "megacore"}),
        # 197 TFLOP/s, 16 GB, 819 GB/s; 1,600 Gbit/s over four links; 6.4 Tbit/s a pod of 256.
        Chip("v5e", 197e12, 16 * GIB, int(15.75 * GIB), 819e9, 2, 50e9, 16, 3.125e9),
        # 459 TFLOP/s, 95 GiB, 2,765 GB/s; 4,800 Gbit/s over six links; 50 Gbit/s a chip. The compiler has a little more
        # memory than the page.
        Chip("v5p", 459e12, 95 * GIB, int(95.74 * GIB), 2.765e12, 3, 100e9, 4, 6.25e9),
        # 918 TFLOP/s, 32 GB, 1,600 GB/s; 3,200 Gbit/s over four links; 25.6 Tbit/s a pod of 256.
        Chip("v6e", 918e12, 32 * GIB, int(31.25 * GIB), 1.6e12, 2, 100e9, 16, 12.5e9),
    )
}


# Dense bfloat16 operations a second, as datasheets have them: theirs with sparsity are twice as much.
_GPUS = {
    r"B200": 2250e12,
    r"H200 NVL|H100 NVL": 835.5e12,
    r"H100 PCIe": 756.5e12,
    r"H100|H200|GH200": 989.5e12,  # SXM.
    r"A100": 312e12,
    r"A40": 149.7e12,
    r"A30": 165e12,
    r"A10": 125e12,
    r"L40S": 362.05e12,
    r"L40": 181.05e12,
    r"L4": 121e12,
}
# What jax calls the chips that a topology names.
_TPUS = {"v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v5p": "v5p", "v6 lite": "v6e", "v6e": "v6e"}


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations a second of a device, by `jax.Device.device_kind`; None: no datasheet here has it."""
    name = device_kind.removeprefix("TPU ")
    if name != device_kind:
        return CHIPS[_TPUS[name]].flops if name in _TPUS else None
    for pattern, flops in _GPUS.items():
        if re.search(rf"\bNVIDIA ({pattern})\b", device_kind):
            return flops
    return None


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of a pod.

    Attributes:
      chip: what they are made of.
      sides: of one slice, in chips.
      slices: how many, with the data center network between them.
    """

    chip: Chip
    sides: tuple[int, ...]
    slices: int = 1

    @property
    def count(self) -> int:
        """Chips in all."""
        return math.prod(self.sides) * self.slices

    def __str__(self) -> str:
        text = f"{self.chip.name}:{'x'.join(map(str, self.sides))}"
        return text if self.slices == 1 else f"{self.slices} slices of {text}"

    def devices(self) -> list[jax.Device]:
        """Stand-ins for its chips, for compiling; needs libtpu and no TPU.

        Raises:
          ModuleNotFoundError: libtpu is not installed.
          ValueError: there is no such slice.
        """
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        sides = (*self.sides, 1, 1)[:3]
        bounds = tuple(min(side, most) for side, most in zip(sides, (2, 2, 1), strict=True))
        name = f"{self.chip.name}:{'x'.join(map(str, self.sides))}"
        options = self.chip.options | {"chips_per_host_bounds": bounds}
        if self.slices > 1:
            options["num_slices"] = self.slices
        if importlib.util.find_spec("libtpu") is None:
            raise ModuleNotFoundError(f"compiling for {name} needs libtpu, but no TPU: pip install 'jax[tpu]'")
        try:
            return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).splitlines()[0]
            if not reason.startswith("INVALID_ARGUMENT"):
                raise
            raise ValueError(f"topology {name!r}: libtpu has no such slice ({reason}); use even sides") from error


def parse_topology(text: str, slices: int = 1) -> Topology:
    """The topology that a text such as "v5e:16x16" or "v4:4x4x4" names.

    Raises:
      ValueError: no such chip, a wrong number of sides, or sides or slices below 1.
    """
    name, _, sides = text.partition(":")
    chip = CHIPS.get(name)
    if chip is None or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sides) or sides.count("x") != chip.dimensions - 1:
        shape = "AxBxC" if chip and chip.dimensions == 3 else "AxB" if chip else "AxB or AxBxC"
        raise ValueError(
            f"topology {text!r}: expected CHIP:SIDES with CHIP one of {', '.join(CHIPS)} and SIDES {shape}, such as "
            "v5e:16x16 or v4:4x4x4"
        )
    if slices < 1:
        raise ValueError(f"slices = {slices}: expected at least 1")
    return Topology(chip, tuple(int(side) for side in sides.split("x")), slices)
