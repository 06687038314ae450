"""Token losses and their gradients against the plain formula, on one device and on meshes."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax.objectives import language_modeling
from blip2_jax.parallel import mesh as meshes

BATCH, LENGTH, WIDTH = 8, 60, 16


def problem(rng, vocabulary: int, batch: int = BATCH):
    """Features, matrix, bias, targets, and the tokens that count: none in row 1, and more in some rows than a block."""
    normal = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)
    targets = jnp.array(rng.integers(0, vocabulary, (batch, LENGTH)))
    mask = rng.random((batch, LENGTH)) < rng.random(batch)[:, None]
    mask[1] = False
    return normal(batch, LENGTH, WIDTH), normal(vocabulary, WIDTH), normal(vocabulary), targets, jnp.array(mask)


def formula(features, matrix, bias, targets, weights, smoothing):
    log_probability = jax.nn.log_softmax(features @ matrix.T + bias[None, None])
    picked = jnp.take_along_axis(log_probability, targets[..., None], -1)[..., 0]
    return ((-(1 - smoothing) * picked - smoothing * log_probability.mean(-1)) * weights).sum()


def found(features, matrix, bias, targets, weights, smoothing, frozen_head=False):
    loss = lambda features, matrix, bias: language_modeling.language_modeling_loss(
        features, matrix, bias, targets, weights, label_smoothing=smoothing, frozen_head=frozen_head
    )
    return jax.value_and_grad(loss, (0, 1, 2))(features, matrix, bias)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("frozen_head", [False, True])
def test_loss_and_gradients_are_the_formula(rng, smoothing, frozen_head):
    features, matrix, bias, targets, mask = problem(rng, 50)
    weights = language_modeling.token_weights(mask)
    value, gradients = jax.jit(found, static_argnums=(5, 6))(
        features, matrix, bias, targets, weights, smoothing, frozen_head
    )
    chex.assert_shape(value, ())
    expected = jax.value_and_grad(formula, (0, 1, 2))(features, matrix, bias, targets, weights, smoothing)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradients[0], expected[1][0], atol=1e-6)
    if frozen_head:
        assert not gradients[1].any()
        assert not gradients[2].any()
    else:
        np.testing.assert_allclose(gradients[1], expected[1][1], atol=1e-6)
        np.testing.assert_allclose(gradients[2], expected[1][2], atol=1e-6)


@pytest.mark.parametrize("mesh", ["data=4", "data=2,fsdp=2", "data=2,fsdp=2,tensor=2", "tensor=2"])
@pytest.mark.parametrize(("vocabulary", "batch"), [(50, 8), (51, 8), (50, 3)])
def test_every_mesh_has_the_same_loss_and_gradients(rng, mesh, vocabulary, batch):
    """A vocabulary that `tensor` does not divide, and a batch that the rows' axes do not, are whole on every device."""
    features, matrix, bias, targets, mask = problem(rng, vocabulary, batch)
    weights = language_modeling.token_weights(mask)
    expected = jax.value_and_grad(formula, (0, 1, 2))(features, matrix, bias, targets, weights, 0.1)
    devices = int(np.prod([int(size) for size in re.findall(r"\d+", mesh)]))
    with jax.set_mesh(meshes.make_mesh(mesh, jax.devices()[:devices])):
        value, gradients = jax.jit(found, static_argnums=5)(features, matrix, bias, targets, weights, 0.1)
        losses = jax.jit(language_modeling.token_losses)(features, matrix, bias, targets, weights)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    for ours, theirs in zip(gradients, expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    np.testing.assert_allclose(losses.sum(), formula(features, matrix, bias, targets, weights, 0.0), rtol=1e-5)


def test_no_device_ever_holds_all_logits(rng):
    """4000 tokens of 10,000 words: their logits would be 160 MB, those of a block are 5 MB."""
    features, targets = jnp.zeros((8, 500, 16)), jnp.zeros((8, 500), int)
    weights = language_modeling.token_weights(jnp.ones((8, 500), bool))
    matrix = jnp.zeros((10_000, 16))
    step = jax.jit(lambda *x: found(*x, jnp.zeros(10_000), targets, weights, 0.1, False))
    assert step.lower(features, matrix).compile().memory_analysis().temp_size_in_bytes < 40e6


def test_tokens_that_do_not_count_change_nothing(rng):
    features, matrix, bias, targets, mask = problem(rng, 20)
    weights = language_modeling.token_weights(mask)
    spoilt = jnp.where(mask[..., None], features, 1e3)
    (value, gradients), (expected, clean) = (
        found(x, matrix, bias, jnp.where(mask, targets, -100), weights, 0.1) for x in (spoilt, features)
    )
    assert value == expected
    chex.assert_trees_all_equal(gradients[0], clean[0])
    assert not gradients[0][~np.asarray(mask)].any()


def test_nothing_to_predict_is_a_loss_of_zero():
    weights = language_modeling.token_weights(jnp.zeros((2, 3), bool))
    assert not weights.any()
    value, gradients = found(
        jnp.ones((2, 3, 4)), jnp.ones((5, 4)), jnp.zeros(5), jnp.zeros((2, 3), int), weights, 0.0, False
    )
    assert value == 0
    assert not any(gradient.any() for gradient in gradients)


def test_token_losses_add_up_to_the_loss(rng):
    features, matrix, bias, targets, mask = problem(rng, 20)
    weights = language_modeling.token_weights(mask)
    losses = language_modeling.token_losses(features, matrix, bias, targets, weights)
    chex.assert_shape(losses, (BATCH, LENGTH))
    total = language_modeling.language_modeling_loss(features, matrix, bias, targets, weights)
    np.testing.assert_allclose(losses.sum(), total, rtol=1e-5)
    assert not losses[~np.asarray(mask)].any()


def test_token_weights_are_the_mean_or_the_mean_of_the_ranks():
    mask = jnp.array([[True, False, False], [True, True, True], [False] * 3, [False] * 3, [True] * 3, [False] * 3])
    weights = language_modeling.token_weights(mask)
    chex.assert_shape(weights, (6, 3))
    np.testing.assert_allclose(weights, np.asarray(mask) / 7, rtol=1e-6)
    by_rank = language_modeling.token_weights(mask, 3)  # The second of three has no token.
    expected = np.asarray(mask) * np.repeat([1 / 8, 0, 1 / 6], 2)[:, None]
    np.testing.assert_allclose(by_rank, expected, rtol=1e-6)


def test_ranks_that_do_not_divide_the_rows_are_refused():
    with pytest.raises(ValueError, match=r"6 rows do not divide into 4 ranks.*compat\.world_size"):
        language_modeling.token_weights(jnp.ones((6, 3), bool), 4)


def test_next_token_targets():
    ids = jnp.array([[7, 1, 2, 3, 0]])
    targets, mask = language_modeling.next_token_targets(ids, jnp.array([[True, True, True, True, False]]))
    assert targets.tolist() == [[1, 2, 3, 0, 0]]
    assert mask.tolist() == [[True, True, True, False, False]]
