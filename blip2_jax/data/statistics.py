"""What a corpus is made of, as counts that add up: those of its shards give those of the whole."""

from __future__ import annotations

import dataclasses
import re
import textwrap
from collections import Counter
from dataclasses import field
from typing import Any

from blip2_jax.data.records import Record

_WORD = re.compile(r"\w+(?:['’-]\w+)*")
# Of a shard's vocabulary, so that what is written about a shard stays small.
_WORDS_KEPT = 10_000
_QUANTILES = {"min": 0.0, "p5": 0.05, "p25": 0.25, "median": 0.5, "p75": 0.75, "p95": 0.95, "max": 1.0}


def words(text: str) -> list[str]:
    """The words of a text in lower case; hyphens and apostrophes inside a word belong to it."""
    return _WORD.findall(text.lower())


def quantile(counts: Counter, share: float) -> Any:
    """The smallest value that at least `share` of all counted values do not exceed."""
    seen, needed = 0, share * counts.total()
    for value in sorted(counts):
        seen += counts[value]
        if seen >= needed:
            return value
    raise ValueError("there is no quantile of nothing")


def most_frequent(counts: Counter, number: int | None = None) -> list[tuple[Any, int]]:
    """Values with their counts, the most frequent first, those that are level in order of their names."""
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:number]


@dataclasses.dataclass
class Statistics:
    """Counts over records.

    Attributes:
      records, captions, questions: how many there are.
      image_bytes: of all encoded images.
      file_bytes: of all files that hold the records.
      resized: images that were made smaller.
      vocabularies_cut: shards of whose words only the 10,000 most frequent are counted.
      shorter_side, longer_side: how many images have a side of so many pixels.
      aspect: of longer over shorter side, in hundredths.
      captions_an_image, words_a_caption: how many images, and captions, have so many.
      words: how often each occurs in captions.
      formats: of images, as Pillow names them.
      rejected: records left out, by reason.
    """

    records: int = 0
    captions: int = 0
    questions: int = 0
    image_bytes: int = 0
    file_bytes: int = 0
    resized: int = 0
    vocabularies_cut: int = 0
    shorter_side: Counter[int] = field(default_factory=Counter)
    longer_side: Counter[int] = field(default_factory=Counter)
    aspect: Counter[int] = field(default_factory=Counter)
    captions_an_image: Counter[int] = field(default_factory=Counter)
    words_a_caption: Counter[int] = field(default_factory=Counter)
    words: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)

    def add(self, record: Record, size: tuple[int, int], image_format: str) -> None:
        """Count a record whose image is of `size` (width, height) in pixels, and of a format such as "JPEG"."""
        captions, (shorter, longer) = record.get("captions", []), sorted(size)
        self.records += 1
        self.captions += len(captions)
        self.questions += "question" in record
        self.image_bytes += len(record["image"])
        self.shorter_side[shorter] += 1
        self.longer_side[longer] += 1
        self.aspect[round(100 * longer / shorter)] += 1
        self.formats[image_format] += 1
        self.captions_an_image[len(captions)] += 1
        for caption in captions:
            found = words(caption)
            self.words_a_caption[len(found)] += 1
            self.words.update(found)

    def update(self, other: Statistics) -> None:
        """Add what was counted elsewhere."""
        for name, value in vars(other).items():
            if isinstance(value, Counter):
                getattr(self, name).update(value)
            else:
                setattr(self, name, getattr(self, name) + value)

    def to_json(self) -> dict[str, Any]:
        """Numbers, and counters as lists of [value, count]."""
        kept = dataclasses.replace(self)
        if len(self.words) > _WORDS_KEPT:
            kept.words, kept.vocabularies_cut = Counter(dict(most_frequent(self.words, _WORDS_KEPT))), 1
        return {name: sorted(v.items()) if isinstance(v, Counter) else v for name, v in vars(kept).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Statistics:
        """What `to_json` made."""
        return cls(**{name: Counter(dict(v)) if isinstance(v, list) else v for name, v in content.items()})


# What has a distribution: its label in the table, and how many of its units are one.
_MEASURED = {
    "shorter_side": ("shorter side, pixels", 1),
    "longer_side": ("longer side, pixels", 1),
    "aspect": ("longer / shorter side", 100),
    "captions_an_image": ("captions an image", 1),
    "words_a_caption": ("words a caption", 1),
}


def _distributions(statistics: Statistics) -> dict[str, dict[str, float]]:
    """Quantiles by name, without what there is nothing of."""
    found = {}
    for name, (_, units) in _MEASURED.items():
        if counts := getattr(statistics, name):
            values = {label: quantile(counts, share) for label, share in _QUANTILES.items()}
            found[name] = {label: value / units for label, value in values.items()} if units > 1 else values
    return found


def summary(statistics: Statistics) -> dict[str, Any]:
    """The content of statistics.json: totals, quantiles, formats, the 200 most frequent words, rejects by reason."""
    totals = {name: value for name, value in vars(statistics).items() if not isinstance(value, Counter)}
    return totals | {
        "quantiles": _distributions(statistics),
        "formats": dict(most_frequent(statistics.formats)),
        "most_frequent_words": most_frequent(statistics.words, 200),
        "rejected": dict(most_frequent(statistics.rejected)),
    }


def table(statistics: Statistics) -> str:
    """The summary for a terminal."""
    s, listed = statistics, lambda pairs: ", ".join(f"{name} {count:,}" for name, count in pairs)
    size = f"{s.image_bytes / 1e6:,.2f} MB, {s.image_bytes / max(s.records, 1) / 1e3:,.1f} kB each"
    rows = {
        "records": f"{s.records:,}",
        "captions": f"{s.captions:,}",
        "questions": f"{s.questions:,}" if s.questions else "",
        "images": f"{size}; {listed(most_frequent(s.formats))}",
        "made smaller": f"{s.resized:,}" if s.resized else "",
        "files": f"{s.file_bytes / 1e6:,.2f} MB",
        "rejected": listed(most_frequent(s.rejected)) or "none",
    }
    lines = [f"{label:<24}{text}" for label, text in rows.items() if text]
    lines += ["", " " * 24 + "".join(f"{label:>9}" for label in _QUANTILES)]
    for name, values in _distributions(s).items():
        label, units = _MEASURED[name]
        lines.append(f"{label:<24}" + "".join(f"{v:>9,.2f}" if units > 1 else f"{v:>9,}" for v in values.values()))
    if s.words:
        cut = f" (of {s.vocabularies_cut:,} shards only the 10,000 most frequent)" if s.vocabularies_cut else ""
        lines += ["", *textwrap.wrap(f"most frequent words{cut}: {listed(most_frequent(s.words, 40))}", 96)]
    return "\n".join(lines)
