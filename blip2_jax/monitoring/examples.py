"""What evaluations found, shown: retrieved pictures, captions, and where the queries look.

Samples are what `Task.evaluate` and `evaluation.attention` give and samples/STEP.json keeps, by source, each with its
`kind`: "text_to_image", "image_to_text", "caption", "attention"; and "picture", a small picture that the page needs.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from blip2_jax.monitoring.pictures import Gallery, Sample, data_url

STYLE = """
.picture{display:inline-block;width:56px;height:56px;border-radius:6px;border:3px solid transparent;flex:none}
.picture{background:#f1f3f4 center/cover;background-origin:border-box;position:relative;vertical-align:middle}
.picture.right{border-color:#146c2e} .picture img{position:absolute;inset:-3px;width:62px;height:62px;border-radius:6px}
.picture.large{width:72px;height:72px;border:0} .grid{display:flex;flex-wrap:wrap;gap:14px}
.card{width:150px;font-size:13px;overflow-wrap:anywhere} .card .picture{display:block;margin-bottom:3px}
.right{color:#146c2e} .wrong{color:#b3261e} .row{display:flex;align-items:center;gap:6px;margin:6px 0;font-size:13px}
.row .query{width:190px;flex:none;overflow-wrap:anywhere} .row .arrow{color:#5f6368;width:70px;text-align:center}
.row .found{display:flex;flex-wrap:wrap;gap:6px}
"""
_ROWS, _CARDS = 5, 24  # Of each kind that a page shows.


def sections(samples: Mapping[str, Sequence[Sample]]) -> str:
    """What was found on each source."""
    gallery, parts = Gallery(samples), []
    for name, found in samples.items():
        kinds, title = {sample["kind"] for sample in found}, html.escape(name)
        if "text_to_image" in kinds:
            parts.append(f"<h3>Pictures of a caption, {title}</h3>{_retrieval(name, found, gallery)}")
        if "image_to_text" in kinds:
            parts.append(f"<h3>Captions of a picture, {title}</h3>{_retrieved_captions(name, found, gallery)}")
        if "caption" in kinds:
            legend = "<p><small>black: true; below: generated</small></p>"
            parts.append(f"<h3>Captions written for {title}</h3>{legend}{_captions(name, found, gallery)}")
        if "attention" in kinds:
            parts.append(f"<h3>Where the queries look in {title}</h3>{_attention(name, found, gallery)}")
    return "".join(parts) + gallery.style()


def keys_shown(samples: Sequence[Sample]) -> set[str]:
    """Keys of the pictures that a page shows of a source's samples."""
    keys = {sample["key"] for sample in _shown(samples, "attention") + _shown(samples, "caption")}
    keys |= {sample["key"] for sample in _shown(samples, "image_to_text")}
    for _, _, rows in _retrieved(samples):
        keys |= {key for sample, again in rows for key in [*sample["found"], *(again["found"] if again else [])]}
    return keys


def _spread(items: Sequence[Any], count: int) -> list[Any]:
    """`count` of the items, evenly spread."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / max(count - 1, 1))] for i in range(count)]


def _by_itc(samples: Sequence[Sample], kind: str) -> list[Sample]:
    return [sample for sample in samples if sample["kind"] == kind and sample.get("by", "itc") == "itc"]


def _shown(samples: Sequence[Sample], kind: str) -> list[Sample]:
    """The samples of a kind that a page shows."""
    return _spread(_by_itc(samples, kind), _ROWS if kind == "image_to_text" else _CARDS)


def _retrieved(samples: Sequence[Sample]) -> Iterator[tuple[str, str, list[tuple[Sample, Sample | None]]]]:
    """Captions that a page shows with what ITC found first and, if there is that, the same re-ranked by ITM."""
    found = _by_itc(samples, "text_to_image")
    again = {s["text"]: s for s in samples if s["kind"] == "text_to_image" and s.get("by") == "itm"}
    for title, right in (("found at once", True), ("something else came first", False)):
        group = [sample for sample in found if sample["right"][0] == right]
        rows = [(sample, again.get(sample["text"])) for sample in _spread(group, _ROWS)]
        yield title, f"{len(group)} of {len(found)}", rows


def _retrieval(name: str, samples: Sequence[Sample], gallery: Gallery) -> str:
    """Captions with the pictures found first, by ITC and re-ranked by ITM, half of them found right and half wrong."""
    show = lambda sample: "".join(
        gallery.show(name, key, "right" if ok else "") for key, ok in zip(sample["found"], sample["right"], strict=True)
    )
    parts = []
    for title, count, rows in _retrieved(samples):
        parts.append(f"<h4>By ITC {title} ({count})</h4>")
        for sample, again in rows:
            itm = f'<span class="arrow">with ITM</span><span class="found">{show(again)}</span>' if again else ""
            text = f'<span class="query">{html.escape(sample["text"])}</span>'
            parts.append(f'<div class="row">{text}<span class="found">{show(sample)}</span>{itm}</div>')
    return "".join(parts)


def _retrieved_captions(name: str, samples: Sequence[Sample], gallery: Gallery) -> str:
    """Pictures with the captions that ITC finds first."""
    cards = []
    for sample in _shown(samples, "image_to_text"):
        lines = "<br>".join(
            f'<span class="{"right" if ok else "wrong"}">{html.escape(text)}</span>'
            for text, ok in zip(sample["found"], sample["right"], strict=True)
        )
        cards.append(f'<div class="card">{gallery.show(name, sample["key"], "large")}{lines}</div>')
    return f'<div class="grid">{"".join(cards)}</div>'


def _captions(name: str, samples: Sequence[Sample], gallery: Gallery) -> str:
    """A grid of pictures with their true and their generated captions, and answers."""
    cards = []
    for sample in _shown(samples, "caption"):
        kind = "right" if sample["generated"] == sample["text"] else "wrong"
        answer = ""
        if "answer" in sample:
            judged = "right" if sample["answer"] == sample["category"] else "wrong"
            answer = f'<br><small>category? <span class="{judged}">{html.escape(sample["answer"])}</span></small>'
        cards.append(
            f'<div class="card">{gallery.show(name, sample["key"], "large")}{html.escape(sample["text"])}'
            f'<br><span class="{kind}">{html.escape(sample["generated"]) or "(nothing)"}</span>{answer}</div>'
        )
    return f'<div class="grid">{"".join(cards)}</div>'


def _attention(name: str, samples: Sequence[Sample], gallery: Gallery) -> str:
    """Some pictures, each with one map a query: the brighter, the more the query looks there."""
    rows, stage = [], ""
    for sample in _shown(samples, "attention"):
        if sample["stage"] != stage:
            stage = sample["stage"]
            rows.append(f"<h4>{html.escape(stage)}</h4>")
        maps = "".join(gallery.show(name, sample["key"], inside=_shade(query)) for query in squares(sample["weights"]))
        picture = gallery.show(name, sample["key"])
        text = f'<span class="query">{html.escape(sample["text"])}</span>'
        rows.append(f'<div class="row">{text}<span class="found">{picture}{maps}</span></div>')
    return "".join(rows)


def squares(weights: Sequence[Sequence[int]]) -> np.ndarray:
    """uint8[Q, P] of a picture -> uint8[Q, side, side], nothing where P is no square; a class token is left out."""
    array = np.asarray(weights, np.uint8)
    tokens = array.shape[1]
    side = math.isqrt(tokens)
    if side**2 != tokens:
        array, side = array[:, 1:], math.isqrt(tokens - 1)  # A class token stands first.
    return array.reshape(-1, side, side) if side**2 == array.shape[1] else np.empty((0, 0, 0), np.uint8)


def _shade(weights: np.ndarray) -> str:
    """An image of a shade that lets through what `weights`, uint8[side, side], looks at."""
    shade = np.zeros((*weights.shape, 4), np.uint8)
    shade[..., 3] = (0.85 * (255 - weights.astype(np.float32))).round()
    encoded = io.BytesIO()
    Image.fromarray(shade).save(encoded, "PNG", optimize=True)
    return f'<img alt="" style="image-rendering:pixelated" src="{data_url(encoded.getvalue())}">'
