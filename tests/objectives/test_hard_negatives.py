"""Hard negatives: drawn with the right probabilities, and the same ones on any mesh and by any block."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import compat
from blip2_jax.objectives import candidates, matching
from tests.meshes import MESHES, surrounding
from tests.objectives import naive

TEMPERATURE = jnp.float32(0.3)


def draw(features, pairs, key=0, **options):
    function = jax.jit(lambda key, *arguments: matching.hard_negatives(key, *arguments, TEMPERATURE, pairs, **options))
    return function(jax.random.key(key), *features)


def check(negatives, pairs):
    """Nothing is drawn that is not allowed, and something wherever it is."""
    allowed = ~naive.same(pairs) & np.outer(pairs.example_mask, pairs.example_mask)
    valid = np.asarray(negatives.valid)
    assert (valid == allowed.any(1)).all()
    rows = np.arange(len(valid))[valid]
    for drawn in (np.asarray(negatives.image), np.asarray(negatives.text)):
        assert ((drawn >= 0) & (drawn < len(valid))).all()
        assert allowed[rows, drawn[valid]].all()


@pytest.mark.parametrize("sampling", compat.NEGATIVES)
def test_neither_mesh_nor_block_changes_the_draw(rng, sampling):
    features, pairs = naive.features(rng, 64), naive.pairs(rng, 64)
    expected = draw(features, pairs, sampling=sampling)
    check(expected, pairs)
    for number, mesh in enumerate(MESHES):
        with surrounding(mesh):
            found = draw(features, pairs, sampling=sampling, block=(5, 64, 1, 16, 13)[number % 5])
        chex.assert_trees_all_equal(found[:3], expected[:3])
        valid = expected.valid
        np.testing.assert_allclose(found.image_margin[valid], expected.image_margin[valid], atol=1e-5)
        np.testing.assert_allclose(found.text_margin[valid], expected.text_margin[valid], atol=1e-5)


@pytest.mark.parametrize("sampling", compat.NEGATIVES)
def test_draws_are_as_likely_as_they_should_be(rng, sampling):
    features, pairs = naive.features(rng, 8), naive.pairs(rng, 8)
    # One caption is all of its image's softmax: before July 2023 its other negatives were then almost uniform.
    temperature = jnp.float32(0.08)
    features = features[0], features[1].at[0].set(features[0][0, 1])
    similarity = np.asarray(candidates.similarities(*features))
    draws = 20_000
    one = lambda key: matching.hard_negatives(key, *features, temperature, pairs, sampling=sampling, block=3)
    drawn = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(jax.random.split(jax.random.key(1), draws))
    chex.assert_shape([drawn.image, drawn.text, drawn.valid], (draws, 8))
    for table, chosen in ((similarity.T, drawn.image), (similarity, drawn.text)):
        expected = naive.negative_probabilities(table, 0.08, pairs, sampling)
        for row in np.flatnonzero(drawn.valid[0]):
            found = np.bincount(np.asarray(chosen)[:, row], minlength=8) / draws
            error = np.sqrt(expected[row] * (1 - expected[row]) / draws)
            assert (abs(found - expected[row]) <= 4.5 * error + 1e-4).all()


def test_before_july_2023_the_negatives_of_sure_pairs_were_hardly_hard(rng):
    images, _ = naive.features(rng, 64)
    pairs = naive.pairs(rng, 64, "pair", real=1.0)
    texts = images[:, 0]  # Every image is sure of its caption.
    similarity = candidates.similarities(images, texts)
    mean = {}
    for sampling in compat.NEGATIVES:
        drawn = matching.hard_negatives(jax.random.key(0), images, texts, jnp.float32(0.01), pairs, sampling=sampling)
        mean[sampling] = float(similarity[jnp.arange(64), drawn.text].mean())
    assert mean["hard"] > mean["before_2023_07"] + 0.1


def test_the_draw_depends_on_key_and_direction_and_not_on_the_batch_size(rng):
    features = naive.features(rng, 32)
    pairs = dataclasses.replace(naive.pairs(rng, 32, "pair"), example_mask=jnp.arange(32) < 16)
    whole = draw(features, pairs)
    half = draw([x[:16] for x in features], jax.tree.map(lambda x: x[:16], pairs))
    chex.assert_trees_all_equal(half[:3], jax.tree.map(lambda x: x[:16], whole[:3]))
    assert (whole.text[:16] != draw(features, pairs, key=1).text[:16]).any()
    alike = jnp.ones((16, 1, 1)), jnp.ones((16, 1))
    flat = draw(alike, jax.tree.map(lambda x: x[:16], pairs))
    assert (flat.image != flat.text).any()


def test_a_margin_is_the_lead_over_the_next_best(rng):
    """With what was drawn taken out of the batch, the next best is drawn; its score is lower by the margin."""
    (images, texts), pairs = naive.features(rng, 16), naive.pairs(rng, 16, "pair", real=1.0)
    draw = jax.jit(
        lambda real: matching.hard_negatives(
            jax.random.key(0), images, texts, TEMPERATURE, dataclasses.replace(pairs, example_mask=real), block=3
        )
    )
    drawn = draw(pairs.example_mask)
    chex.assert_shape([drawn.image_margin, drawn.text_margin], (16,))
    similarity = np.asarray(candidates.similarities(images, texts))
    noise = lambda direction, row, column: matching._gumbel(
        jax.random.fold_in(jax.random.key(0), direction), row, column
    )
    score = lambda image, text: similarity[image, text] / TEMPERATURE + noise(1, image, text)
    for image, margin in enumerate(drawn.text_margin):
        second = draw(pairs.example_mask.at[drawn.text[image]].set(False)).text[image]
        np.testing.assert_allclose(margin, score(image, drawn.text[image]) - score(image, second), atol=1e-5)
    assert (drawn.image_margin > 0).all()


def test_nothing_has_a_gradient(rng):
    (images, texts), pairs = naive.features(rng, 8), naive.pairs(rng, 8, "pair", real=1.0)

    def margins(images, texts, temperature):
        drawn = matching.hard_negatives(jax.random.key(0), images, texts, temperature, pairs)
        return (drawn.image_margin + drawn.text_margin).sum()

    with surrounding("data=4"):
        gradients = jax.grad(margins, (0, 1, 2))(images, texts, TEMPERATURE)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("mesh", ["", "data=4"])
@pytest.mark.parametrize("sampling", compat.NEGATIVES)
@pytest.mark.parametrize("batch", [1, 8])
def test_without_candidates_nothing_is_valid_and_every_index_is_a_row(rng, mesh, sampling, batch):
    features, pairs = naive.features(rng, batch), naive.pairs(rng, batch, real=1.0)
    cases = [
        dataclasses.replace(pairs, image_id=jnp.zeros_like(pairs.image_id)),
        dataclasses.replace(pairs, example_mask=jnp.zeros(batch, bool)),
        dataclasses.replace(pairs, example_mask=jnp.arange(batch) == batch - 1),
    ]
    for case in cases:
        with surrounding(mesh):
            negatives = draw(features, case, sampling=sampling, block=3)
        assert not negatives.valid.any()
        check(negatives, case)
        assert not jnp.isnan(negatives.image_margin).any()
        assert not jnp.isnan(negatives.text_margin).any()


def test_one_candidate_is_drawn_whatever_it_is(rng):
    features, pairs = naive.features(rng, 8), naive.pairs(rng, 8, "pair")
    pairs = dataclasses.replace(pairs, example_mask=jnp.isin(jnp.arange(8), jnp.array([2, 7])))
    with surrounding("data=4"):
        negatives = draw(features, pairs, block=3)
    check(negatives, pairs)
    assert negatives.text[2] == negatives.image[2] == 7
    assert negatives.text_margin[2] == jnp.inf


@pytest.mark.parametrize("mesh", ["", "data=4"])
def test_features_that_are_not_numbers_still_give_rows(rng, mesh):
    """The step is then skipped for its loss; an index beyond the batch would be an error before that."""
    (images, texts), pairs = naive.features(rng, 8), naive.pairs(rng, 8)
    with surrounding(mesh):
        negatives = draw((images * jnp.nan, texts), pairs, block=3)
    for row in (negatives.image, negatives.text):
        assert ((row >= 0) & (row < 8)).all()


def test_an_unknown_way_to_draw_is_an_error(rng):
    with pytest.raises(ValueError, match="'soft': expected one of hard, before_2023_07"):
        draw(naive.features(rng, 4), naive.pairs(rng, 4), sampling="soft")
