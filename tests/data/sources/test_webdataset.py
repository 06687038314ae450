"""Tar shards, on a disk and elsewhere."""

import gzip
import json
import uuid

import fsspec
import pytest

from blip2_jax.data import sources
from blip2_jax.data.records import BadRecord
from blip2_jax.data.sources import tar
from tests import sources as tiny

PICTURE = tiny.picture()


def read(name):
    source, found = sources.open_source(name), {}
    for index in range(len(source)):
        try:
            record = source[index]
            assert record["image"] == PICTURE
            found[record["key"]] = record["captions"]
        except BadRecord as problem:
            found[problem.where] = problem.reason
    return found


def shard(tmp_path, members, name="0.tar"):
    tiny.write_tar(tmp_path / name, members)
    return f"webdataset:{tmp_path / name}"


def test_img2dataset(tmp_path):
    source = sources.open_source(tiny.webdataset(tmp_path))
    assert source[4] == {"key": "00001/000010004", "image": tiny.picture(4), "captions": ["picture 4"]}


def test_captions_in_json(tmp_path):
    about = [
        {"caption": "a", "alt": "b"},
        {"caption": ["one", "two"]},
        {"alt": "b"},
        {"caption": None},
        [1],
        {"alt": ""},
    ]
    members = {}
    for number, fields in enumerate(about):
        members |= {f"{number}.jpg": PICTURE, f"{number}.json": json.dumps(fields).encode()}
    members |= {"6.jpg": PICTURE, "6.json": b"{", "7.jpg": PICTURE, "7.json": b'{"caption": "\xe9"}', "8.jpg": PICTURE}
    members |= {"9.jpg": PICTURE, "9.txt": b"text", "9.json": b'{"caption": "other", "alt": "third"}'}
    name = shard(tmp_path, members)
    missing = {f"0/{number}": "caption_missing" for number in (2, 3, 4, 5, 6, 8)}
    assert read(name) == missing | {
        "0/0": ["a"],
        "0/1": ["one", "two"],
        "0/7": "caption_not_utf8",
        "0/9": ["text"],
    }
    found = read(f"{name}?text=alt")
    assert (found["0/0"], found["0/1"], found["0/9"]) == (["b"], "caption_missing", ["third"])
    assert found["0/5"] == "caption_empty"


def test_samples(tmp_path):
    """A key ends at the first dot; suffixes may be in capitals; hidden files and notes belong to none."""
    members = {
        "./a/x.JPG": PICTURE,
        "./a/x.seg.png": b"mask",
        "./a/x.txt": b" one\n",
        "._a": b"of macOS",
        "__notes__.txt": b"of no sample",
        "a/y.txt": b"only text",
        "b.v2/z.webp": PICTURE,
        "b.v2/z.txt": b"caf\xe9",
        "README": b"no suffix",
        "w.png": PICTURE,
        "w.txt": b" ",
    }
    found = {"0/a/x": ["one"], "0/a/y": "missing", "0/b.v2/z": "caption_not_utf8", "0/w": "caption_empty"}
    assert read(shard(tmp_path, members)) == found


def test_patterns(tmp_path):
    for number in (0, 1, 2, 10):
        shard(tmp_path, {"a.jpg": PICTURE, "a.txt": b"x"}, f"{'val' if number == 10 else 'train'}/{number:03d}.tar")
    assert list(read(f"webdataset:{tmp_path}/train/{{000..002}}.tar")) == ["000/a", "001/a", "002/a"]
    assert list(read(f"webdataset:{tmp_path}/train/00?.tar")) == ["000/a", "001/a", "002/a"]
    assert list(read(f"webdataset:{tmp_path}/*/*.tar")) == ["train/000/a", "train/001/a", "train/002/a", "val/010/a"]
    assert list(read(f"webdataset:{tmp_path}/{{val,train}}/*0.tar")) == ["val/010/a", "train/000/a"]
    with pytest.raises(FileNotFoundError, match=r"2 of 5 shards are not there, the first .*train/003\.tar; fetch them"):
        sources.open_source(f"webdataset:{tmp_path}/train/{{000..004}}.tar")
    with pytest.raises(FileNotFoundError, match=r"no file matches .*tests/\*\.tar"):
        sources.open_source(f"webdataset:{tmp_path}/{{train,tests}}/*.tar")


def test_remote_shards(tmp_path):
    """On another file system of fsspec, and by a URL."""
    root = f"memory://{uuid.uuid4().hex}/corpus"
    tiny.webdataset(tmp_path)
    for file in tmp_path.iterdir():
        with fsspec.open(f"{root}/{file.name}", "wb") as stream:
            stream.write(file.read_bytes())
    source = sources.open_source(f"webdataset:{root}/*.tar")
    local = sources.open_source(f"webdataset:file://{tmp_path}/{{00000..00001}}.tar")
    assert [source[index] for index in range(len(source))] == [local[index] for index in range(len(local))]
    assert source.identity == local.identity


def test_headers_are_read_once(tmp_path, monkeypatch):
    """Nothing when the same shards are opened again; only what is new when there is one more, or one has changed."""
    name, opened = tiny.webdataset(tmp_path), []
    members = tar.members
    monkeypatch.setattr(tar, "members", lambda read, size: opened.append(size) or members(read, size))
    sources.open_source(name)
    assert len(opened) == 2
    sources.open_source(name)
    assert len(opened) == 2
    shard(tmp_path, {"a.jpg": PICTURE, "a.txt": b"x"}, "00002.tar")
    longer = f"webdataset:{tmp_path}/*.tar"
    sources.open_source(longer)
    assert len(opened) == 3
    shard(tmp_path, {"b.jpg": PICTURE, "b.txt": b"y"}, "00002.tar")
    assert len(sources.open_source(longer)) == tiny.COUNT + 1
    assert len(opened) == 4


def test_cut_shards(tmp_path):
    """The sample that is cut is bad, those before it are not."""
    members = {
        f"{number}.{suffix}": PICTURE if suffix == "jpg" else b"x" for number in range(3) for suffix in ("jpg", "txt")
    }
    name = shard(tmp_path, members)
    content = (tmp_path / "0.tar").read_bytes()
    ends = [
        member.end for member in tar.members(lambda offset, length: content[offset : offset + length], len(content))
    ]
    (tmp_path / "0.tar").write_bytes(content[: ends[4] - 100])
    assert read(name) == {"0/0": ["x"], "0/1": ["x"], "0/2": "truncated"}


def test_a_shard_that_changes_while_it_is_read(tmp_path):
    source = sources.open_source(shard(tmp_path, {"a.jpg": PICTURE, "a.txt": b"x"}))
    (tmp_path / "0.tar").write_bytes(b"something else" * 1000)
    with pytest.raises(BadRecord, match=r"0\.tar cannot be read: there is no tar header") as raised:
        source[0]
    assert raised.value.reason == "unreadable"
    (tmp_path / "0.tar").unlink()
    with pytest.raises(BadRecord, match="is gone") as raised:
        source[0]
    assert raised.value.reason == "missing"


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (
            lambda f: f.write_bytes(gzip.compress(f.read_bytes())),
            r"1 of 2 shards cannot be read, the first .*1\.tar: there is no",
        ),
        (lambda f: f.write_bytes(b"<html>not found</html>" * 100), "fetch or pack them again, or leave them out"),
        (
            lambda f: tiny.write_tar(f, {"a.jpg": PICTURE, "b.jpg": PICTURE, "a.txt": b"a", "b.txt": b"b"}),
            r"the files of a do not follow one another; pack them with tar --sort=name",
        ),
    ],
)
def test_bad_shards(tmp_path, break_it, message):
    name = tiny.webdataset(tmp_path)
    break_it(tmp_path / "00001.tar")
    with pytest.raises(ValueError, match=message):
        sources.open_source(name)


def test_no_sample(tmp_path):
    with pytest.raises(ValueError, match="holds no record"):
        sources.open_source(shard(tmp_path, {"README": b"nothing"}))
