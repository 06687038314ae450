"""Files that are written whole or not at all, and room for them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any


@contextlib.contextmanager
def replacing(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write what takes the place of `file`, in a single step and only if nothing fails; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def write_text(file: pathlib.Path, text: str) -> None:
    """Put a file in the place of an older one in a single step; its folder is made if need be."""
    with replacing(file) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(file: pathlib.Path, content: Any) -> None:
    """`write_text` of indented JSON with sorted keys."""
    write_text(file, json.dumps(content, indent=1, sort_keys=True) + "\n")


def differences(known: Mapping[str, Any], asked: Mapping[str, Any], path: str = "") -> list[str]:
    """What a folder was made with and what is asked for now, a line for each setting that differs."""
    lines = []
    for name in known | asked:
        there, now = known.get(name), asked.get(name)
        if isinstance(there, Mapping) and isinstance(now, Mapping):
            lines += differences(there, now, f"{path}{name}/")
        elif there != now:
            lines.append(f"  {path}{name}: {there!r} there, {now!r} asked for")
    return lines


def require_room(directory: pathlib.Path, size: int, what: str, mend: str) -> None:
    """Raise OSError if the disk under `directory` has no room for `size` bytes of `what`; `mend` says what helps."""
    existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise OSError(
            f"no room for {what}: {directory} has {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB are needed; {mend}"
        )


@contextlib.contextmanager
def clear_about_full_disk(directory: pathlib.Path, mend: str) -> Iterator[None]:
    """Turn what Python and Orbax raise of a full disk during work in `directory` into one OSError that says so."""
    full = os.strerror(errno.ENOSPC)
    try:
        yield
    except Exception as error:  # Orbax wraps the system's error in others.
        if full not in str(error):
            raise
        raise OSError(f"a disk is full, at work in {directory}: {error}; {mend}") from error
