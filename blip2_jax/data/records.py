"""What a source holds: records, and those that cannot be used.

A record is a dictionary: `key` (str, unique in its source and the same on every machine), `image` (encoded bytes),
`captions` (list of str), and whatever else the source knows, such as `category`. Records of visual question answering
have `question`, `answers` (list of str) and `weights` (as many floats, which sum to 1), and need no captions.
"""

from __future__ import annotations

from typing import Any, Protocol

Record = dict[str, Any]

# Why a record cannot be used.
REASONS = (
    "missing",  # The file, or the member of an archive, is not there.
    "unreadable",  # Of no known format, or damaged.
    "truncated",  # It ends early.
    "too_small",
    "too_large",  # So many pixels that it must be a decompression bomb.
    "aspect",
    "cmyk",
    "deep",  # More than 8 bits a channel.
    "animated",
    "caption_missing",
    "caption_empty",
    "caption_not_utf8",
    "caption_length",
    "script",  # Written in letters of other languages than those asked for.
)


class BadRecord(ValueError):
    """A record that cannot be used.

    Attributes:
      reason: one of REASONS.
      where: the key of the record.
      detail: what was expected and found.
    """

    def __init__(self, reason: str, where: str, detail: str):
        if reason not in REASONS:
            raise KeyError(f"{reason!r} is none of the reasons {', '.join(REASONS)}")
        super().__init__(reason, where, detail)
        self.reason, self.where, self.detail = reason, where, detail

    def __str__(self) -> str:
        return f"{self.where}: {self.detail} ({self.reason})"


class Source(Protocol):
    """Random access to records, from several threads at once; it can be pickled, since workers are processes.

    Attributes:
      identity: SHA-256 of what the records are and of their order, the same on every machine.
    """

    identity: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record:
        """Record `index`; raises BadRecord where this one cannot be used."""
