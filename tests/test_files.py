"""Files appear whole or not at all."""

import errno
import os

import pytest

from blip2_jax import files


def test_written_whole(tmp_path):
    file = tmp_path / "new" / "file.json"
    files.write_json(file, {"b": 1, "a": "ü"})
    assert file.read_text() == '{\n "a": "\\u00fc",\n "b": 1\n}\n'
    assert [f.name for f in file.parent.iterdir()] == ["file.json"]


def test_a_failure_leaves_the_older_file(tmp_path, monkeypatch):
    file = tmp_path / "file.txt"
    file.write_text("old")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.pathlib.Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(file, "new")
    assert file.read_text() == "old"
    assert [f.name for f in tmp_path.iterdir()] == ["file.txt"]


def test_room_is_asked_of_the_disk_that_will_be_written(tmp_path):
    files.require_room(tmp_path / "not" / "there" / "yet", 1, "a byte", "")
    with pytest.raises(OSError, match=r"no room for a mountain: .*yet has .* GB free, .* are needed; climb"):
        files.require_room(tmp_path / "yet", 10**18, "a mountain", "climb")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file"),
        ValueError(f"RESOURCE_EXHAUSTED: some/file: {os.strerror(errno.ENOSPC)} [os_error_code='28']"),
    ],
    ids=["Python's", "Orbax's"],
)
def test_a_full_disk_is_called_by_its_name(tmp_path, error):
    message = r"a disk is full, at work in .*some/file.*; buy another"
    with pytest.raises(OSError, match=message), files.clear_about_full_disk(tmp_path, "buy another"):
        raise error


def test_other_troubles_keep_their_name(tmp_path):
    with pytest.raises(ValueError, match=r"^another trouble$"), files.clear_about_full_disk(tmp_path, "buy another"):
        raise ValueError("another trouble")


def test_differences_between_what_is_there_and_what_is_asked_for():
    known = {"a": 1, "b": {"c": [1, 2], "d": None}, "e": {"f": 1}}
    asked = {"a": 1, "b": {"c": [1, 3]}, "e": None, "g": "new"}
    assert files.differences(known, known) == []
    assert files.differences(known, asked) == [
        "  b/c: [1, 2] there, [1, 3] asked for",
        "  e: {'f': 1} there, None asked for",
        "  g: None there, 'new' asked for",
    ]


def test_a_file_takes_the_place_of_another_only_when_all_went_well(tmp_path):
    file = tmp_path / "deep" / "file"
    with files.replacing(file) as partial:
        partial.write_text("first")
        assert not file.exists()
    with pytest.raises(RuntimeError), files.replacing(file) as partial:
        partial.write_text("second")
        raise RuntimeError
    assert file.read_text() == "first"
    assert list(file.parent.iterdir()) == [file]
