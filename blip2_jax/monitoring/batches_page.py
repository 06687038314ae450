"""An HTML page of training batches: what each row shows, reads and is to write."""

from __future__ import annotations

import html
import io
import itertools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from blip2_jax.monitoring import report
from blip2_jax.monitoring.pictures import data_url

_STYLE = """
:root{color-scheme:light} body{max-width:1400px} h1{font-weight:650;letter-spacing:-.02em;margin-bottom:.2em}
h2{font-weight:600;letter-spacing:-.01em} .lead{color:#5f6368;margin-top:0}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(210px,1fr));gap:10px 24px;margin:1.4em 0}
.facts div{border-top:1px solid #e3e5e8;padding-top:6px;overflow-wrap:anywhere}
dt{color:#5f6368;font-size:12.5px} dd{margin:0}
summary{font-weight:600;cursor:pointer;font-size:14px}
.rejects{list-style:none;margin:8px 0 20px;padding:0;font-size:13px}
.rejects li{display:flex;flex-wrap:wrap;align-items:baseline;gap:2px 14px;padding:5px 0}
.rejects li{border-top:1px solid #eee;overflow-wrap:anywhere}
.rejects b{background:#fce8e6;color:#a50e0e;border-radius:6px;padding:0 7px;font-weight:500}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;align-items:center;font-size:13px;color:#5f6368;margin:1.2em 0}
.legend span{display:inline-flex;gap:6px;align-items:center}
.batch{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:16px;align-items:start}
.example{border:1px solid #e3e5e8;border-radius:12px;overflow:hidden;font-size:13px}
.example>div:first-child{background:#f3f4f6} .example img{display:block;max-width:100%;margin:0 auto}
.example .text{padding:12px 14px 14px} .caption{font-size:15px;line-height:1.35;font-weight:600;margin:0 0 2px}
.origin{color:#80868b;font-size:12px;margin:0 0 10px;overflow-wrap:anywhere}
.line{margin:8px 0 0} .line>b{display:block;font-size:12px;font-weight:500;color:#5f6368;margin-bottom:3px}
.tokens{display:flex;flex-wrap:wrap;gap:3px}
.token{border-radius:6px;padding:1px 6px 2px;background:#eef2f7;line-height:1.3;max-width:100%;overflow-wrap:anywhere}
.token i{display:block;font:9.5px/1.1 system-ui,sans-serif;color:#80868b;font-variant-numeric:tabular-nums}
.token.predicted{background:#dff3e4;color:#0b5524} .token.predicted i{color:#4f8a62}
.token.soft{background:#efe6fb;color:#5a2ca0} .token.soft i{color:#8d6cc0}
.token.padding,.token.padding i{background:#fafafa;color:#c1c5ca}
.alike{background:#fff6dd;border-radius:8px;padding:5px 9px;margin:0 0 10px;color:#6b4e00} .alike a{color:inherit}
.ids{display:grid;grid-template-columns:auto 1fr;gap:0 10px;margin:12px 0 0;color:#80868b;
font:11px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.example.is-alike{border-color:#e3b341}
@media(max-width:480px){body{margin:1em auto;padding:0 .8em}}
"""
_LEGEND = {
    "read": "read",
    "predicted": "to be predicted: has loss",
    "soft": "soft prompt, and what stands before it",
    "padding": "padding, masked",
}


class Token(NamedTuple):
    """A token as it is shown.

    Attributes:
      text: what it stands for.
      note: its number in the vocabulary.
      kind: "read", "predicted", "soft" or "padding".
    """

    text: str
    note: str
    kind: str


class Line(NamedTuple):
    """What a part of the model reads or is to write; no tokens: it has nothing to do with this row."""

    label: str
    tokens: list[Token]


class Row(NamedTuple):
    """A row of a batch.

    Attributes:
      image: uint8[S, S, 3].
      caption: as the source has it.
      source: the string that names it.
      key: of the record.
      lines: of tokens.
      ids: identities by name.
      alike: numbers of the other rows of the batch with the same, by the name of what they share.
    """

    image: np.ndarray
    caption: str
    source: str
    key: str
    lines: list[Line]
    ids: dict[str, str]
    alike: dict[str, list[int]]


class Shown(NamedTuple):
    """A batch: its rows, what could not be used on the way to it, and a sentence about it."""

    rows: list[Row]
    rejects: list[dict[str, str]]
    summary: str


def _image(pixels: np.ndarray) -> str:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, "JPEG", quality=92, subsampling=0)
    return f'<img loading="lazy" alt="" src="{data_url(encoded.getvalue())}">'


def _token(token: Token, times: int = 1) -> str:
    # The spaces around a word and line ends are part of tokens.
    text = re.sub("^ +| +$", lambda spaces: "·" * len(spaces[0]), token.text).replace("\n", "⏎")
    text += f" x {times}" if times > 1 else ""
    return f'<span class="token {token.kind}">{html.escape(text)}<i>{html.escape(token.note)}</i></span>'


def _line(line: Line) -> str:
    """Its tokens one by one, but padding together."""
    tokens = ""
    for token, group in itertools.groupby(line.tokens):
        times = len(list(group))
        tokens += _token(token, times) if token.kind == "padding" else _token(token) * times
    return f'<div class="line"><b>{html.escape(line.label)}</b><div class="tokens">{tokens}</div></div>'


def _row(batch: int, number: int, row: Row) -> str:
    alike = "".join(
        f'<p class="alike">{html.escape(what)}: '
        + ", ".join(f'<a href="#b{batch}r{other}">row {other}</a>' for other in others)
        + "</p>"
        for what, others in row.alike.items()
        if others
    )
    ids = "".join(f"<span>{html.escape(name)}</span><span>{value}</span>" for name, value in row.ids.items())
    return (
        f'<article class="example{" is-alike" if alike else ""}" id="b{batch}r{number}"><div>{_image(row.image)}</div>'
        f'<div class="text"><p class="caption">{html.escape(row.caption)}</p>'
        f'<p class="origin">row {number} · {html.escape(row.key)} · {html.escape(row.source)}</p>{alike}'
        f'{"".join(map(_line, row.lines))}<div class="ids">{ids}</div></div></article>'
    )


def _rejects(rejects: Sequence[Mapping[str, str]]) -> str:
    if not rejects:
        return ""
    items = "".join(
        f"<li><b>{html.escape(reject['reason'])}</b> <span>{html.escape(reject['key'])}</span> "
        f"<span>{html.escape(reject['detail'])}</span> <small>{html.escape(reject['source'])}</small></li>"
        for reject in rejects
    )
    return f'<details open><summary>Records that could not be used</summary><ul class="rejects">{items}</ul></details>'


def write(file: pathlib.Path, title: str, lead: str, facts: Mapping[str, str], batches: Sequence[Shown]) -> None:
    """Write the page.

    Args:
      file: of the page.
      title, lead: what it is about.
      facts: of the recipe.
      batches: in order.
    """
    rows = "".join(f"<div><dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd></div>" for k, v in facts.items())
    used = {token.kind for shown in batches for row in shown.rows for line in row.lines for token in line.tokens}
    legend = "".join(
        f"<span>{_token(Token('token', 'number', kind))}{said}</span>" for kind, said in _LEGEND.items() if kind in used
    )
    body = f'<p class="lead">{html.escape(lead)}</p><dl class="facts">{rows}</dl><div class="legend">{legend}</div>'
    for number, shown in enumerate(batches):
        examples = "".join(_row(number, index, row) for index, row in enumerate(shown.rows))
        body += (
            f'<h2>Batch {number + 1}</h2><p class="lead">{html.escape(shown.summary)}</p>{_rejects(shown.rejects)}'
            f'<div class="batch">{examples}</div>'
        )
    report.write(file, title, body, _STYLE)
