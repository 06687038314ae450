"""Our own files, which `python -m blip2_jax.data prepare` writes, and the pictures that ship with the package."""

from __future__ import annotations

import concurrent.futures
import glob
import hashlib
import os
import pathlib
from collections.abc import Sequence

import msgpack
from array_record.python.array_record_data_source import ArrayRecordDataSource

from blip2_jax.data import corpora
from blip2_jax.data.records import BadRecord, Record
from blip2_jax.data.sources.content import digest, relative_names

_TAIL = 2**17  # Bytes at the end of a file; they tell the sizes of its records, as those of the file hardly do.
_THREADS = 32  # That wait for a disk.

PICTURES = pathlib.Path(__file__).parents[2] / "assets" / "pictures"


class ArrayRecords:
    """Records in msgpack, in one or many ArrayRecord files."""

    def __init__(self, files: Sequence[str], where: str):
        """Open files, whose records follow one another.

        Raises:
          ValueError: one is no ArrayRecord file, or there is no record in them.
        """
        try:
            self._reader = ArrayRecordDataSource(list(files))
        except RuntimeError:  # It does not say which.
            for file in files:
                _check(file, where)
            raise
        if not len(self._reader):
            raise ValueError(f"{where} holds no record")
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            tails = list(pool.map(_tail, files))
        self.identity = digest(["arrayrecord", *relative_names(files), *tails])

    def __len__(self) -> int:
        return len(self._reader)

    def __getitem__(self, index: int) -> Record:
        try:
            return msgpack.unpackb(self._reader[index])
        except (RuntimeError, msgpack.UnpackException) as error:
            raise BadRecord("unreadable", f"record {index}", f"the ArrayRecord file is damaged: {error}") from error


def _tail(file: str) -> str:
    with open(file, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(max(0, size - _TAIL))
        return f"{size}:{hashlib.sha256(stream.read()).hexdigest()}"


def _check(file: str, where: str) -> None:
    try:
        ArrayRecordDataSource([file])
    except RuntimeError as error:
        raise ValueError(f"{where}: {file} is no whole ArrayRecord file ({error}); write or copy it again") from error


def open_arrayrecord(what: str) -> ArrayRecords:
    """arrayrecord:GLOB, of files that `prepare` or `assets/build/pictures.py` has written; ** stands for any folders.

    Args:
      what: behind "arrayrecord:".
    """
    files = sorted(glob.glob(os.path.expanduser(what), recursive=True))
    if not files:
        mend = corpora.instructions(what)
        raise FileNotFoundError(f"arrayrecord:{what}: no file matches" + (f". {mend}" if mend else ""))
    return ArrayRecords(files, f"arrayrecord:{what}")


def open_nano(what: str) -> ArrayRecords:
    """nano:SPLIT, the pictures that ship with the package.

    Args:
      what: behind "nano:".
    """
    file = PICTURES / f"{what}.arrayrecord"
    if not file.exists():
        known = sorted(path.stem for path in PICTURES.glob("*.arrayrecord"))
        raise FileNotFoundError(f"nano:{what}: no such split; there are {', '.join(known)}")
    return ArrayRecords([str(file)], f"nano:{what}")
