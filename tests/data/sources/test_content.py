"""Captions, answers and images as sources find them; and hashes of names."""

import numpy as np
import pytest

from blip2_jax.data.records import BadRecord
from blip2_jax.data.sources import content, identify


@pytest.mark.parametrize(
    ("value", "captions"),
    [
        ("  a Cat\n", ["a Cat"]),
        ("собака — 犬".encode(), ["собака — 犬"]),
        (["one", "", b"\xff", None, "two"], ["one", "two"]),
        (("one",), ["one"]),
    ],
)
def test_captions(value, captions):
    assert content.captions_of(value, "key") == captions


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "caption_missing"),
        ([], "caption_missing"),
        (7, "caption_missing"),
        ({"a": 1}, "caption_missing"),
        (" \n", "caption_empty"),
        (["", "\t"], "caption_empty"),
        (b"caf\xe9", "caption_not_utf8"),
        ("half a \ud83d", "caption_not_utf8"),
        ([b"\xff", ""], "caption_not_utf8"),
    ],
)
def test_no_captions(value, reason):
    with pytest.raises(BadRecord) as raised:
        content.captions_of(value, "images/3.jpg")
    assert raised.value.reason == reason
    assert raised.value.where == "images/3.jpg"


def test_each_of_ten_answers_weighs_a_tenth():
    given = ["net"] * 6 + ["a net", "netting ", "a net", "netting"]
    assert content.answers_of(given) == {"answers": ["net", "a net", "netting"], "weights": [0.6, 0.2, 0.2]}


def test_an_image_from_the_first_folder_that_has_it(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, name in ((first, "a"), (second, "a"), (second, "b")):
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(f"{folder.name} {name}".encode())
    assert content.read_image([first, second], "a", "key") == b"first a"
    assert content.read_image([first, second], "b", "key") == b"second b"
    for name in ("c", "a/b", "", "\0", "\ud83d"):  # Not there, below a file, a folder, no names.
        with pytest.raises(BadRecord, match="key: there is no image") as raised:
            content.read_image([first, second], name, "key")
        assert raised.value.reason == "missing"
    (first / "loop").symlink_to(first / "loop")
    with pytest.raises(BadRecord, match="cannot be read") as raised:
        content.read_image([first, second], "loop", "key")
    assert raised.value.reason == "unreadable"


def test_relative_names():
    assert content.relative_names(["/d/a/0.tar", "/d/b/0.tar"]) == ["a/0.tar", "b/0.tar"]
    assert content.relative_names(["/d/a/0.tar"]) == ["0.tar"]
    assert content.relative_names(["b/1.tar", "b/10.tar"]) == ["1.tar", "10.tar"]
    assert content.relative_names(["b/1.tar", "b/1/2.tar"]) == ["1.tar", "1/2.tar"]


def test_identities_are_two_words_of_a_hash():
    first, second = identify("nano:train", "noto/1f600"), identify("nano:train", "noto/1f601")
    assert first.dtype == np.uint32
    assert first.shape == (2,)
    assert (first != second).any()
    assert (first == identify("nano:train", "noto/1f600")).all()
