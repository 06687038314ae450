"""The vision transformer: variants by configuration, and positions for other picture sizes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax.models.vision.vit import ViT, ViTConfig, cubic_matrix, resize_positions

CONFIG = ViTConfig(image_size=28, patch=7, width=24, layers=2, heads=4, mlp_width=40)


def parameters(config):
    image = jnp.zeros((1, config.image_size, config.image_size, 3))
    return ViT(config).init(jax.random.key(0), image)["params"]


@pytest.mark.parametrize(
    ("changes", "tokens", "names"),
    [
        ({}, 17, {"class_token"}),
        ({"class_token": False, "final_norm": True}, 16, {"final_norm"}),
        ({"pre_norm": True, "patch_bias": False}, 17, {"class_token", "pre_norm"}),
    ],
    ids=["EVA", "SigLIP", "CLIP"],
)
def test_variants(changes, tokens, names):
    config = dataclasses.replace(CONFIG, **changes)
    tree = parameters(config)
    assert tree.keys() == {"patch_embedding", "positions", "blocks"} | names
    assert ("bias" in tree["patch_embedding"]) == config.patch_bias
    found = ViT(config).apply({"params": tree}, jnp.ones((3, 28, 28, 3)))
    chex.assert_shape(found, (3, tokens, 24))
    assert config.tokens == tokens


def test_remat_changes_nothing(rng):
    image = rng.normal(size=(2, 28, 28, 3)).astype(np.float32)
    tree = parameters(CONFIG)
    gradient = lambda config: jax.grad(lambda tree: (ViT(config).apply({"params": tree}, image) ** 2).mean())(tree)
    chex.assert_trees_all_close(
        gradient(CONFIG), gradient(dataclasses.replace(CONFIG, remat=True)), rtol=1e-5, atol=1e-6
    )


def test_a_picture_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"expected pictures of 28 x 28 x 3, found \(35, 35, 3\)"):
        ViT(CONFIG).apply({"params": parameters(CONFIG)}, jnp.zeros((1, 35, 35, 3)))


def test_what_is_left_beyond_whole_patches_is_not_seen(rng):
    """SigLIP has 27 x 27 patches of 14 in 384 pixels."""
    config = dataclasses.replace(CONFIG, image_size=30)
    assert config.tokens == 17
    image = rng.normal(size=(1, 30, 30, 3)).astype(np.float32)
    tree = parameters(config)
    whole = ViT(CONFIG).apply({"params": tree}, image[:, :28, :28])
    chex.assert_trees_all_equal(ViT(config).apply({"params": tree}, image), whole)


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("outputs", [1, 3, 4, 9])
def test_interpolation_keeps_what_is_constant(outputs, align_corners):
    matrix = cubic_matrix(4, outputs, align_corners)
    np.testing.assert_allclose(matrix.sum(1), 1)
    if outputs == 4:
        np.testing.assert_allclose(matrix, np.eye(4), atol=1e-12)


def test_aligned_corners_meet():
    matrix = cubic_matrix(4, 7, align_corners=True)
    np.testing.assert_allclose(matrix[::2], np.eye(4), atol=1e-12)


def test_the_class_token_has_no_place(rng):
    positions = rng.normal(size=(17, 24)).astype(np.float32)
    large = dataclasses.replace(CONFIG, image_size=56)
    resized = resize_positions(positions, 28, large, align_corners=False)
    chex.assert_shape(resized, (65, 24))
    chex.assert_trees_all_equal(resized[0], positions[0])
    chex.assert_trees_all_equal(resize_positions(positions, 28, CONFIG, align_corners=False), positions)
    with pytest.raises(ValueError, match="a position embedding of 17 tokens, expected 5 x 5 patches and 1 class"):
        resize_positions(positions, 35, large, align_corners=False)
