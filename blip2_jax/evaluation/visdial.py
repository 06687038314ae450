"""Metrics of VisDial v1.0: where the right one of 100 candidate answers stands, and how relevant ones are ranked."""

from __future__ import annotations

import numpy as np

from blip2_jax.evaluation import retrieval

VERSION = "1, as the VisDial v1.0 challenge"


def ranks(scores: np.ndarray) -> np.ndarray:
    """float[N, C] -> int[N, C]: the rank of each candidate, 1 for the best; equal scores keep their order.

    It is what the challenge's server takes. Scores that are not finite have no rank.

    Raises:
      ValueError: a score is not finite.
    """
    finite = np.isfinite(scores)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        raise ValueError(f"the score of candidate {column} of round {row} is {scores[row, column]}: expected a number")
    return np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1) + 1


def sparse(scores: np.ndarray, gt_index: np.ndarray) -> dict[str, float]:
    """How high the one right candidate of each round of a dialogue is ranked.

    Args:
      scores: float[N, C].
      gt_index: int[N], the right candidate, from 0.

    Returns:
      "mrr", the mean of 1 / rank; "r1", "r5" and "r10", the shares of rounds with it among the first; "mean_rank".

    Raises:
      ValueError: there are no rounds, or a score is not finite, or an index is that of no candidate.
    """
    count, candidates = scores.shape
    if not count or len(gt_index) != count or not ((gt_index >= 0) & (gt_index < candidates)).all():
        raise ValueError(
            f"gt_index {np.asarray(gt_index)[:5]}... does not say which of {candidates} candidates is right in each of "
            f"{count} rounds: expected a number from 0 to {candidates - 1} for each, and at least one round"
        )
    found = ranks(scores)[np.arange(count), gt_index]
    recalls = {f"r{rank}": float((found <= rank).mean()) for rank in retrieval.RANKS}
    return {"mrr": float((1 / found).mean()), **recalls, "mean_rank": float(found.mean())}


def ndcg(scores: np.ndarray, relevance: np.ndarray) -> float:
    """Mean normalised discounted cumulative gain, 0 to 1, of the first K candidates, K being how many are relevant.

    Args:
      scores: float[N, C].
      relevance: float[N, C], the share of people who found each candidate right; more than 0 is relevant.

    Raises:
      ValueError: there are no rounds, the shapes differ, a score is not finite, or no candidate of a round is relevant.
    """
    if scores.shape != relevance.shape or not len(scores):
        raise ValueError(f"scores {scores.shape} and relevance {relevance.shape}: expected equal shapes, not empty")
    relevant = (relevance > 0).sum(1)
    if not relevant.all():
        raise ValueError(f"no candidate of round {int(np.argmin(relevant))} is relevant: it has no NDCG, leave it out")
    place = ranks(scores)
    counts = np.arange(1, scores.shape[1] + 1) <= relevant[:, None]
    ideal = (-np.sort(-relevance, axis=1) * counts / np.log2(np.arange(2, scores.shape[1] + 2))).sum(1)
    gain = (relevance * (place <= relevant[:, None]) / np.log2(place + 1)).sum(1)
    return float((gain / ideal).mean())
