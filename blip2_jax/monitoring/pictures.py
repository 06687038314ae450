"""Small pictures for reports: taken from sources once, kept among the samples, shown as often as a page likes."""

from __future__ import annotations

import base64
import contextlib
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from PIL import Image

from blip2_jax.data.images import decode, resize
from blip2_jax.data.records import BadRecord, Source

Sample = Mapping[str, Any]

_SIDE = 112  # Pixels: twice what a page shows them at.


class Thumbnails:
    """The records of a source as small pictures, by key; the source is searched as far as is needed, and once."""

    def __init__(self, source: Source):
        self._source, self._places, self._seen = source, {}, 0

    def samples(self, keys: Iterable[str]) -> list[dict[str, str]]:
        """A sample {"kind": "picture", "key", "image"} for each key, the image as a data URL, whole and square.

        Raises:
          KeyError: no record has such a key.
        """
        return [{"kind": "picture", "key": key, "image": self._thumbnail(key)} for key in sorted(set(keys))]

    def _thumbnail(self, key: str) -> str:
        record = self._source[self._place(key)]
        encoded = io.BytesIO()
        Image.fromarray(resize(decode(record["image"], key), _SIDE)).save(encoded, "WEBP", quality=80)
        return data_url(encoded.getvalue())

    def _place(self, key: str) -> int:
        while key not in self._places:
            if self._seen == len(self._source):
                raise KeyError(f"no record has the key {key!r}")
            with contextlib.suppress(BadRecord):  # What cannot be used was not evaluated either.
                self._places[self._source[self._seen]["key"]] = self._seen
            self._seen += 1
        return self._places[key]


def data_url(encoded: bytes) -> str:
    """A JPEG, PNG or WebP as an address that holds all of it."""
    kind = "webp" if encoded[8:12] == b"WEBP" else "png" if encoded[:4] == b"\x89PNG" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


class Gallery:
    """The pictures of some samples on one page, each of which the page holds once, however often it shows it."""

    def __init__(self, samples: Mapping[str, Sequence[Sample]]):
        """Of samples by source."""
        self._images = {
            (name, sample["key"]): sample["image"]
            for name, found in samples.items()
            for sample in found
            if sample["kind"] == "picture"
        }
        self._numbers: dict[tuple[str, str], int] = {}

    def show(self, name: str, key: str, kind: str = "", inside: str = "") -> str:
        """An element that shows a picture of a source, of the CSS class `kind`, with something over it."""
        number = self._numbers.setdefault((name, key), len(self._numbers))
        return f'<span class="picture p{number} {kind}" title="{html.escape(key)}">{inside}</span>'

    def style(self) -> str:
        """What makes the elements of `show` show their pictures; empty boxes where there is none."""
        rules = [
            f".p{number}{{background-image:url({self._images[place]})}}"
            for place, number in self._numbers.items()
            if place in self._images
        ]
        return f"<style>{''.join(rules)}</style>"
