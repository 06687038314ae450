"""What holds for every kind of source: what a record has, identities, threads, and other processes."""

import concurrent.futures
import hashlib
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from blip2_jax.data import sources
from tests import sources as tiny

# Reads a pickled source in a process that has nothing but it.
READ = """
import hashlib, pickle, sys
source = pickle.load(sys.stdin.buffer)
print(hashlib.sha256(repr([source[index] for index in range(len(source))]).encode()).hexdigest())
heavy = {"jax", "tensorflow", "flax"} & set(sys.modules)
sys.exit(f"a worker would import {heavy}" if heavy else 0)
"""


@pytest.fixture(params=tiny.MAKERS)
def kind(request):
    return request.param


def records(source):
    return [source[index] for index in range(len(source))]


def test_records(kind, tmp_path):
    source = sources.open_source(tiny.MAKERS[kind](tmp_path / "data"))
    found = records(source)
    assert len(found) == tiny.COUNT
    assert len({record["key"] for record in found}) == tiny.COUNT
    assert str(tmp_path) not in "".join(record["key"] for record in found)
    for record in found:
        assert record["image"] in {tiny.picture(number) for number in range(tiny.COUNT)}
        if "question" in record:
            assert len(record["answers"]) == len(record["weights"])
            assert sum(record["weights"]) == pytest.approx(1)
        else:
            number = int(record["captions"][0].split()[-1])
            assert record["captions"] in (tiny.captions(number), tiny.captions(number)[:1])
            assert record["image"] == tiny.picture(number)


def test_the_identity_is_that_of_the_content(kind, tmp_path, monkeypatch):
    """It survives another place, other times and an empty cache, and nothing that changes a record."""
    make = tiny.MAKERS[kind]
    here, there = tmp_path / "here", tmp_path / "there" / "deeper"
    name = make(here)
    first = sources.open_source(name)
    shutil.copytree(here, there)
    for file in there.rglob("*"):
        os.utime(file, (1, 1))
    monkeypatch.setenv("BLIP2_JAX_CACHE", str(tmp_path / "empty"))
    moved = sources.open_source(name.replace(str(here), str(there)))
    assert moved.identity == first.identity
    assert len(first.identity) == 64
    assert [record["key"] for record in records(moved)] == [record["key"] for record in records(first)]
    monkeypatch.setattr(tiny, "captions", lambda number: [f"a picture {number}", "thing"])
    assert sources.open_source(make(tmp_path / "other")).identity != first.identity


def test_threads(kind, tmp_path):
    source = sources.open_source(tiny.MAKERS[kind](tmp_path))
    expected = records(source)
    order = np.random.default_rng(0).integers(len(source), size=400).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for index, record in zip(order, pool.map(source.__getitem__, order), strict=True):
            assert record == expected[index]


def test_another_process(kind, tmp_path):
    """Also after this one has read, with open files and all."""
    source = sources.open_source(tiny.MAKERS[kind](tmp_path))
    expected = hashlib.sha256(repr(records(source)).encode()).hexdigest()
    state = pickle.dumps(source)
    ended = subprocess.run([sys.executable, "-c", READ], input=state, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr.decode()
    assert ended.stdout.decode().split() == [expected]


def test_the_index_is_parsed_once(kind, tmp_path, cache):
    """What is in the cache is used, and neither written again nor larger than it needs to be."""
    name = tiny.MAKERS[kind](tmp_path)
    first = records(sources.open_source(name))
    files = {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()}
    assert records(sources.open_source(name)) == first
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*") if file.is_file()} == files
    assert sum(file.stat().st_size for file in files) < 4000
    assert not any(".partial" in file.name for file in files)


def test_records_can_be_stored(kind, tmp_path):
    """`prepare` writes them in msgpack."""
    import msgpack

    for record in records(sources.open_source(tiny.MAKERS[kind](tmp_path))):
        assert msgpack.unpackb(msgpack.packb(record)) == record


@pytest.mark.parametrize("option", ["splits=train", "Split=train"])
def test_an_unknown_option_names_the_known(kind, tmp_path, option):
    name = tiny.MAKERS[kind](tmp_path).partition("?")[0]
    with pytest.raises(ValueError, match=rf"has no option '{option.partition('=')[0]}'; there (are|is) ") as raised:
        sources.open_source(f"{name}?{option}")
    known = {"coco": "split", "hf": "image, text, split", "jsonl": "image, text", "webdataset": "text", "gqa": "none"}
    if kind in known:
        assert str(raised.value).endswith(known[kind])


def test_no_files(kind, tmp_path):
    """An error that says what is not there."""
    name = tiny.MAKERS[kind](tmp_path / "data")
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(FileNotFoundError, match=r"no file|no such|not there|is no file|prepare"):
        sources.open_source(name)


def test_makers_are_of_every_kind(tmp_path):
    kinds = {json.dumps(make(pathlib.Path(tmp_path / name)).partition(":")[0]) for name, make in tiny.MAKERS.items()}
    assert {json.loads(kind) for kind in kinds} | {"nano"} == set(sources._KINDS)
