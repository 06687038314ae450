"""Recall against brute force, chance against random orders, re-ranking against its definition."""

import numpy as np
import pytest

from blip2_jax.evaluation import baselines, retrieval


def brute_recall(scores, relevant, rank):
    hits = 0
    for row, right in zip(scores, relevant, strict=True):
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:rank]
        hits += any(right[i] for i in best)
    return hits / len(scores)


def labelled(relevant):
    """A gallery with these pairs, bool[images, texts]."""
    images, texts = relevant.shape
    pairs = np.flatnonzero(relevant.ravel())
    return retrieval.Gallery([str(text) for text in range(texts)], [0] * texts, pairs, images)


def directions(scores, relevant):
    of_images, of_texts = retrieval.best(scores), retrieval.best(scores.T)
    return retrieval.both_directions(labelled(relevant), of_images, of_texts)


def test_recall_is_what_brute_force_finds(rng):
    scores, relevant = rng.normal(size=(17, 30)).round(1), rng.random((17, 30)) < 0.1
    found = directions(scores, relevant)
    for rank in (1, 5, 10):
        assert found["image_to_text"][f"r{rank}"] == pytest.approx(brute_recall(scores, relevant, rank))
        assert found["text_to_image"][f"r{rank}"] == pytest.approx(brute_recall(scores.T, relevant.T, rank))


def test_the_two_directions():
    scores = np.array([[0.9, 0.1], [0.8, 0.2], [0.95, 0.3]])
    relevant = np.array([[True, False], [True, False], [False, True]])
    found = directions(scores, relevant)
    assert found["text_to_image"]["r1"] == pytest.approx(1 / 2)  # The first caption finds the third picture.
    assert found["image_to_text"]["r1"] == pytest.approx(2 / 3)


def test_chance_is_the_mean_of_random_orders(rng):
    relevant = rng.random((12, 15)) < 0.2
    relevant[:, 0] |= ~relevant.any(1)
    expected = retrieval.chance(labelled(relevant))
    drawn = [directions(rng.random(relevant.shape), relevant) for _ in range(3000)]
    for direction, values in expected.items():
        for name, value in values.items():
            assert np.mean([one[direction][name] for one in drawn]) == pytest.approx(value, abs=0.01)


def test_captions_that_several_pictures_share_count_once():
    gallery = retrieval.gallery([["cat", "kitten", "cat"], ["dog"], ["cat"]])
    assert gallery.texts == ["cat", "kitten", "dog"]
    assert gallery.first == [0, 0, 1]
    images, texts = np.indices((3, 3))
    assert gallery.right(images, texts).tolist() == [[True, True, False], [False, False, True], [True, False, False]]
    of_images, of_texts = gallery.counts()
    assert (of_images.tolist(), of_texts.tolist()) == ([2, 1, 1], [2, 1, 1])


@pytest.mark.parametrize("top", [1, 3, 9])
def test_reranking_moves_the_judged_before_the_others(rng, top):
    scores, judgement = rng.uniform(-1, 1, (7, 9)), rng.normal(size=(7, 9)).round()
    found = retrieval.best(scores, 9)
    again = retrieval.rerank(found, np.take_along_axis(judgement, found.index[:, :top], axis=1))
    for row in range(7):
        best = np.argsort(-scores[row])
        first = sorted(best[:top], key=lambda i: (-judgement[row, i], i))
        assert again.index[row].tolist() == [*first, *best[top:]]
        assert again.scores[row].tolist() == [*judgement[row, first], *scores[row, best[top:]]]


def test_a_classifier_against_hard_negatives_and_what_drew_them_make_the_posterior(rng):
    temperature, cosines = 0.07, rng.uniform(-1, 1, 12)
    truth = rng.dirichlet(np.ones(12))
    drawn = np.exp(cosines / temperature) / np.exp(cosines / temperature).sum()
    log_odds = np.log(truth / drawn)  # What the best classifier says when positives are `truth`, negatives `drawn`.
    logits = np.stack([-log_odds, np.zeros(12)], axis=1) + rng.normal(size=(12, 1))
    found = retrieval.posterior(logits, cosines, temperature)
    assert np.argsort(found).tolist() == np.argsort(truth).tolist()
    assert np.argsort(log_odds).tolist() != np.argsort(truth).tolist()
    np.testing.assert_allclose(retrieval.tempered(logits * 2, cosines, temperature), found)
    np.testing.assert_allclose(retrieval.match(logits, cosines, temperature), log_odds, atol=1e-12)
    np.testing.assert_allclose(retrieval.lavis(logits, cosines, temperature), logits[:, 1] + cosines)


def test_the_nearest_neighbour_copies_and_retrieves():
    train = baselines.Known({"pooled": np.eye(3)}, ["cat", "dog", "sun"], np.eye(3), ["animals", "animals", "nature"])
    test = baselines.Known({"pooled": np.eye(3)[[2, 0]]}, ["sun", "kitten"], np.eye(3)[[2, 0]], ["nature", "animals"])
    found = baselines.nearest_neighbour(test, train, "pooled")
    assert found["caption"]["exact_match"] == 0.5
    assert found["question"]["accuracy"] == 1
    assert found["retrieval"]["text_to_image"]["r1"] == 1
    assert baselines.majority(["nature", "animals"], train.categories)["question"]["accuracy"] == 0.5


def test_token_by_token_sees_where_things_are():
    image = np.zeros((2, 3, 4), np.float32)
    image[0, 0], image[1, 2] = 1, 1
    assert baselines.pooled(image)[0] @ baselines.pooled(image)[1] == pytest.approx(1)
    assert baselines.flattened(image)[0] @ baselines.flattened(image)[1] == pytest.approx(0)
