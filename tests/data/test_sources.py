"""Every source, and what a user may do wrong."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from blip2_jax.data import mixture, sources


def picture(colour, size=(20, 10)):
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a", "red"), ("b", "blue")):
        (tmp_path / f"{name}.png").write_bytes(picture(colour))
        (tmp_path / f"{name}.txt").write_text(f"a {colour} square\n")
    return tmp_path


@pytest.mark.parametrize(
    ("split", "least"),
    [
        ("train", 2500),
        ("train_tones", 2000),
        ("val_drawing", 150),
        ("val_concept", 150),
        ("test_drawing", 380),
        ("test_concept", 380),
    ],
)
def test_shipped_pictures(split, least):
    source = sources.open_source(f"nano:{split}")
    assert len(source) >= least
    record = source[len(source) // 2]
    assert set(record) == {"key", "image", "captions", "category", "subcategory"}
    assert Image.open(io.BytesIO(record["image"])).size == (64, 64)
    assert record["captions"][0] == record["captions"][0].lower()


def test_splits_keep_their_promises():
    """Test drawings are new drawings of known things; test concepts are things seen in no drawing."""
    records = {
        split: [sources.open_source(f"nano:{split}")[i] for i in range(len(sources.open_source(f"nano:{split}")))]
        for split in ("train", "train_tones", "val_drawing", "val_concept", "test_drawing", "test_concept")
    }
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


def test_folder(folder):
    source = sources.open_source(f"folder:{folder}")
    assert [source[i]["captions"] for i in range(len(source))] == [["a red square"], ["a blue square"]]


def test_jsonl(folder):
    lines = [{"image": "a.png", "caption": "red"}, {"image": "b.png", "caption": "blue", "category": "colours"}]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    source = sources.open_source(f"jsonl:{folder}/data.jsonl")
    assert [source[i]["captions"] for i in range(len(source))] == [["red"], ["blue"]]
    assert source[0]["image"] == (folder / "a.png").read_bytes()
    assert "category" not in source[0]
    assert source[1]["category"] == "colours"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "a.txt").unlink(), "1 of 2 pictures have no caption, the first .*a.png"),
        (lambda d: (d / "a.txt").write_text(" \n"), "a.txt: the caption is empty"),
        (lambda d: (d / "a.txt").write_bytes(b"\xff\xfe"), "a.txt: the caption is not UTF-8"),
        (lambda d: (d / "a.png").write_text("no picture"), "a.png is not a picture"),
        (lambda d: (d / "a.png").write_bytes(picture("red")[:30]), "a.png is not a picture"),
        (lambda d: [file.unlink() for file in d.iterdir()], "holds no picture"),
    ],
)
def test_bad_folders(folder, break_it, message):
    break_it(folder)
    with pytest.raises((ValueError, OSError), match=message):
        sources.open_source(f"folder:{folder}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "gone.png", "caption": "x"}', "line 2: the image .*gone.png does not exist"),
        ('{"image": "a.png"}', "line 2: expected"),
        ('{"image": "a.png", "caption": ""}', "line 2: the caption is empty"),
        ("not json", "line 2: expected"),
    ],
)
def test_bad_jsonl(folder, line, message):
    (folder / "data.jsonl").write_text('{"image": "a.png", "caption": "red"}\n' + line)
    with pytest.raises((ValueError, OSError), match=message):
        sources.open_source(f"jsonl:{folder}/data.jsonl")


@pytest.mark.parametrize("name", ["coco", "ftp:x", "nano:nothing", "folder:/does/not/exist", "arrayrecord:/no/*.file"])
def test_unknown_sources(name):
    with pytest.raises((ValueError, FileNotFoundError)):
        sources.open_source(name)


def test_mixtures():
    assert mixture.parse_mixture("nano:train") == [("nano:train", 1.0)]
    assert mixture.parse_mixture("nano:train@3 + folder:x@1") == [("nano:train", 0.75), ("folder:x", 0.25)]
    assert mixture.parse_mixture("nano:train + folder:x") == [("nano:train", 0.5), ("folder:x", 0.5)]
    for text in ("nano:train@-1", "nano:train@x", " + nano:train"):
        with pytest.raises(ValueError, match="mixture"):
            mixture.parse_mixture(text)


def test_identities_are_two_words_of_a_hash():
    first, second = sources.identify("nano:train", "noto/1f600"), sources.identify("nano:train", "noto/1f601")
    assert first.dtype == np.uint32
    assert first.shape == (2,)
    assert (first != second).any()
    assert (first == sources.identify("nano:train", "noto/1f600")).all()
