"""Meshes of some of the eight fake devices."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator

import jax

from blip2_jax.parallel.mesh import make_mesh

# "" is no mesh at all; among the others are some of fewer devices than there are, and all axes.
MESHES = (
    "",
    "data=4",
    "data=8",
    "data=2,fsdp=2",
    "data=2,fsdp=2,tensor=2",
    "data=4,fsdp=2",
    "data=1,tensor=2",
)


@contextlib.contextmanager
def surrounding(text: str) -> Iterator[None]:
    """The mesh of that name around what is traced; its sizes are all given."""
    if not text:
        yield
        return
    devices = math.prod(int(size) for size in re.findall(r"=(\d+)", text))
    with jax.set_mesh(make_mesh(text, jax.devices()[:devices])):
        yield
