"""Folders of images, and what may be wrong with them."""

import json
import os

import pytest

from blip2_jax.data import sources
from blip2_jax.data.records import BadRecord
from tests import sources as tiny


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate("ab"):
        (tmp_path / f"{name}.jpg").write_bytes(tiny.picture(number))
        (tmp_path / f"{name}.txt").write_text(f"{name} square\n")
    return tmp_path


def read(name):
    source, found = sources.open_source(name), {}
    for index in range(len(source)):
        try:
            record = source[index]
            found[record["key"]] = record["captions"]
        except BadRecord as problem:
            found[problem.where] = problem.reason
    return found


def test_captions_beside_images(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "C.PNG").write_bytes(tiny.picture(kind="PNG"))
    (folder / "deep" / "C.txt").write_text("a third")
    for other in ("notes.txt", "data.json", ".hidden.jpg"):
        (folder / other).write_text("of no image")
    (folder / ".thumbnails").mkdir()
    (folder / ".thumbnails" / "a.jpg").write_bytes(tiny.picture())
    assert read(f"folder:{folder}") == {"a.jpg": ["a square"], "b.jpg": ["b square"], "deep/C.PNG": ["a third"]}


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda d: (d / "a.txt").unlink(), "caption_missing"),
        (lambda d: (d / "a.txt").write_text(" \n"), "caption_empty"),
        (lambda d: (d / "a.txt").write_bytes(b"\xff\xfe"), "caption_not_utf8"),
    ],
)
def test_bad_records(folder, break_it, reason):
    break_it(folder)
    assert read(f"folder:{folder}") == {"a.jpg": reason, "b.jpg": ["b square"]}


@pytest.mark.parametrize("link", [False, True])
def test_an_image_that_is_gone(folder, link):
    """While the source is open, or before: what is left is a link to nowhere."""
    if link:
        (folder / "a.jpg").unlink()
        (folder / "a.jpg").symlink_to(folder / "nowhere.jpg")
    source = sources.open_source(f"folder:{folder}")
    (folder / "a.jpg").unlink()
    with pytest.raises(BadRecord) as raised:
        source[0]
    assert (raised.value.reason, raised.value.where) == ("missing", "a.jpg")


def test_images_are_not_opened_at_the_start(folder, monkeypatch):
    """A million would take hours."""
    (folder / "a.jpg").write_text("no picture")
    monkeypatch.setattr("pathlib.Path.open", None)
    monkeypatch.setattr("pathlib.Path.read_bytes", None)
    assert len(sources.open_source(f"folder:{folder}")) == 2


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda d: [file.unlink() for file in d.glob("*.txt")],
            r"none of 2 images has a caption, the first a\.jpg; .*a\.txt",
        ),
        (lambda d: [file.unlink() for file in d.glob("*.jpg")], "holds no image; expected files as .jpg"),
        (lambda d: os.rename(d, f"{d}_elsewhere"), "no such folder"),
    ],
)
def test_bad_folders(folder, break_it, message):
    break_it(folder)
    with pytest.raises((ValueError, OSError), match=message):
        sources.open_source(f"folder:{folder}")


def test_metadata(folder):
    """Its captions count, and paths start from its folder, in each of its folders."""
    (folder / "x" / "images").mkdir(parents=True)
    (folder / "x" / "images" / "c.jpg").write_bytes(tiny.picture())
    first = [{"file_name": "b.jpg", "text": "of the list", "category": "squares"}]
    second = [
        {"file_name": "images/c.jpg", "text": ["one", "two"], "prompt": "other"},
        {"file_name": "d.jpg", "text": "x"},
    ]
    for file, lines in ((folder / "metadata.jsonl", first), (folder / "x" / "metadata.jsonl", second)):
        file.write_text("\n".join(map(json.dumps, lines)))
    found = {"b.jpg": ["of the list"], "x/images/c.jpg": ["one", "two"], "x/d.jpg": "missing"}
    assert read(f"folder:{folder}") == found
    assert sources.open_source(f"folder:{folder}")[0]["category"] == "squares"
    assert read(f"folder:{folder}?text=prompt")["x/images/c.jpg"] == ["other"]
    assert read(f"folder:{folder}?text=prompt")["b.jpg"] == "caption_missing"


def test_a_field_without_metadata(folder):
    with pytest.raises(
        ValueError, match=r"text=prompt names a field of metadata\.jsonl, but there is no metadata\.jsonl"
    ):
        sources.open_source(f"folder:{folder}?text=prompt")
