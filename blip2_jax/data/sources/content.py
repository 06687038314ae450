"""What sources have in common: what identifies their content, and how captions and images come out of files."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

from blip2_jax.data.records import BadRecord

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
CAPTION_FIELDS = ("captions", "caption", "text")


def digest(parts: Iterable[str]) -> str:
    """SHA-256, hex, of some texts in order."""
    return hashlib.sha256("\0".join(parts).encode(errors="surrogatepass")).hexdigest()


def file_digest(file: pathlib.Path) -> str:
    """SHA-256, hex, of what is in a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def relative_names(paths: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them share."""
    parts = [path.split("/") for path in paths]
    levels = list(zip(*(part[:-1] for part in parts), strict=False))
    shared = next((depth for depth, names in enumerate(levels) if len(set(names)) > 1), len(levels))
    return ["/".join(part[shared:]) for part in parts]


def _caption(value: Any, key: str) -> str:
    """A caption without the blanks around it; raises BadRecord if there is none."""
    if not isinstance(value, str | bytes):
        detail = "there is no caption" if value is None else f"expected a text as caption, found {str(value)[:60]}"
        raise BadRecord("caption_missing", key, detail)
    try:
        # Lone surrogates, which JSON can spell, are no characters either.
        text = value.decode() if isinstance(value, bytes) else value.encode().decode()
    except UnicodeError as error:
        raise BadRecord("caption_not_utf8", key, f"the caption is not UTF-8: {error}") from error
    if not text.strip():
        raise BadRecord("caption_empty", key, "the caption is empty")
    return text.strip()


def captions_of(value: Any, key: str) -> list[str]:
    """The usable ones among one or several captions.

    Args:
      value: a caption, as str or UTF-8 bytes, or a list of them; None where there is none.
      key: of the record.

    Raises:
      BadRecord: none is usable; the reason is that of the first.
    """
    captions, problems = [], []
    for item in value if isinstance(value, list | tuple) else [value]:
        try:
            captions.append(_caption(item, key))
        except BadRecord as problem:
            problems.append(problem)
    if not captions:
        raise problems[0] if problems else BadRecord("caption_missing", key, "the list of captions is empty")
    return captions


def caption_field(names: Iterable[str], chosen: str = "") -> str | None:
    """Which of a record's fields holds its captions: the one that the user chose, or the first of the usual names."""
    names = set(names)
    return next((name for name in ([chosen] if chosen else CAPTION_FIELDS) if name in names), None)


def answers_of(answers: Sequence[str]) -> dict[str, list]:
    """The answers to a question, each once, and the share of those asked who gave it: lists `answers` and `weights`."""
    counts: dict[str, int] = {}
    for answer in answers:
        counts[answer.strip()] = counts.get(answer.strip(), 0) + 1
    return {"answers": list(counts), "weights": [count / len(answers) for count in counts.values()]}


def read_image(folders: Sequence[pathlib.Path], name: str, key: str) -> bytes:
    """An image file from the first of some folders that has it.

    Raises:
      BadRecord: it is in none of them, or cannot be read.
    """
    for folder in folders:
        try:
            return (folder / name).read_bytes()
        except (
            FileNotFoundError,
            NotADirectoryError,
            IsADirectoryError,
            ValueError,
        ):  # Of names that no file can have.
            continue
        except OSError as error:
            raise BadRecord("unreadable", key, f"{folder / name} cannot be read: {error}") from error
    raise BadRecord("missing", key, f"there is no image {name} in {' or '.join(map(str, folders))}")
