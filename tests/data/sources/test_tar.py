"""The index of a tar archive against Python's own tarfile."""

import io
import tarfile

import pytest

from blip2_jax.data.sources import tar

LONG = "folder/" * 30 + "name.jpg"
CONTENTS = {
    "a.jpg": b"x" * 1000,
    "a.txt": b"",
    "b.jpg": b"y" * 512,
    "prefix/" * 18 + "n.jpg": b"z",  # Longer than a name, short enough for the prefix of ustar.
    LONG: b"long" * 300,
    "ümlaut.txt": b"u",
}


def archive(contents, form):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as written:
        folder = tarfile.TarInfo("folder")
        folder.type, folder.size = tarfile.DIRTYPE, 0
        written.addfile(folder)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
        written.addfile(link)
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 12345.5 if form == tarfile.PAX_FORMAT else 12345
            written.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def reader(content):
    return lambda offset, length: content[offset : offset + length]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members(form):
    contents = {name: content for name, content in CONTENTS.items() if name != LONG or form != tarfile.USTAR_FORMAT}
    packed = archive(contents, form)
    found = list(tar.members(reader(packed), len(packed)))
    assert {member.name: packed[member.content : member.end] for member in found} == contents
    with tarfile.open(fileobj=io.BytesIO(packed)) as expected:
        files = [member for member in expected if member.isfile()]
    assert [(m.name, m.content) for m in found] == [(m.name, m.offset_data) for m in files]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_part_can_be_read_alone(form):
    """From a member's first header on, also where that is one of a long name."""
    packed = archive(CONTENTS, form)
    for member in tar.members(reader(packed), len(packed)):
        part = packed[member.start : member.end]
        (alone,) = tar.members(reader(part), len(part))
        assert alone.name == member.name
        assert part[alone.content : alone.end] == CONTENTS[member.name]


def test_nothing_but_headers_is_read():
    packed, read = archive(CONTENTS, tarfile.GNU_FORMAT), []

    def count(offset, length):
        read.append(length)
        return packed[offset : offset + length]

    list(tar.members(count, len(packed)))
    assert sum(read) < 512 * (len(CONTENTS) + 6)


def test_sizes_beyond_octal_digits():
    header = bytearray(archive({"a": b""}, tarfile.GNU_FORMAT)[1024:1536])
    size = 2**40 + 5
    header[124:136] = b"\x80" + size.to_bytes(11)
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (member,) = tar.members(reader(bytes(header)), len(header))
    assert member.end - member.content == size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x1f\x8b\x08" + bytes(range(256)) * 4, "there is no tar header at byte 0"),
        (b"<html>" * 200, "there is no tar header at byte 0"),
        (
            archive({"a": b"x" * 600}, tarfile.GNU_FORMAT).replace(b"a\0", b"b\0", 1),
            "the tar header at byte 1024 is damaged",
        ),
    ],
)
def test_no_archive(content, message):
    with pytest.raises(ValueError, match=message):
        list(tar.members(reader(content), len(content)))


def test_the_end():
    """Of an archive without its end mark, of one that is cut in a member, and of an empty one."""
    packed = archive({"a": b"x" * 600, "b": b"y" * 600}, tarfile.GNU_FORMAT)
    whole = list(tar.members(reader(packed), len(packed)))
    last = whole[-1]
    for size in (last.content + 1024, last.end, last.content + 1, last.content):
        assert list(tar.members(reader(packed[:size]), size)) == whole
    for size in (last.start, last.start + 100):
        assert list(tar.members(reader(packed[:size]), size)) == whole[:-1]
    assert list(tar.members(reader(b""), 0)) == []
