"""What an index says of each record, kept in the cache: parsed once, mapped into memory, and shared by processes."""

from __future__ import annotations

import array
import hashlib
import mmap
import pathlib
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import msgpack
import numpy as np

from blip2_jax import files
from blip2_jax.checkpoints.downloads import cache_directory
from blip2_jax.data.records import BadRecord
from blip2_jax.data.sources.content import digest
from blip2_jax.monitoring.progress import progress

_VERSION = "1"  # Of the layout, and of what the formats store in it: older files in the cache are then not found.
_REJECT = 0  # Code of msgpack's own extension types.


class Table:
    """Entries by index: whatever msgpack can spell, or the reason why there is none.

    The file holds the entries in msgpack, one behind the other; where each begins and where the last one ends, as
    uint64[count + 1]; the count, as uint64; and the SHA-256 of the entries.

    Attributes:
      sha256: of all entries, hex.
    """

    def __init__(self, file: pathlib.Path):
        self._file = file
        with file.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        end = len(self._map) - hashlib.sha256().digest_size
        self.sha256 = self._map[end:].hex()
        self._count = int(np.frombuffer(self._map, "<u8", 1, end - 8)[0])
        self._bounds = np.frombuffer(self._map, "<u8", self._count + 1, end - 8 * (self._count + 2))

    @classmethod
    def open(cls, depends_on: Iterable[str], entries: Callable[[], Iterable[Any]], where: str) -> Table:
        """The table in the cache, made now if it is not there.

        Args:
          depends_on: all that decides what is in it.
          entries: what to put in; a BadRecord stands for an entry that cannot be used.
          where: name of the source, for errors.

        Raises:
          ValueError: no entry can be used.
          OSError: there is no room; nothing half-written remains.
        """
        file = cache_directory() / "sources" / f"{digest([_VERSION, *depends_on])}.table"
        if not file.exists():
            mend = "make room, or set BLIP2_JAX_CACHE to another disk"
            file.parent.mkdir(parents=True, exist_ok=True)
            with files.clear_about_full_disk(file.parent, mend):
                _write(file, progress(entries(), desc=f"index of {where}", unit="record", leave=False), where)
        return cls(file)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        """Entry `index`; raises BadRecord if there is none that can be used."""
        if not 0 <= index < self._count:
            raise IndexError(f"there are {self._count} records, no number {index}")
        start, end = (int(bound) for bound in self._bounds[index : index + 2])
        entry = msgpack.unpackb(self._map[start:end], unicode_errors="surrogatepass", strict_map_key=False)
        if isinstance(entry, msgpack.ExtType):
            raise BadRecord(*msgpack.unpackb(entry.data, unicode_errors="surrogatepass"))
        return entry

    def __reduce__(self) -> tuple:
        return type(self), (self._file,)


def _write(file: pathlib.Path, entries: Iterable[Any], where: str) -> None:
    partial = file.with_name(f"{file.name}.partial-{uuid.uuid4().hex}")  # Machines may share a cache.
    bounds, sha256, usable, first = array.array("Q", [0]), hashlib.sha256(), 0, None
    try:
        with partial.open("wb") as stream:
            for entry in entries:
                if isinstance(entry, BadRecord):
                    first = first or entry
                    entry = msgpack.ExtType(_REJECT, msgpack.packb(entry.args, unicode_errors="surrogatepass"))
                else:
                    usable += 1
                packed = msgpack.packb(entry, unicode_errors="surrogatepass")
                sha256.update(packed)
                stream.write(packed)
                bounds.append(stream.tell())
            if not usable:
                raise ValueError(f"{where} holds no record" + (f" that can be used; {first}" if first else ""))
            bounds.append(len(bounds) - 1)
            stream.write(np.asarray(bounds, "<u8").tobytes())
            stream.write(sha256.digest())
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
