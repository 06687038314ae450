"""The three losses of stage 1 against plain NumPy, written from the paper's formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax.objectives import contrastive, diversity, matching
from tests.objectives import naive


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture
def six(rng):
    """Features and ids of 6 pairs; rows 1 and 4 carry the same caption, rows 2 and 3 show the same image."""
    images, texts = naive.features(rng, 6, queries=5)
    image_id = np.array([[0, 0], [1, 0], [2, 0], [2, 0], [4, 0], [5, 7]], np.uint32)
    text_id = np.array([[0, 9], [1, 9], [2, 9], [3, 9], [1, 9], [5, 9]], np.uint32)
    return images, texts, image_id, text_id


def numpy_itc(images, texts, image_id, text_id, temperature, smoothing, real):
    """Every step spelt out for one pair at a time."""
    count = len(images)
    total = 0.0
    candidates = [j for j in range(count) if real[j]]
    for direction in ("image to text", "text to image"):
        for i in candidates:
            scores = []
            for j in candidates:
                image, text = (images[i], texts[j]) if direction == "image to text" else (images[j], texts[i])
                scores.append(max(query @ text for query in image) / temperature)
            probabilities = softmax(np.array(scores))
            same = np.array(
                [(image_id[i] == image_id[j]).all() or (text_id[i] == text_id[j]).all() for j in candidates], float
            )
            target = (1 - smoothing) * same / same.sum() + smoothing / len(candidates)
            total += -(target * np.log(probabilities)).sum() / len(candidates) / 2
    return total


@pytest.mark.parametrize("real", [[True] * 6, [True, True, False, True, True, True]])
def test_contrastive_loss_is_the_formula(six, real):
    images, texts, image_id, text_id = six
    pairs = contrastive.Pairs(jnp.array(image_id), jnp.array(text_id), jnp.array(real))
    loss = contrastive.contrastive_loss(images, texts, jnp.float32(0.07), pairs)
    chex.assert_shape(loss, ())
    expected = numpy_itc(*map(np.asarray, six), 0.07, 0.1, real)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_without_duplicates_the_targets_are_label_smoothing(six):
    images, texts, _, _ = six
    ids = jnp.stack([jnp.arange(6, dtype=jnp.uint32)] * 2, -1)
    loss = contrastive.contrastive_loss(
        images, texts, jnp.float32(0.5), contrastive.Pairs(ids, ids, jnp.ones(6, bool)), label_smoothing=0.1
    )
    similarity = np.asarray(contrastive.similarities(images, texts))
    chex.assert_shape(similarity, (6, 6))
    log_probability = np.log(softmax(similarity / 0.5)), np.log(softmax(similarity.T / 0.5))
    expected = np.mean([-0.9 * np.trace(p) / 6 - 0.1 * p.mean(1).mean() for p in log_probability])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_masked_row_changes_nothing(six):
    images, texts, image_id, text_id = six
    pairs = contrastive.Pairs(jnp.array(image_id), jnp.array(text_id), jnp.array([True] * 5 + [False]))
    loss = lambda images, texts: contrastive.contrastive_loss(images, texts, jnp.float32(0.07), pairs)
    value, (d_images, d_texts) = jax.value_and_grad(loss, (0, 1))(images, texts)
    other, _ = jax.value_and_grad(loss, (0, 1))(images.at[5].set(0.3), texts.at[5].set(-0.1))
    assert value == other
    assert not d_images[5].any()
    assert not d_texts[5].any()


def test_matching_loss_is_the_formula(rng):
    logits, labels = rng.normal(size=(9, 2)), np.array([1, 1, 1, 0, 0, 0, 0, 0, 0])
    counted = np.array([1, 1, 1, 1, 1, 0, 1, 1, 1], bool)
    weights = matching.matching_weights(jnp.array(labels), jnp.array(counted))
    result = matching.matching_loss(jnp.array(logits, jnp.float32), jnp.array(labels), weights)
    chex.assert_shape([*weights, *result], [(9,), (9,), (9,), (), (), ()])
    losses = -np.log(softmax(logits)[np.arange(9), labels])
    np.testing.assert_allclose(result.loss, losses[counted].mean(), rtol=1e-5)
    right = logits.argmax(1) == labels
    np.testing.assert_allclose(result.positive_accuracy, right[:3].mean(), rtol=1e-6)
    np.testing.assert_allclose(result.negative_accuracy, right[[3, 4, 6, 7, 8]].mean(), rtol=1e-6)
    pieces = []
    for p in range(3):
        piece = matching.MatchingWeights(*(weight[p::3] for weight in weights))
        pieces.append(matching.matching_loss(jnp.array(logits[p::3], jnp.float32), jnp.array(labels[p::3]), piece))
    np.testing.assert_allclose(jax.tree.map(lambda *x: sum(x), *pieces), result, rtol=1e-5)


def test_matching_where_nothing_counts_is_zero():
    labels = jnp.array([1, 0, 0])
    weights = matching.matching_weights(labels, jnp.zeros(3, bool))
    assert matching.matching_loss(jnp.ones((3, 2)), labels, weights) == (0, 0, 0)
    lone = matching.matching_weights(labels, jnp.array([True, False, False]))
    np.testing.assert_allclose(matching.matching_loss(jnp.zeros((3, 2)), labels, lone).loss, np.log(2), rtol=1e-6)


def test_the_constant_answer_has_the_loss_of_the_plateau():
    logits = jnp.tile(jnp.log(jnp.array([[2 / 3, 1 / 3]])), (30, 1))
    labels = jnp.array([1] * 10 + [0] * 20)
    weights = matching.matching_weights(labels, jnp.ones(30, bool))
    np.testing.assert_allclose(matching.matching_loss(logits, labels, weights).loss, 0.6365, atol=1e-4)


def test_query_diversity(rng):
    alike = jnp.ones((3, 4, 8))
    apart = jnp.tile(jnp.eye(4, 8)[None], (3, 1, 1))
    everyone = jnp.full(3, 1 / 3)
    np.testing.assert_allclose(diversity.query_diversity(alike, everyone), (1.0, 1.0), rtol=1e-6)
    np.testing.assert_allclose(diversity.query_diversity(apart, everyone), (0.0, 0.0), atol=1e-7)
    mixed = jnp.concatenate([alike[:1], apart[:2]])
    np.testing.assert_allclose(diversity.query_diversity(mixed, jnp.array([1.0, 0, 0])), (1.0, 1.0), rtol=1e-6)
