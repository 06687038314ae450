"""Ranks of candidate answers against their definitions, written out."""

import math

import numpy as np
import pytest

from blip2_jax.evaluation import visdial


def place(row, column):
    """The rank of a candidate by counting those before it."""
    return 1 + sum(other > row[column] or (other == row[column] and i < column) for i, other in enumerate(row))


@pytest.fixture
def scores(rng):
    return rng.normal(size=(12, 100)).round(1)  # With ties.


def test_ranks_are_counted_from_one_and_ties_keep_their_order(scores):
    found = visdial.ranks(scores)
    assert found.tolist() == [[place(row, column) for column in range(100)] for row in scores]
    assert visdial.ranks(np.array([[0.5, 0.9, 0.5]])).tolist() == [[2, 1, 3]]


def test_sparse_metrics(scores, rng):
    right = rng.integers(0, 100, 12)
    scores[:4, :] -= np.arange(100)
    right[:4] = [0, 3, 7, 12]
    places = [place(row, column) for row, column in zip(scores, right, strict=True)]
    found = visdial.sparse(scores, right)
    assert set(found) == {"mrr", "r1", "r5", "r10", "mean_rank"}
    assert found["mrr"] == pytest.approx(sum(1 / p for p in places) / 12)
    assert found["mean_rank"] == pytest.approx(sum(places) / 12)
    for rank in (1, 5, 10):
        assert found[f"r{rank}"] == pytest.approx(sum(p <= rank for p in places) / 12)


def test_ndcg_by_brute_force(scores, rng):
    relevance = rng.choice([0, 0, 0, 0, 0.2, 0.4, 1.0], size=(12, 100))
    expected = []
    for row, known in zip(scores, relevance, strict=True):
        k = sum(value > 0 for value in known)
        order = sorted(range(100), key=lambda i: place(row, i))[:k]
        best = sorted(known, reverse=True)[:k]
        gain = lambda values: sum(value / math.log2(i + 2) for i, value in enumerate(values))
        expected.append(gain([known[i] for i in order]) / gain(best))
    assert visdial.ndcg(scores, relevance) == pytest.approx(sum(expected) / 12)


def test_ndcg_by_hand():
    # The two relevant ones are ranked first and third, so only the first counts.
    scores, relevance = np.array([[3.0, 2.0, 1.0]]), np.array([[0.5, 0.0, 1.0]])
    assert visdial.ndcg(scores, relevance) == pytest.approx(0.5 / (1 + 0.5 / math.log2(3)))
    assert visdial.ndcg(relevance, relevance) == 1


@pytest.mark.parametrize("right", [[0, 3], [-1, 0], [0]])
def test_a_right_candidate_that_is_none(right):
    with pytest.raises(ValueError, match="3 candidates"):
        visdial.sparse(np.zeros((2, 3)), np.array(right))


def test_scores_that_are_no_numbers():
    scores = np.zeros((2, 3))
    scores[1, 2] = np.nan
    for metric in (lambda: visdial.sparse(scores, np.zeros(2, int)), lambda: visdial.ndcg(scores, np.ones((2, 3)))):
        with pytest.raises(ValueError, match="candidate 2 of round 1 is nan"):
            metric()


def test_rounds_without_anything_relevant():
    with pytest.raises(ValueError, match="round 1"):
        visdial.ndcg(np.zeros((2, 3)), np.array([[1, 0, 0], [0, 0, 0]]))
    with pytest.raises(ValueError, match="equal shapes"):
        visdial.ndcg(np.zeros((2, 3)), np.zeros((2, 4)))
