"""The shipped pictures, and files of our own that are damaged."""

import io

import pytest
from PIL import Image

from blip2_jax.data import sources
from blip2_jax.data.records import BadRecord
from tests import sources as tiny

SPLITS = {
    "train": 2500,
    "train_tones": 2000,
    "val_drawing": 150,
    "val_concept": 150,
    "test_drawing": 380,
    "test_concept": 380,
}


@pytest.mark.parametrize(("split", "least"), SPLITS.items())
def test_shipped_pictures(split, least):
    source = sources.open_source(f"nano:{split}")
    assert len(source) >= least
    record = source[len(source) // 2]
    assert set(record) == {"key", "image", "captions", "category", "subcategory"}
    assert Image.open(io.BytesIO(record["image"])).size == (64, 64)
    assert record["captions"][0] == record["captions"][0].lower()


def test_splits_keep_their_promises():
    """Test drawings are new drawings of known things; test concepts are things seen in no drawing."""
    opened = {split: sources.open_source(f"nano:{split}") for split in SPLITS}
    records = {split: [source[index] for index in range(len(source))] for split, source in opened.items()}
    things = {split: {r["key"].split("/")[1] for r in rs} for split, rs in records.items()}
    keys = {split: {r["key"] for r in rs} for split, rs in records.items()}
    captions = {split: {r["captions"][0] for r in rs} for split, rs in records.items()}
    for split in ("val_drawing", "test_drawing"):
        assert things[split] <= things["train"]
        assert captions[split] <= captions["train"]
        assert not keys[split] & keys["train"]
        assert all(key.startswith("twemoji/") for key in keys[split])
        assert not {f"twemoji/{thing}" for thing in things[split]} & {k.rpartition("/")[0] for k in keys["train_tones"]}
    for split in ("val_concept", "test_concept"):
        assert not things[split] & (things["train"] | things["train_tones"])
        assert not captions[split] & captions["train"]
    assert not things["val_concept"] & things["test_concept"]
    assert not keys["val_drawing"] & keys["test_drawing"]
    images = {split: {r["image"] for r in rs} for split, rs in records.items()}
    for split in ("val_drawing", "val_concept", "test_drawing", "test_concept"):
        assert not images[split] & images["train"], f"{split} and train share a picture"


def test_an_unknown_split_names_the_known():
    with pytest.raises(
        FileNotFoundError, match="nano:test: no such split; there are test_concept, test_drawing, train"
    ):
        sources.open_source("nano:test")


def test_order_is_that_of_the_names(tmp_path):
    name = tiny.arrayrecord(tmp_path)
    source = sources.open_source(name)
    assert [source[index]["key"] for index in range(len(source))] == list("012345")
    (tmp_path / "00001-of-00002.arrayrecord").rename(tmp_path / "00000-of-00001.arrayrecord")
    other = sources.open_source(name)
    assert [other[index]["key"] for index in range(len(other))] == list("345012")
    assert other.identity != source.identity


@pytest.mark.parametrize("content", [b"", b"no records" * 20_000, None])
def test_files_that_are_none(tmp_path, content):
    name = tiny.arrayrecord(tmp_path)
    file = tmp_path / "00001-of-00002.arrayrecord"
    file.write_bytes(file.read_bytes()[:70_000] if content is None else content)
    with pytest.raises(ValueError, match=r"00001-of-00002\.arrayrecord is no whole ArrayRecord file"):
        sources.open_source(name)


def test_no_record(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "COUNT", 0)
    with pytest.raises(ValueError, match="holds no record"):
        sources.open_source(tiny.arrayrecord(tmp_path))


def test_a_damaged_record_is_one_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "picture", lambda number: bytes([number]) * 1000)
    name = tiny.arrayrecord(tmp_path)
    file = tmp_path / "00000-of-00002.arrayrecord"
    content = bytearray(file.read_bytes())
    content[300] ^= 255
    file.write_bytes(content)
    source, damaged = sources.open_source(name), []
    for index in range(len(source)):
        try:
            source[index]
        except BadRecord as problem:
            assert problem.reason == "unreadable"
            damaged.append(index)
    assert len(damaged) == 1
    assert damaged[0] < 3
