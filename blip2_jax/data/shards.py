"""ArrayRecord files in numbered shards, which commands write in parallel and take up again where they were stopped."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable

from array_record.python import array_record_module

from blip2_jax import files


def shard_file(folder: pathlib.Path, number: int, count: int) -> pathlib.Path:
    """FOLDER/00003-of-00016.arrayrecord: shard `number` of `count`."""
    return folder / f"{number:05d}-of-{count:05d}.arrayrecord"


def shard_range(length: int, number: int, count: int) -> range:
    """Which of `length` records lie in shard `number` of `count`: as many in each, to one."""
    return range(length * number // count, length * (number + 1) // count)


def write_shard(file: pathlib.Path, records: Iterable[bytes]) -> int:
    """Write encoded records, whole or not at all, so that a shard that exists is done; returns how many there were."""
    count = 0
    with files.replacing(file) as partial:
        # Records are read one by one in random order.
        writer = array_record_module.ArrayRecordWriter(str(partial), "group_size:1")
        for record in records:
            writer.write(record)
            count += 1
        writer.close()
    return count
