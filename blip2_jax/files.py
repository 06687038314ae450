"""Files that are written whole or not at all, room for them, and patience with storage that fails for a while."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

Result = TypeVar("Result")

PATIENCE = (5.0, 20.0, 60.0)  # Seconds, before what failed is tried again.


@contextlib.contextmanager
def replacing(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """Where to write what takes the place of `file`, in a single step and only if nothing fails; its folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.partial-{secrets.token_hex(4)}")
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


class Appender:
    """A file that grows by whole lines: one that fails, on a full disk perhaps, leaves nothing of itself behind."""

    def __init__(self, file: pathlib.Path, text: str = ""):
        """Put `text` in the place of what `file` held, to go on behind it."""
        self.file = file
        write_text(file, text)
        self._stream = file.open("ab", buffering=0)

    def append(self, line: str) -> None:
        """Add a line, trying again for a while where that fails.

        Raises:
          OSError: it failed every time.
        """
        patiently(lambda: self._append(f"{line}\n".encode()), f"{self.file} cannot be written")

    def _append(self, rest: bytes) -> None:
        end = self._stream.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
        except OSError:
            self._stream.truncate(end)
            raise

    def close(self) -> None:
        self._stream.close()


def patiently(attempt: Callable[[], Result], what: str) -> Result:
    """What `attempt` returns; where it raises OSError, it is tried again after each pause of PATIENCE.

    Args:
      attempt: changes nothing when it fails.
      what: has gone wrong, for stderr.

    Raises:
      OSError: the last attempt's.
    """
    for pause in PATIENCE:
        try:
            return attempt()
        except OSError as error:
            print(f"{what}: {error}; trying again in {pause:g} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    return attempt()


def require_room(directory: pathlib.Path, size: int, what: str, mend: str) -> None:
    """Raise OSError if the disk under `directory` has no room for `size` bytes of `what`; `mend` says what helps."""
    existing = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < size:
        raise OSError(
            f"no room for {what}: {directory} has {free / 1e9:.2f} GB free, {size / 1e9:.2f} GB are needed; {mend}"
        )


def in_object_store(folder: pathlib.Path, mounts: pathlib.Path = pathlib.Path("/proc/self/mountinfo")) -> bool:
    """Whether a folder is mounted with FUSE, as buckets are (gcsfuse, s3fs, rclone).

    There the kernel's locks end at this machine, and a folder that is renamed is not in its new place at once.

    Args:
      folder: which need not exist.
      mounts: what Linux says of this process; where there is no such file, nothing is known of such folders.
    """
    if not mounts.exists():
        return False
    folder, kinds = folder.absolute(), {}
    for line in mounts.read_text().splitlines():
        before, _, after = line.partition(" - ")
        kinds[pathlib.Path(before.split()[4].replace("\\040", " "))] = after.split()[0]
    inside = [mount for mount in kinds if folder.is_relative_to(mount)]
    kind = kinds[max(inside, key=lambda mount: len(mount.parts))] if inside else ""
    return kind == "fuse" or kind.startswith("fuse.")


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
