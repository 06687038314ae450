"""Every number of a summary beside its baselines, as text and as HTML, with what is below a baseline marked."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

_METRICS = [
    ("text to image R@1, ITC", "retrieval/itc/text_to_image/r1", "retrieval/text_to_image/r1"),
    ("text to image R@5, ITC", "retrieval/itc/text_to_image/r5", "retrieval/text_to_image/r5"),
    ("text to image R@10, ITC", "retrieval/itc/text_to_image/r10", "retrieval/text_to_image/r10"),
    ("image to text R@1, ITC", "retrieval/itc/image_to_text/r1", "retrieval/image_to_text/r1"),
    ("image to text R@5, ITC", "retrieval/itc/image_to_text/r5", "retrieval/image_to_text/r5"),
    ("image to text R@10, ITC", "retrieval/itc/image_to_text/r10", "retrieval/image_to_text/r10"),
    ("text to image R@1, + ITM", "retrieval/itm/text_to_image/r1", "retrieval/text_to_image/r1"),
    ("image to text R@1, + ITM", "retrieval/itm/image_to_text/r1", "retrieval/image_to_text/r1"),
    ("caption CIDEr-D", "caption/cider", "caption/cider"),
    ("caption exact match", "caption/exact_match", "caption/exact_match"),
    ("caption token F1", "caption/token_f1", "caption/token_f1"),
    ("category answered", "question/accuracy", "question/accuracy"),
    ("LM loss, nats a token", "caption/loss", ""),
    ("its rise with wrong pictures", "shuffled_image_loss_increase", ""),
]
_BASELINES = {
    "chance": "chance",
    "majority": "majority answer",
    "nearest_neighbour_pooled": "nearest neighbour (pooled)",
    "nearest_neighbour_by_token": "nearest neighbour (token by token)",
}


class Row(NamedTuple):
    """Attributes: label; value; baselines, None where one does not apply."""

    label: str
    value: float
    baselines: list[float | None]

    @property
    def below(self) -> bool:
        """Whether some baseline is better."""
        return any(baseline is not None and baseline > self.value for baseline in self.baselines)


def _get(tree: Mapping[str, Any], path: str) -> float | None:
    for name in path.split("/"):
        if not isinstance(tree, Mapping) or name not in tree:
            return None
        tree = tree[name]
    return tree


def rows(split: Mapping[str, Any]) -> Iterator[Row]:
    """The numbers of one split that were measured, in a fixed order."""
    for label, path, baseline_path in _METRICS:
        value = _get(split, path)
        if value is not None:
            known = split.get("baselines", {})
            found = [_get(known.get(name, {}), baseline_path) if baseline_path else None for name in _BASELINES]
            yield Row(label, value, found)


def text(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """One table a split for a terminal; `<` marks a number below one of its baselines."""
    lines = []
    for name, split in splits.items():
        lines += ["", f"{name:32s}{'trained':>9s}   " + "".join(f"{title:>36s}" for title in _BASELINES.values())]
        for row in rows(split):
            known = "".join(f"{'' if b is None else f'{b:.3f}':>36s}" for b in row.baselines)
            lines.append(f"{row.label:32s}{row.value:9.3f} {'<' if row.below else ' '} {known}")
    return "\n".join(lines)


def table(splits: Mapping[str, Mapping[str, Any]]) -> str:
    """The same as HTML."""
    parts = []
    for name, split in splits.items():
        heads = "".join(f"<th>{html.escape(title)}</th>" for title in ("trained", *_BASELINES.values()))
        parts.append(f"<h3>{html.escape(name)}</h3><table><tr><th></th>{heads}</tr>")
        for row in rows(split):
            known = "".join(f"<td>{'' if b is None else f'{b:.3f}'}</td>" for b in row.baselines)
            mark = ' class="below"' if row.below else ""
            parts.append(f"<tr><td>{html.escape(row.label)}</td><td{mark}><b>{row.value:.3f}</b></td>{known}</tr>")
        parts.append("</table><p><small>Red: below one of its baselines.</small></p>")
    return "".join(parts)
