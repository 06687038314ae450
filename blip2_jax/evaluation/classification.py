"""Zero-shot classification: a class is a caption, put into templates such as "a photo of a {}." (arXiv 2103.00020)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

RANKS = (1, 5)


def parse_templates(text: str) -> tuple[str, ...]:
    """Templates with "|" between them, in each of which "{}" stands for the class; "" has none.

    Raises:
      ValueError: one of them does not have one "{}".
    """
    templates = tuple(part.strip() for part in text.split("|")) if text.strip() else ()
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(
                f'evaluation.templates = {text!r}: {template!r} needs one {{}} where the class goes, as in "a photo of '
                'a {}."; "|" stands between templates'
            )
    return templates


def prompts(classes: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class in every template: those of the first class, then those of the next."""
    return [template.replace("{}", name) for name in classes for template in templates]


def class_features(features: np.ndarray, templates: int) -> np.ndarray:
    """What stands for a class: the mean over its templates, of unit length.

    Args:
      features: float32[C * N, E] of `prompts`, of unit length.
      templates: N.

    Returns:
      float32[C, E].
    """
    mean = features.reshape(-1, templates, features.shape[-1]).mean(1)
    return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)


def accuracies(found: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Share of images whose class is the first, or among the first five.

    Args:
      found: int[B, K], the likeliest classes, best first.
      labels: int[B].

    Returns:
      {"top1": ..., "top5": ...}, from 0 to 1.
    """
    right = found == labels[:, None]
    return {f"top{rank}": float(right[:, :rank].any(1).mean()) for rank in RANKS}
