"""ITC in blocks, on any mesh, against the whole table: values and gradients."""

import dataclasses
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import compat
from blip2_jax.objectives import contrastive
from tests.meshes import MESHES, surrounding
from tests.objectives import naive

TEMPERATURE = jnp.float32(0.07)


def loss_and_gradients(function, images, texts, pairs, temperature=TEMPERATURE, **options):
    loss = lambda images, texts, temperature: function(images, texts, temperature, pairs, **options)
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(images, texts, temperature)


def close(found, expected):
    """Value and gradients, each to its own size."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * max(1e-3, float(abs(theirs).max())))


@pytest.mark.parametrize("gather_gradient", [True, False])
@pytest.mark.parametrize("mesh", MESHES)
def test_loss_and_gradients_are_those_of_the_whole_table(rng, mesh, gather_gradient):
    (images, texts), pairs = naive.features(rng, 16), naive.pairs(rng, 16)
    assert naive.same(pairs).sum() > 16
    assert not pairs.example_mask.all()
    expected = loss_and_gradients(naive.contrastive_loss, images, texts, pairs, gather_gradient=gather_gradient)
    with surrounding(mesh):
        options = {"gather_gradient": gather_gradient, "block": 5}
        found = loss_and_gradients(contrastive.contrastive_loss, images, texts, pairs, **options)
    chex.assert_shape([found[0], *found[1]], [(), (16, 4, 8), (16, 8), ()])
    chex.assert_type([found[0], *found[1]], jnp.float32)
    close(found, expected)


@pytest.mark.parametrize("mesh", ["data=2,fsdp=2", "data=4,fsdp=2"])
def test_a_batch_that_the_mesh_does_not_divide(rng, mesh):
    (images, texts), pairs = naive.features(rng, 6), naive.pairs(rng, 6)
    with surrounding(mesh):
        found = loss_and_gradients(contrastive.contrastive_loss, images, texts, pairs)
    close(found, loss_and_gradients(naive.contrastive_loss, images, texts, pairs))


@pytest.mark.parametrize("by", compat.POSITIVES)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_what_makes_rows_the_same_and_how_smooth_the_target_is(rng, by, smoothing):
    (images, texts), pairs = naive.features(rng, 12), naive.pairs(rng, 12, by)
    options = {"label_smoothing": smoothing}
    found = loss_and_gradients(contrastive.contrastive_loss, images, texts, pairs, **options)
    close(found, loss_and_gradients(naive.contrastive_loss, images, texts, pairs, **options))


def test_the_three_relations_differ(rng):
    (images, texts), pairs = naive.features(rng, 12), naive.pairs(rng, 12)
    each = [dataclasses.replace(pairs, by=by) for by in compat.POSITIVES]
    losses = {float(contrastive.contrastive_loss(images, texts, TEMPERATURE, pairs)) for pairs in each}
    assert len(losses) == 3


@pytest.mark.parametrize("mesh", ["", "data=4"])
def test_the_block_changes_nothing(rng, mesh):
    (images, texts), pairs = naive.features(rng, 8), naive.pairs(rng, 8)
    expected = loss_and_gradients(naive.contrastive_loss, images, texts, pairs)
    with surrounding(mesh):
        for block in (1, 3, 8, 512):
            close(loss_and_gradients(contrastive.contrastive_loss, images, texts, pairs, block=block), expected)


def test_in_bfloat16_the_loss_is_that_of_its_rounded_features(rng):
    (images, texts), pairs = naive.features(rng, 8), naive.pairs(rng, 8)
    images, texts = images.astype(jnp.bfloat16), texts.astype(jnp.bfloat16)
    found = loss_and_gradients(contrastive.contrastive_loss, images, texts, pairs)
    expected = loss_and_gradients(naive.contrastive_loss, images.astype(jnp.float32), texts.astype(jnp.float32), pairs)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    assert found[0].dtype == jnp.float32
    assert found[1][0].dtype == found[1][1].dtype == jnp.bfloat16


def test_a_gradient_goes_to_one_of_equal_queries(rng):
    """As an arg max gives it; shared among them, queries that became one vector would all get the same."""
    (images, texts), pairs = naive.features(rng, 4, queries=1), naive.pairs(rng, 4)
    images = jnp.tile(images, (1, 3, 1))
    _, (d_images, _, _) = loss_and_gradients(contrastive.contrastive_loss, images, texts, pairs)
    assert d_images[:, 0].any()
    assert not d_images[:, 1:].any()


@pytest.mark.parametrize("mesh", ["", "data=4"])
def test_logits_of_thousands_are_no_trouble(rng, mesh):
    (images, texts), pairs = naive.features(rng, 8), naive.pairs(rng, 8)
    cold = jnp.float32(1e-4)
    with surrounding(mesh):
        found = loss_and_gradients(contrastive.contrastive_loss, images, texts, pairs, cold, block=3)
    chex.assert_tree_all_finite(found)
    close(found, loss_and_gradients(naive.contrastive_loss, images, texts, pairs, cold))


@pytest.mark.parametrize("mesh", ["", "data=4"])
def test_a_lone_pair_loses_nothing(rng, mesh):
    (images, texts), pairs = naive.features(rng, 1), naive.pairs(rng, 1, real=1.0)
    with surrounding(mesh):
        loss, gradients = loss_and_gradients(contrastive.contrastive_loss, images, texts, pairs)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("mesh", ["", "data=8"])
@pytest.mark.parametrize("real", [0, 1])
def test_a_batch_with_one_real_row_or_none_loses_nothing(rng, mesh, real):
    (images, texts), pairs = naive.features(rng, 8), naive.pairs(rng, 8)
    pairs = dataclasses.replace(pairs, example_mask=jnp.arange(8) >= 8 - real)
    with surrounding(mesh):
        loss, gradients = loss_and_gradients(contrastive.contrastive_loss, images, texts, pairs, block=3)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


def largest_array(block: int) -> int:
    """Most elements of any array of the compiled loss and its gradient, at B = 64, Q = 3, E = 5 on four devices."""
    shape = jax.ShapeDtypeStruct
    ids = shape((64, 2), jnp.uint32)
    pairs = contrastive.Pairs(ids, ids, shape((64,), jnp.bool_))
    loss = lambda *arguments: contrastive.contrastive_loss(*arguments, block=block)
    arguments = shape((64, 3, 5), jnp.float32), shape((64, 5), jnp.float32), shape((), jnp.float32), pairs
    with surrounding("data=4"):
        rows = jax.NamedSharding(jax.sharding.get_mesh(), jax.P("data"))
        arguments = jax.tree.map(lambda x: x.update(sharding=rows) if x.ndim else x, arguments)
        text = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*arguments).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\b(?:f32|pred|s32)\[([\d,]+)\]", text)]
    return max(sizes)


def test_no_array_of_all_against_all_is_ever_there():
    own, everyone = 16, 64
    assert largest_array(block=8) < own * everyone
    assert largest_array(block=64) >= own * everyone  # The same check on one block, so it can fail.


def test_an_unknown_relation_or_an_empty_block_is_an_error(rng):
    (images, texts), pairs = naive.features(rng, 4), naive.pairs(rng, 4, by="caption")
    with pytest.raises(ValueError, match="'caption': expected one of image_or_text, image, pair"):
        contrastive.contrastive_loss(images, texts, TEMPERATURE, pairs)
    pairs = dataclasses.replace(pairs, by="image")
    with pytest.raises(ValueError, match="block of 0"):
        contrastive.contrastive_loss(images, texts, TEMPERATURE, pairs, block=0)
