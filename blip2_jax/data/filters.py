"""Which records are used: by the size of the picture, and by the length and the writing of its captions."""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import unicodedata
from collections.abc import Mapping
from typing import Any

import ml_collections
from PIL import Image

from blip2_jax.data.images import Limits
from blip2_jax.data.records import BadRecord, Record

# As Unicode's names of characters begin. Japanese is cjk,hiragana,katakana; Korean is hangul.
SCRIPTS = (
    *("latin", "greek", "cyrillic", "armenian", "georgian", "hebrew", "arabic", "syriac", "thaana", "ethiopic"),
    *("devanagari", "bengali", "gurmukhi", "gujarati", "oriya", "tamil", "telugu", "kannada", "malayalam", "sinhala"),
    *("thai", "lao", "khmer", "myanmar", "tibetan", "mongolian", "cherokee"),
    *("cjk", "bopomofo", "hiragana", "katakana", "hangul"),
)
# Written without spaces between words.
_SPACELESS = frozenset(("cjk", "hiragana", "katakana", "thai", "lao", "khmer", "myanmar"))

MIN_SHARE = 0.9  # Of a caption's letters in the scripts asked for: foreign names may stand in it.

_PILLOW_MAX_PIXELS = 2 * Image.MAX_IMAGE_PIXELS


@dataclasses.dataclass(frozen=True)
class Filters:
    """What a record has to be; the defaults keep what can be learned from in a corpus from the web.

    Attributes:
      min_side: pixels of the shorter side; below are icons and counters of visits.
      max_aspect: longer side by shorter side; beyond are banners and rulers.
      max_pixels: of a picture; beyond it must be a decompression bomb.
      min_words, max_words: of a caption; longer ones are pages. In scripts without spaces each letter counts.
      scripts: some of SCRIPTS, in which 9 of 10 letters must be; none: all are welcome.
    """

    min_side: int = 32
    max_aspect: float = 8.0
    max_pixels: int = 2**26
    min_words: int = 1
    max_words: int = 256
    scripts: tuple[str, ...] = ()

    def __post_init__(self):
        pixels = (self.min_side**2, _PILLOW_MAX_PIXELS)
        for name, expected, holds in (
            ("min_side", "at least 1 pixel", self.min_side >= 1),
            ("max_aspect", "at least 1, which is a square", self.max_aspect >= 1),
            (
                "max_pixels",
                "from {:,}, which is min_side squared, to {:,}, which is Pillow's limit".format(*pixels),
                pixels[0] <= self.max_pixels <= pixels[1],
            ),
            ("min_words", "at least 1, since captions without a word are never used", self.min_words >= 1),
            ("max_words", f"at least min_words, which is {self.min_words}", self.max_words >= self.min_words),
            ("scripts", f"names among {', '.join(SCRIPTS)}", set(self.scripts) <= set(SCRIPTS)),
        ):
            if not holds:
                raise ValueError(f"data.filters.{name}: expected {expected}, found {getattr(self, name)!r}")

    @property
    def limits(self) -> Limits:
        """Those of the picture."""
        return Limits(self.min_side, self.max_aspect, self.max_pixels)

    def captions(self, record: Record) -> list[str]:
        """The captions of a record that pass, in their order.

        Raises:
          BadRecord: none does; the reason is the first one's.
        """
        if not record["captions"]:
            raise BadRecord("caption_missing", record["key"], "expected a caption, found none")
        objections = [self._objection(caption) for caption in record["captions"]]
        passed = [caption for caption, found in zip(record["captions"], objections, strict=True) if found is None]
        if not passed:
            reason, detail = objections[0]
            raise BadRecord(reason, record["key"], f"{detail}: {record['captions'][0][:80]!r}")
        return passed

    def _objection(self, caption: str) -> tuple[str, str] | None:
        """Reason and detail."""
        words = count_words(caption)
        if not words:
            return "caption_empty", "expected words, found none"
        if not self.min_words <= words <= self.max_words:
            return "caption_length", f"expected {self.min_words} to {self.max_words} words, found {words}"
        plain = caption.isascii() and "latin" in self.scripts
        if self.scripts and not plain:
            counts = collections.Counter(filter(None, map(script, caption)))
            total, wanted = counts.total(), sum(counts[name] for name in self.scripts)
            if wanted < MIN_SHARE * total:
                found = ", ".join(f"{count / total:.0%} {name}" for name, count in counts.most_common(3))
                return "script", f"expected {MIN_SHARE:.0%} of the letters in {', '.join(self.scripts)}, found {found}"
        return None


EVERYTHING = Filters(min_side=1, max_aspect=math.inf, max_words=2**31)


@functools.cache
def script(character: str) -> str:
    """The script of a letter, one of SCRIPTS or a rarer one; "" for what is no letter or belongs to several."""
    if not character.isalpha():
        return ""
    # Wide, narrow and mathematical forms are their plain letters.
    name = unicodedata.name(unicodedata.normalize("NFKC", character)[0], "")
    first = name.replace("-", " ").partition(" ")[0].lower()
    return "" if first in ("modifier", "ideographic") else first


def count_words(text: str) -> int:
    """What stands between spaces and has a letter or digit; in scripts without spaces, each letter."""
    if text.isascii():
        return sum(any(map(str.isalnum, token)) for token in text.split())
    count = 0
    for token in text.split():
        scripts = [script(character) for character in token if character.isalnum()]
        spaceless = sum(name in _SPACELESS for name in scripts)
        count += spaceless + (len(scripts) > spaceless)
    return count


def block() -> ml_collections.ConfigDict:
    """The block of a recipe: the defaults."""
    values = dataclasses.asdict(Filters())
    return ml_collections.ConfigDict(values | {"scripts": ""})


def filters(block: Mapping[str, Any]) -> Filters:
    """From `config.data.filters`, which may set any of the attributes; `scripts` as one string, "latin,cyrillic".

    Raises:
      ValueError: an unknown name, a value of the wrong type, or one that makes no sense.
    """
    values = dict(block)
    known = {field.name: field for field in dataclasses.fields(Filters)}
    for name, value in values.items():
        if name not in known:
            raise ValueError(f"data.filters.{name}: no such filter; expected {', '.join(known)}")
        expected = {"max_aspect": (int, float), "scripts": (str,)}.get(name, (int,))
        if not isinstance(value, expected) or isinstance(value, bool):
            kinds = " or ".join(kind.__name__ for kind in expected)
            raise ValueError(f"data.filters.{name}: expected {kinds}, found {value!r}")
    if "scripts" in values:
        names = (name.strip().lower() for name in values["scripts"].split(","))
        values["scripts"] = tuple(name for name in names if name)
    return Filters(**values)
