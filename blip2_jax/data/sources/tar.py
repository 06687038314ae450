"""Where the files of a tar archive are, found by reading nothing but their headers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

_BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_LONG_NAME, _EXTENDED = b"L", b"x"
# Links, devices and folders: whatever their headers say, no content follows.
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")

Read = Callable[[int, int], bytes]


class Member(NamedTuple):
    """A regular file.

    Attributes:
      name: as it is written in the archive.
      start: of its first header, in bytes.
      content: where its content starts.
      end: of its content.
    """

    name: str
    start: int
    content: int
    end: int


def members(read: Read, size: int) -> Iterator[Member]:
    """The files of an archive, or of a part of one that starts with a header; the last one may end behind `size`.

    Python's own tarfile takes ten times as long, which is hours for a hundred million images.

    Args:
      read: (offset, length) to bytes, fewer at the end.
      size: of the archive, in bytes.

    Raises:
      ValueError: a header is damaged, or it is no archive at all, such as a compressed one.
    """
    offset, start, extended = 0, 0, {}
    while offset + _BLOCK <= size:
        header = read(offset, _BLOCK)
        if not header.strip(b"\0"):
            return
        name, length, kind = _parse(header, offset)
        if kind in _REGULAR and "size" in extended:
            length = _size(extended["size"], offset)
        content = offset + _BLOCK
        if kind in (_LONG_NAME, _EXTENDED):
            extended |= _extension(read(content, length), kind, offset)
        elif kind in _REGULAR:
            yield Member(extended.get("path", name), start, content, content + length)
        offset = content if kind in _WITHOUT_CONTENT else content + -(-length // _BLOCK) * _BLOCK
        if kind in _WITHOUT_CONTENT or kind in _REGULAR:
            start, extended = offset, {}


def _size(text: str, offset: int) -> int:
    # Digits alone: a size below 0 would lead back, and the reader round in circles.
    if not text.isascii() or not text.isdecimal():
        raise ValueError(f"the tar header before byte {offset} gives the size {text[:20]!r}")
    return int(text)


def _parse(header: bytes, offset: int) -> tuple[str, int, bytes]:
    """Name, length and kind of a member."""
    try:
        checksum = int(header[148:156].strip(b"\0 "), 8)
        length = header[124:136]
        # Base 256, for what eleven octal digits cannot say.
        length = int.from_bytes(length[1:]) if length[0] == 0x80 else int(length.strip(b"\0 ") or b"0", 8)
    except ValueError as error:
        raise ValueError(f"there is no tar header at byte {offset}") from error
    if length < 0:
        raise ValueError(f"the tar header at byte {offset} gives the size {length}")
    if sum(header) - sum(header[148:156]) + 8 * ord(" ") != checksum:
        raise ValueError(f"the tar header at byte {offset} is damaged")
    name = header[:100].partition(b"\0")[0]
    prefix = header[345:500].partition(b"\0")[0] if header[257:263] == b"ustar\0" else b""
    return (prefix + b"/" + name if prefix else name).decode(errors="replace"), length, header[156:157]


def _extension(content: bytes, kind: bytes, offset: int) -> dict[str, str]:
    """What a header that stands before a member's own says of it: a long name, or lines "LENGTH KEY=VALUE"."""
    if kind == _LONG_NAME:
        return {"path": content.partition(b"\0")[0].decode(errors="replace")}
    found = {}
    while content.strip(b"\0"):
        digits = content.partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        if not length:
            raise ValueError(f"the tar header at byte {offset} is damaged: it holds a line of no length")
        key, _, value = content[:length].partition(b" ")[2].rstrip(b"\n").partition(b"=")
        found[key.decode(errors="replace")] = value.decode(errors="replace")
        content = content[length:]
    return found
