"""Where each query looks in a picture: the cross-attention of the last layer that has one, mean of its heads."""

from __future__ import annotations

import html
import math
from typing import TYPE_CHECKING

import numpy as np

from blip2_jax import params
from blip2_jax.data.pipeline import Pictures
from blip2_jax.monitoring.report import Images

if TYPE_CHECKING:
    from blip2_jax.tasks.common import Task


def cross_attention(task: Task, trainable: params.Tree, image_embeds: np.ndarray) -> np.ndarray:
    """Weights of the last cross-attention, mean over heads: float32[B, Q, P], each row summing to 1."""
    _, state = task.model.apply(
        {"params": trainable}, image_embeds.astype(np.float32), method=task.read_image, mutable=["intermediates"]
    )
    weights = {path: leaf for path, leaf in params.flatten(state["intermediates"]).items() if path.endswith("weights")}
    tail = [leaf[0] for path, leaf in weights.items() if "/tail/" in path]
    groups = [leaf[0][-1] for path, leaf in weights.items() if "/groups/" in path]
    return np.asarray((tail or groups)[0]).mean(1)


def drawing(task: Task, trainable: params.Tree, pictures: Pictures, count: int = 6) -> str:
    """Some pictures, each with one map a query: the brighter, the more the query looks there."""
    images = Images([pictures.name])
    chosen = [round(i * (len(pictures.source) - 1) / max(count - 1, 1)) for i in range(count)]
    examples = [pictures.example(index) for index in chosen]
    weights = cross_attention(task, trainable, np.stack([example["image_embeds"] for example in examples]))
    side = math.isqrt(weights.shape[-1])
    rows = [f"<h3>{html.escape(task.name)}</h3>"]
    for example, queries in zip(examples, weights, strict=True):
        picture = images.tag(pictures.name, example["key"])
        if side * side == weights.shape[-1]:
            maps = "".join(_map(picture, query.reshape(side, side)) for query in queries)
            caption = html.escape(example["caption"])
            rows.append(f'<div class="row"><span class="query">{caption}</span>{picture}{maps}</div>')
    return "".join(rows)


def _map(picture: str, weights: np.ndarray) -> str:
    side, strongest = len(weights), weights.max()
    cell = 56 / side
    shade = "".join(
        f'<rect x="{x * cell:.1f}" y="{y * cell:.1f}" width="{cell:.1f}" height="{cell:.1f}" fill="#000" '
        f'opacity="{0.85 * (1 - weights[y, x] / strongest):.2f}"/>'
        for y in range(side)
        for x in range(side)
    )
    return f'<span style="position:relative">{picture}<svg width="56" height="56" style="position:absolute;left:3px;top:3px">{shade}</svg></span>'
