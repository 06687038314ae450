"""Tables of entries in the cache."""

import concurrent.futures
import pickle
import shutil

import pytest

from blip2_jax.data.records import BadRecord
from blip2_jax.data.sources.table import Table

ENTRIES = [
    {"key": "a", "number": 2**63, "text": "half a \ud83d"},
    BadRecord("caption_empty", "b\ud83d", "the caption is empty"),
    [1, 2, 3],
    {"key": "ü", 3: None, "reject": ["missing", "a", "no reject"]},
]


def test_entries(cache):
    table = Table.open(["some"], lambda: ENTRIES, "here")
    assert len(table) == 4
    assert [table[index] for index in (0, 2, 3)] == [ENTRIES[0], ENTRIES[2], ENTRIES[3]]
    with pytest.raises(BadRecord) as raised:
        table[1]
    assert (raised.value.reason, raised.value.where, raised.value.detail) == ENTRIES[1].args
    for index in (-1, 4):
        with pytest.raises(IndexError, match="there are 4 records"):
            table[index]


def test_it_is_made_once_of_what_it_depends_on():
    first = Table.open(["some"], lambda: ["one"], "here")
    assert Table.open(["some"], lambda: ["other"], "here")[0] == "one"
    other = Table.open(["else"], lambda: ["other"], "here")
    assert other[0] == "other"
    assert first.sha256 != other.sha256
    assert first.sha256 == Table.open(["same content"], lambda: ["one"], "here").sha256


def test_a_reader_shares_the_file_and_survives_its_removal(cache):
    table = Table.open(["some"], lambda: ENTRIES, "here")
    state = pickle.dumps(table)
    assert len(state) < 1000
    assert pickle.loads(state)[2] == [1, 2, 3]
    shutil.rmtree(cache)
    assert table[2] == [1, 2, 3]


def test_an_interrupted_one_is_begun_again(cache):
    def breaks():
        yield "one"
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        Table.open(["some"], breaks, "here")
    assert not [file for file in cache.rglob("*") if file.is_file()]
    assert len(Table.open(["some"], lambda: ["one", "two"], "here")) == 2


def test_made_by_many_at_once(cache):
    make = lambda number: Table.open(["some"], lambda: range(1000), "here")
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        tables = list(pool.map(make, range(8)))
    assert all(table[999] == 999 for table in tables)
    assert len(list((cache / "sources").iterdir())) == 1


def test_nothing_that_can_be_used():
    with pytest.raises(ValueError, match=r"here holds no record$"):
        Table.open(["some"], lambda: [], "here")
    with pytest.raises(ValueError, match=r"here holds no record that can be used; b.: the caption is empty"):
        Table.open(["some"], lambda: [ENTRIES[1], BadRecord("missing", "c", "gone")], "here")


def test_no_room(monkeypatch):
    def full(file, entries, where):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("blip2_jax.data.sources.table._write", full)
    with pytest.raises(OSError, match="set BLIP2_JAX_CACHE to another disk"):
        Table.open(["some"], lambda: ["one"], "here")
