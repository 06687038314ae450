"""Shards of encoded records."""

import itertools

import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from blip2_jax.data.shards import shard_file, shard_range, write_shard


@pytest.mark.parametrize(("length", "count"), [(10, 3), (3, 3), (2, 5), (1_000_003, 17)])
def test_shards_share_all_records_evenly(length, count):
    ranges = [shard_range(length, number, count) for number in range(count)]
    assert list(itertools.chain.from_iterable(ranges)) == list(range(length))
    assert max(map(len, ranges)) - min(map(len, ranges)) <= 1


def test_a_shard_is_whole_or_not_there(tmp_path):
    file = shard_file(tmp_path / "corpus", 3, 16)
    assert file.name == "00003-of-00016.arrayrecord"

    def fails():
        yield b"one"
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_shard(file, fails())
    assert list(file.parent.iterdir()) == []
    assert write_shard(file, [b"one", b"two"]) == 2
    assert [*map(ArrayRecordDataSource([str(file)]).__getitem__, (1, 0))] == [b"two", b"one"]
