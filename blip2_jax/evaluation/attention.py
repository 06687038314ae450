"""Where each query looks in a picture: the cross-attention of the last layer that has one, mean of its heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from blip2_jax import params
from blip2_jax.data.pipeline import Pictures

if TYPE_CHECKING:
    from blip2_jax.tasks.common import Task


def cross_attention(task: Task, trainable: params.Tree, image_embeds: np.ndarray) -> np.ndarray:
    """Weights of the last cross-attention, mean over heads: float32[B, Q, P], each row summing to 1."""
    _, state = task.model.apply(
        {"params": trainable}, image_embeds.astype(np.float32), method=task.read_image, mutable=["intermediates"]
    )
    sown = params.flatten(state["intermediates"])
    weights = {path: leaf for path, leaf in sown.items() if path.endswith("cross_attention/weights")}
    tail = [leaf[0] for path, leaf in weights.items() if "/tail/" in path]
    groups = [leaf[0][-1] for path, leaf in weights.items() if "/groups/" in path]
    return np.asarray((tail or groups)[0]).mean(1)


def samples(task: Task, trainable: params.Tree, pictures: Pictures, count: int = 6) -> list[dict]:
    """Some pictures, evenly spread over the source: their key, their caption and float32[Q, P] weights."""
    chosen = np.linspace(0, len(pictures.source) - 1, min(count, len(pictures.source))).round().astype(int)
    examples = [pictures.example(int(index)) for index in chosen]
    weights = cross_attention(task, trainable, np.stack([example["image_embeds"] for example in examples]))
    return [
        {"key": example["key"], "caption": example["caption"], "weights": queries}
        for example, queries in zip(examples, weights, strict=True)
    ]
