"""Image-text retrieval: recall at 1, 5 and 10, by ITC alone and with the best candidates judged again by ITM."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

RANKS = (1, 5, 10)
Directions = dict[str, dict[str, float]]


def ranking(scores: np.ndarray) -> np.ndarray:
    """float[N, M] -> int[N, M]: candidates of each row, best first; equal scores keep their order."""
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
    """Expected recalls of a random order, where `relevant` is bool[images, texts]."""

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


def posterior(logits: np.ndarray, cosines: np.ndarray, temperature: float) -> np.ndarray:
    """How well images and captions fit by ITM and ITC together: ITM's log-odds plus cosine / temperature.

    ITM learns to tell pairs from hard negatives, which ITC's own softmax has drawn. Against negatives of density q a
    classifier's log-odds tend to log p/q (noise-contrastive estimation, Gutmann and Hyvarinen 2010), so they say what
    ITC does *not* know, and log q, the cosine over the temperature less its normaliser, has to be added. The normaliser
    is left out: for negatives of one kind all candidates share it, but half of ours are wrong images and half wrong
    captions, so this is an approximation.

    Args:
      logits: float[B, 2], of {no match, match}.
      cosines: float[B], of the query that fits best.
      temperature: of ITC.

    Returns:
      float[B], comparable among the candidates of one query.
    """
    return logits[:, 1] - logits[:, 0] + cosines / temperature


def tempered(logits: np.ndarray, cosines: np.ndarray, temperature: float) -> np.ndarray:
    """`posterior` with half of ITM's log-odds, which nano_long's validation prefers. Arguments as `posterior`."""
    return (logits[:, 1] - logits[:, 0]) / 2 + cosines / temperature


def lavis(logits: np.ndarray, cosines: np.ndarray, temperature: float) -> np.ndarray:
    """The original's score (compute_sim_matrix): the logit of a match plus the cosine. Arguments as `posterior`."""
    return logits[:, 1] + cosines


# evaluation.rerank_rule
RULES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "posterior": posterior,
    "tempered": tempered,
    "lavis": lavis,
}


def rerank(scores: np.ndarray, judge: Callable[[np.ndarray, np.ndarray], np.ndarray], top: int) -> np.ndarray:
    """Judge each row's `top` candidates and put them, in the new order, before the others.

    Args:
      scores: float[N, M], cosines.
      judge: int[K] rows, int[K] columns -> float[K], such as `posterior` of those pairs; called once, with all.
      top: candidates of each row.

    Returns:
      float[N, M]: the judgement, and for the rest the cosine, less more than any judgement can be.
    """
    rows, columns = scores.shape
    top = min(top, columns)
    chosen = ranking(scores)[:, :top]
    row, column = np.repeat(np.arange(rows), top), chosen.reshape(-1)
    judged = judge(row, column)
    result = scores + judged.min() - 10.0
    result[row, column] = judged
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
