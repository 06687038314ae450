"""The three losses of stage 1 against plain NumPy, written from the paper's formulas."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax.objectives import contrastive, diversity, matching


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.fixture
def pairs(rng):
    """Features of 6 pairs; rows 1 and 4 carry the same caption, rows 2 and 3 show the same image."""
    images, texts = unit(rng.normal(size=(6, 5, 8))), unit(rng.normal(size=(6, 8)))
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
def test_contrastive_loss_is_the_formula(pairs, real):
    images, texts, image_id, text_id = pairs
    mask = jnp.array(real)
    same = contrastive.same_pairs(jnp.array(image_id), jnp.array(text_id), mask)
    similarity = contrastive.similarities(jnp.array(images), jnp.array(texts))
    chex.assert_shape(similarity, (6, 6))
    loss = contrastive.contrastive_loss(similarity, jnp.float32(0.07), same, mask, 0.1)
    expected = numpy_itc(images, texts, image_id, text_id, 0.07, 0.1, real)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_without_duplicates_the_targets_are_label_smoothing(pairs):
    images, texts, _, _ = pairs
    ids = jnp.stack([jnp.arange(6, dtype=jnp.uint32)] * 2, -1)
    mask = jnp.ones(6, bool)
    same = contrastive.same_pairs(ids, ids, mask)
    assert (np.asarray(same) == np.eye(6, dtype=bool)).all()
    similarity = contrastive.similarities(jnp.array(images), jnp.array(texts))
    loss = contrastive.contrastive_loss(similarity, jnp.float32(0.5), same, mask, 0.1)
    log_probability = np.log(softmax(np.asarray(similarity) / 0.5)), np.log(softmax(np.asarray(similarity).T / 0.5))
    expected = np.mean([-0.9 * np.trace(p) / 6 - 0.1 * p.mean(1).mean() for p in log_probability])
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_a_masked_row_changes_nothing(pairs):
    images, texts, image_id, text_id = map(jnp.array, pairs)
    mask = jnp.array([True] * 5 + [False])

    def loss(images, texts):
        same = contrastive.same_pairs(image_id, text_id, mask)
        return contrastive.contrastive_loss(contrastive.similarities(images, texts), jnp.float32(0.07), same, mask)

    value, (d_images, d_texts) = jax.value_and_grad(loss, (0, 1))(images, texts)
    other, _ = jax.value_and_grad(loss, (0, 1))(images.at[5].set(0.3), texts.at[5].set(-0.1))
    assert value == other
    assert not d_images[5].any()
    assert not d_texts[5].any()


def test_hard_negatives_are_wrong_real_and_likelier_when_similar(pairs):
    images, texts, image_id, text_id = map(jnp.array, pairs)
    mask = jnp.array([True] * 5 + [False])
    same = contrastive.same_pairs(image_id, text_id, mask)
    similarity = contrastive.similarities(images, texts)
    temperature = jnp.float32(0.2)
    draw = jax.jit(lambda key: matching.hard_negatives(key, similarity, temperature, same, mask))
    drawn = jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000))
    chex.assert_shape(drawn.image, (4000, 6))
    for row in range(5):
        for candidates, chosen in (
            (np.asarray(similarity.T)[row], drawn.image),
            (np.asarray(similarity)[row], drawn.text),
        ):
            allowed = ~np.asarray(same)[row] & np.asarray(mask)
            expected = np.where(allowed, np.exp(candidates / 0.2), 0)
            found = np.bincount(np.asarray(chosen)[:, row], minlength=6) / 4000
            np.testing.assert_allclose(found, expected / expected.sum(), atol=0.04)
    assert drawn.valid[:, :5].all()
    assert not drawn.valid[:, 5].any()


def test_negatives_depend_on_row_and_column_not_on_the_batch_size():
    key, temperature = jax.random.key(3), jnp.float32(1.0)
    small, large = jnp.zeros((8, 8)), jnp.zeros((8, 8)).at[:, 4:].set(-1e9).at[4:, :].set(-1e9)
    half = matching.hard_negatives(key, small[:4, :4], temperature, jnp.eye(4, dtype=bool), jnp.ones(4, bool))
    whole = matching.hard_negatives(key, large, temperature, jnp.eye(8, dtype=bool), jnp.ones(8, bool))
    assert half.text.tolist() == whole.text[:4].tolist()


def test_a_batch_of_one_has_no_negatives_and_no_nan():
    one = jnp.ones(1, bool)
    same = contrastive.same_pairs(jnp.zeros((1, 2), jnp.uint32), jnp.zeros((1, 2), jnp.uint32), one)
    negatives = matching.hard_negatives(jax.random.key(0), jnp.ones((1, 1)), jnp.float32(0.07), same, one)
    assert not negatives.valid.any()
    result = matching.matching_loss(jnp.zeros((3, 2)), jnp.array([1, 0, 0]), jnp.array([1.0, 0.0, 0.0]))
    np.testing.assert_allclose(result.loss, np.log(2), rtol=1e-6)
    assert contrastive.contrastive_loss(jnp.ones((1, 1)), jnp.float32(0.07), same, one) == 0


def test_matching_loss_is_the_formula(rng):
    logits, labels = rng.normal(size=(9, 2)), np.array([1, 1, 1, 0, 0, 0, 0, 0, 0])
    weights = np.array([1, 1, 1, 1, 1, 0, 1, 1, 1], float)
    result = matching.matching_loss(jnp.array(logits, jnp.float32), jnp.array(labels), jnp.array(weights, jnp.float32))
    losses = -np.log(softmax(logits)[np.arange(9), labels])
    np.testing.assert_allclose(result.loss, (losses * weights).sum() / weights.sum(), rtol=1e-5)
    right = logits.argmax(1) == labels
    np.testing.assert_allclose(result.positive_accuracy, right[:3].mean(), rtol=1e-6)
    np.testing.assert_allclose(result.negative_accuracy, right[[3, 4, 6, 7, 8]].mean(), rtol=1e-6)


def test_the_constant_answer_has_the_loss_of_the_plateau():
    logits = jnp.tile(jnp.log(jnp.array([[2 / 3, 1 / 3]])), (30, 1))
    labels = jnp.array([1] * 10 + [0] * 20)
    np.testing.assert_allclose(matching.matching_loss(logits, labels, jnp.ones(30)).loss, 0.6365, atol=1e-4)


def test_query_diversity(rng):
    alike = jnp.ones((3, 4, 8))
    apart = jnp.tile(jnp.eye(4, 8)[None], (3, 1, 1))
    everyone = jnp.ones(3, bool)
    np.testing.assert_allclose(diversity.query_diversity(alike, everyone), (1.0, 1.0), rtol=1e-6)
    np.testing.assert_allclose(diversity.query_diversity(apart, everyone), (0.0, 0.0), atol=1e-7)
    mixed = jnp.concatenate([alike[:1], apart[:2]])
    np.testing.assert_allclose(diversity.query_diversity(mixed, jnp.array([True, False, False])), (1.0, 1.0), rtol=1e-6)
