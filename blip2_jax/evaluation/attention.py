"""Where each query looks in a picture: the cross-attention of the last layer that has one, mean of its heads."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from blip2_jax import params
from blip2_jax.data.pipeline import Pictures
from blip2_jax.data.records import BadRecord
from blip2_jax.parallel import mesh as meshes

if TYPE_CHECKING:
    from blip2_jax.tasks.common import Task


@functools.partial(jax.jit, static_argnums=0)
def cross_attention(task: Task, trainable: params.Tree, image_embeds: jax.Array) -> jax.Array:
    """Weights of the last cross-attention, mean over heads: float32[B, Q, P], each row summing to 1."""
    _, state = task.model.apply(
        {"params": trainable}, image_embeds.astype(jnp.float32), method=task.read_image, mutable=["intermediates"]
    )
    sown = params.flatten(state["intermediates"])
    weights = {path: leaf for path, leaf in sown.items() if path.endswith("cross_attention/weights")}
    tail = [leaf[0] for path, leaf in weights.items() if "/tail/" in path]
    groups = [leaf[0][-1] for path, leaf in weights.items() if "/groups/" in path]
    found = (tail or groups)[0].mean(1)
    # Whole on every device, so that each of several processes can read it.
    return jax.lax.with_sharding_constraint(found, meshes.replicated(task.mesh)) if task.mesh else found


def samples(task: Task, trainable: params.Tree, pictures: Pictures, count: int = 6) -> list[dict[str, Any]]:
    """Some pictures, evenly spread over the source, and where the queries look in them.

    Returns:
      For each {"kind": "attention", "stage", "key", "text", "weights"}, the weights int[Q, P] as lists: 255 is where
      the query looks most. A record that cannot be used is left out.
    """
    chosen, examples = np.linspace(0, len(pictures.source) - 1, min(count, len(pictures.source))).round(), []
    for index in chosen:
        with contextlib.suppress(BadRecord):  # Evaluation has named it.
            examples.append(pictures.example(int(index)))
    if not examples:
        return []
    weights = np.asarray(cross_attention(task, trainable, np.stack([example["image_embeds"] for example in examples])))
    levels = (255 * weights / weights.max(-1, keepdims=True)).round().astype(int)
    return [
        {
            "kind": "attention",
            "stage": task.name,
            "key": example["key"],
            "text": example["caption"],
            "weights": queries.tolist(),
        }
        for example, queries in zip(examples, levels, strict=True)
    ]


def overlay(picture: np.ndarray, weights: np.ndarray, columns: int = 8) -> Image.Image:
    """A picture uint8[S, S, 3] once for each query, bright where float[Q, P] says that it looks.

    Image tokens are patches of a square; a ViT's class token, which belongs to no place, is left out.
    """
    side = math.isqrt(weights.shape[1])
    levels = weights[:, weights.shape[1] - side**2 :].reshape(len(weights), side, side)
    levels = levels / np.maximum(levels.max((1, 2), keepdims=True), 1e-9)
    size, rows = len(picture), -(-len(weights) // columns)
    sheet = Image.new("RGB", (size * min(columns, len(weights)), size * rows), "white")
    for query, level in enumerate(levels):
        grey = Image.fromarray((255 * level).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
        light = 0.2 + 0.8 * np.asarray(grey, np.float32)[..., None] / 255
        tile = Image.fromarray((picture * light).astype(np.uint8))
        sheet.paste(tile, (size * (query % columns), size * (query // columns)))
    return sheet
