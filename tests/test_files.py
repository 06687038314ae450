"""Files appear whole or not at all."""

import errno
import os
import pathlib

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


MOUNTS = r"""
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/root rw
40 27 0:50 / /mnt/my\040bucket rw,nosuid - fuse.gcsfuse blip2 rw,user_id=0
41 27 0:51 / /mnt/my\040bucket/scratch rw - ext4 /dev/sdb rw
42 27 0:52 / /s3 rw - fuse mountpoint-s3 rw
43 27 8:17 / /ntfs rw - fuseblk /dev/sdc rw
""".strip()


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("/mnt/my bucket/runs/s1", True),
        ("/mnt/my bucket", True),
        ("/mnt/my bucket/scratch/runs", False),
        ("/mnt/my", False),
        ("/s3/runs", True),
        ("/s3runs", False),
        ("/ntfs/runs", False),
    ],
)
def test_buckets_are_known_by_how_they_are_mounted(tmp_path, folder, expected):
    (tmp_path / "mountinfo").write_text(MOUNTS)
    assert files.in_object_store(pathlib.Path(folder), tmp_path / "mountinfo") == expected


def test_a_temporary_folder_is_no_bucket(tmp_path):
    assert not files.in_object_store(tmp_path)
    assert not files.in_object_store(tmp_path, tmp_path / "no such file")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", (0.0, 0.0))


def test_what_fails_for_a_while_is_tried_again(impatient, capsys):
    left = iter([OSError("busy"), OSError("still busy"), None])

    def attempt():
        trouble = next(left)
        if trouble:
            raise trouble
        return "done"

    assert files.patiently(attempt, "the disk") == "done"
    assert "the disk: still busy; trying again in 0 s" in capsys.readouterr().err


def test_what_keeps_failing_is_an_error(impatient):
    def attempt():
        raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        files.patiently(attempt, "the disk")


def test_a_line_that_fails_half_way_is_not_there(tmp_path, impatient):
    lines = files.Appender(tmp_path / "rows.jsonl", "first\n")
    lines.append("second")
    stream, lines._stream = lines._stream, None

    class Full:
        """Takes three bytes of a line, and no more."""

        def __getattr__(self, name):
            return getattr(stream, name)

        def write(self, rest):
            if len(rest) > 3 and rest.startswith(b"t"):
                return stream.write(rest[:3])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    lines._stream = Full()
    with pytest.raises(OSError, match="No space"):
        lines.append("third")
    assert (tmp_path / "rows.jsonl").read_text() == "first\nsecond\n"
    lines._stream = stream
    lines.append("third")
    lines.close()
    assert (tmp_path / "rows.jsonl").read_text() == "first\nsecond\nthird\n"
