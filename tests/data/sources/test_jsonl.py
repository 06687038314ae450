"""Lists of images as JSON lines, and what may be wrong with them."""

import json

import pytest

from blip2_jax.data import sources
from blip2_jax.data.records import BadRecord
from tests import sources as tiny


@pytest.fixture
def file(tmp_path):
    tiny.write_images(tmp_path, ["a.jpg", "b.jpg", "deep/c.jpg"])
    return tmp_path / "data.jsonl"


def read(name):
    source, found = sources.open_source(name), []
    for index in range(len(source)):
        try:
            found.append({field: value for field, value in source[index].items() if field != "image"})
        except BadRecord as problem:
            found.append((problem.reason, problem.where))
    return found


def test_lines(file):
    lines = [
        {"image": "a.jpg", "caption": "red"},
        {"image": "deep/c.jpg", "caption": ["x", "y"], "category": "colours"},
    ]
    file.write_text("\n" + "\r\n".join(map(json.dumps, lines)) + "\n\n")
    assert read(f"jsonl:{file}") == [
        {"key": "a.jpg", "captions": ["red"]},
        {"key": "deep/c.jpg", "captions": ["x", "y"], "category": "colours"},
    ]
    assert sources.open_source(f"jsonl:{file}")[0]["image"] == (file.parent / "a.jpg").read_bytes()


def test_lines_of_the_same_image_are_one_record(file):
    """Wherever they stand, in the order of the first; what else they say is what the first one says."""
    lines = [
        {"image": "b.jpg", "caption": "b1", "category": "first"},
        {"image": "a.jpg", "caption": "a1"},
        {"image": "b.jpg", "caption": ["b2", ""], "category": "second"},
        {"image": "a.jpg", "caption": "a2"},
        {"image": "b.jpg", "caption": "b3"},
    ]
    tiny.write_lines(file, lines)
    assert read(f"jsonl:{file}") == [
        {"key": "b.jpg", "captions": ["b1", "b2", "b3"], "category": "first"},
        {"key": "a.jpg", "captions": ["a1", "a2"]},
    ]


def test_fields_of_other_names(file):
    tiny.write_lines(file, [{"path": "a.jpg", "alt": "red", "caption": "not this"}])
    assert read(f"jsonl:{file}?image=path&text=alt") == [{"key": "a.jpg", "captions": ["red"], "caption": "not this"}]
    with pytest.raises(
        ValueError, match=r'data\.jsonl, line 1: expected {"image": PATH, "caption": TEXT}, found {"path"'
    ):
        sources.open_source(f"jsonl:{file}")


def test_questions(file):
    """Each a record of its own, with the share of each answer, unless the line has its own weights."""
    given = ["yes", "no", "yes", "yes"]
    weighted = {"answers": ["left", "right"], "weights": [0.9, 0.1]}
    lines = [
        {"image": "a.jpg", "question": "Red?", "answers": given},
        {"image": "a.jpg", "question": "Which side?", **weighted},
        {"image": "a.jpg", "question": "What?"},
        {"image": "a.jpg", "question": "Bad?", "answers": "yes"},
    ]
    tiny.write_lines(file, lines)
    assert read(f"jsonl:{file}") == [
        {"key": "a.jpg#1", "question": "Red?", "answers": ["yes", "no"], "weights": [0.75, 0.25]},
        {"key": "a.jpg#2", "question": "Which side?", **weighted},
        {"key": "a.jpg#3", "question": "What?"},
        ("unreadable", "a.jpg#4"),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"image": "gone.jpg", "caption": "x"}', ("missing", "gone.jpg")),
        (b'{"image": "b.jpg"}', ("caption_missing", "b.jpg")),
        (b'{"image": "b.jpg", "caption": null}', ("caption_missing", "b.jpg")),
        (b'{"image": "b.jpg", "caption": " "}', ("caption_empty", "b.jpg")),
        (b'{"image": "b.jpg", "caption": "\\ud83d"}', ("caption_not_utf8", "b.jpg")),
        (b'{"image": "b.jpg", "caption": "caf\xe9"}', ("caption_not_utf8", "data.jsonl, line 2")),
        (b'{"image": "b.jpg", "capt', ("unreadable", "data.jsonl, line 2")),
        (b"[1, 2]", ("unreadable", "data.jsonl, line 2")),
        (b'{"image": "\\ud83d.jpg", "caption": "x"}', ("missing", "\ud83d.jpg")),
        (b'{"image": 7, "caption": "x"}', ("unreadable", "data.jsonl, line 2")),
        (b'{"caption": "x"}', ("unreadable", "data.jsonl, line 2")),
    ],
)
def test_bad_lines(file, line, problem):
    file.write_bytes(b'{"image": "a.jpg", "caption": "red"}\n' + line + b'\n{"image": "deep/c.jpg", "caption": "c"}\n')
    found = read(f"jsonl:{file}")
    assert found[1] == problem
    assert [record["key"] for record in (found[0], found[2])] == ["a.jpg", "deep/c.jpg"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no record$"),
        ("not json\nneither", r'holds no record that can be used; data\.jsonl, line 1: expected {"image": PATH, "capt'),
        ('{"image": "a.jpg"}\n', r"holds no record that can be used; a\.jpg: there is no caption"),
        ('{"image": "gone/a.jpg", "caption": "x"}\n', r"none is there, the first gone/a\.jpg, in .*from which folder"),
    ],
)
def test_bad_files(file, content, message):
    file.write_text(content)
    with pytest.raises((ValueError, OSError), match=message):
        sources.open_source(f"jsonl:{file}")


def test_missing_images_are_no_reason_to_stop_while_some_are_there(file):
    names = [f"images/{number}.jpg" for number in range(500)]
    tiny.write_images(file.parent, names[::10])
    tiny.write_lines(file, [{"image": name, "caption": "x"} for name in names])
    found = read(f"jsonl:{file}")
    assert found[::10] == [{"key": name, "captions": ["x"]} for name in names[::10]]
    assert found[1::10] == [("missing", name) for name in names[1::10]]
