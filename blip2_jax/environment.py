"""What a run runs on: versions, devices, processes, memory and disks, in a few lines for its log."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import shutil
from collections import Counter
from collections.abc import Callable

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


def report(workdir: str | pathlib.Path = ".") -> str:
    """Lines "name: facts", without an end of line at the end; what cannot be found out is said to be unknown.

    It asks jax for its devices, so that processes have to have joined before. It never raises.

    Args:
      workdir: of the run, which need not be there yet.
    """
    facts: dict[str, Callable[[], str]] = {
        "versions": _versions,
        "devices": _devices,
        "processes": _processes,
        "slice": _slice,
        "host": _host,
        "workdir": lambda: f"{workdir}, {shutil.disk_usage(_existing(pathlib.Path(workdir))).free / 1e9:,.0f} GB free",
        "compiled programs": lambda: jax.config.jax_compilation_cache_dir or "not kept",
    }
    told = {name: _told(fact) for name, fact in facts.items()}
    return "\n".join(f"{name}: {text}" for name, text in told.items() if text)


def _told(fact: Callable[[], str]) -> str:
    try:
        return fact()
    except Exception as error:  # Of any kind: a run does not end because of what its log would have said.
        return f"unknown ({type(error).__name__}: {' '.join(str(error).split())[:200]})"


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} of unknown version")
    return ", ".join([*found, platform.platform()])


def _devices() -> str:
    kinds = Counter(device.device_kind for device in jax.devices())
    named = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    limit = _memory(jax.local_devices()[0])
    return f"{named} ({jax.default_backend()})" + (f", {limit / 2**30:,.1f} GiB each" if limit else "")


def _memory(device: jax.Device) -> int | None:
    """Bytes that a device offers; None where it does not say, such as a CPU."""
    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:
        return None


def _processes() -> str:
    of_devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
    return f"this is number {jax.process_index()} of {jax.process_count()}, with {of_devices}"


def _slice() -> str:
    """The shape of a TPU slice, and how many there are; nothing elsewhere."""
    devices = jax.devices()
    if devices[0].platform != "tpu":
        return ""
    shape = "x".join(str(max(axis) + 1) for axis in zip(*(device.coords for device in devices), strict=True))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    return f"{slices} of {shape} chips"


def _host() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"{platform.node()}, {cores} cores, {memory / 2**30:,.0f} GiB"


def _existing(directory: pathlib.Path) -> pathlib.Path:
    return next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
