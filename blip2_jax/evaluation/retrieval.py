"""Image-text retrieval: recall at 1, 5 and 10, by ITC alone and with the best candidates judged again by ITM.

As the original (LAVIS, compute_sim_matrix): each query's k best candidates by cosine are re-ranked by the ITM logit
plus the cosine; the rest keep their place behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from blip2_jax.evaluation.batches import in_batches

RANKS = (1, 5, 10)
Directions = dict[str, dict[str, float]]


def ranking(scores: np.ndarray) -> np.ndarray:
    """Candidates of each row, best first; equal scores keep their order."""
    return np.argsort(-scores, axis=1, kind="stable")


def recalls(scores: np.ndarray, relevant: np.ndarray) -> dict[str, float]:
    """Share of rows with a relevant candidate among the first 1, 5 and 10.

    Args:
      scores: float[N, M].
      relevant: bool[N, M].

    Returns:
      {"r1": ..., "r5": ..., "r10": ...}, from 0 to 1.
    """
    hits = np.take_along_axis(relevant, ranking(scores), axis=1)
    return {f"r{rank}": float(hits[:, :rank].any(1).mean()) for rank in RANKS}


def both_directions(scores: np.ndarray, relevant: np.ndarray, text_scores: np.ndarray | None = None) -> Directions:
    """Recalls of images searched by text and of texts searched by image.

    Args:
      scores: float[images, texts], for images as queries.
      relevant: bool[images, texts].
      text_scores: float[texts, images], for texts as queries; the transpose of `scores` by default.
    """
    return {
        "text_to_image": recalls(scores.T if text_scores is None else text_scores, relevant.T),
        "image_to_text": recalls(scores, relevant),
    }


def chance(relevant: np.ndarray) -> Directions:
    """Expected recalls of a random order."""

    def expected(relevant: np.ndarray) -> dict[str, float]:
        candidates, right = relevant.shape[1], relevant.sum(1)
        result = {}
        for rank in RANKS:
            miss = np.ones(len(relevant))
            for draw in range(min(rank, candidates)):
                miss *= np.clip((candidates - right - draw) / (candidates - draw), 0, None)
            result[f"r{rank}"] = float((1 - miss).mean())
        return result

    return {"text_to_image": expected(relevant.T), "image_to_text": expected(relevant)}


def rerank(
    scores: np.ndarray, match: Callable[[np.ndarray, np.ndarray], np.ndarray], top: int, batch_size: int, label: str
) -> np.ndarray:
    """Judge each row's `top` candidates by `match` and put them, in its order, before the others.

    Args:
      scores: float[N, M], cosines.
      match: int[B] rows, int[B] columns -> float[B], ITM logits of a match.
      top: k.
      batch_size: B; `match` always gets full batches.

    Returns:
      float[N, M]: logit + cosine of the judged, cosine - 100 of the rest.
    """
    rows, columns = scores.shape
    top = min(top, columns)
    chosen = ranking(scores)[:, :top]
    row, column = np.repeat(np.arange(rows), top), chosen.reshape(-1)
    result = scores - 100.0
    result[row, column] = scores[row, column] + in_batches(match, (row, column), batch_size, label)
    return result


class Gallery(NamedTuple):
    """Attributes:
    texts: the distinct captions, in order of appearance.
    first: for each, the index of the first example that has it.
    relevant: bool[images, texts].
    """

    texts: list[str]
    first: list[int]
    relevant: np.ndarray


def gallery(captions: list[str]) -> Gallery:
    """Captions that several pictures share count once, with all their pictures relevant."""
    first: dict[str, int] = {}
    for index, caption in enumerate(captions):
        first.setdefault(caption, index)
    texts = list(first)
    relevant = np.asarray(captions)[:, None] == np.asarray(texts)[None, :]
    return Gallery(texts, list(first.values()), relevant)
