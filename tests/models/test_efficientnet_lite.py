"""The convolutional encoder: its two depthwise kernels agree, and so do the shapes it promises."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from blip2_jax.checkpoints import frozen
from blip2_jax.data import images
from blip2_jax.data.sources import open_source
from blip2_jax.models import vision
from blip2_jax.models.vision import efficientnet_lite


@pytest.mark.parametrize("side", [1, 7, 8])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_shifted_slices_are_the_convolution(side, kernel, stride):
    keys = jax.random.split(jax.random.key(0), 2)
    x, weights = jax.random.normal(keys[0], (2, side, side + 1, 3)), jax.random.normal(keys[1], (kernel, kernel, 3))
    by_shifts = efficientnet_lite._depthwise_by_shifts(x, weights, stride)
    np.testing.assert_allclose(by_shifts, efficientnet_lite._depthwise_by_conv(x, weights, stride), atol=1e-5)
    chex.assert_equal_shape([by_shifts, efficientnet_lite.depthwise_convolution(x, weights, stride)])


def test_an_accelerator_gets_the_convolution():
    lowered = jax.jit(efficientnet_lite.depthwise_convolution, static_argnums=2).trace(
        jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3)), 1
    )
    assert "stablehlo.convolution" in lowered.lower(lowering_platforms=("tpu",)).as_text()
    assert "stablehlo.convolution" not in lowered.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize(("side", "tokens"), [(64, 4), (160, 25), (161, 36), (224, 49)])
def test_tokens_of_the_shipped_encoder(side, tokens):
    part = frozen.find("vision", "nano:")
    encoder = vision.build(part.config, side)
    assert encoder.tokens == tokens
    assert encoder.width == 320


def test_the_shipped_encoder_finds_the_other_drawing_of_a_thing():
    """Twelve things in two artists' drawings: chance finds one of them."""
    part = frozen.find("vision", "nano:")
    encoder = frozen.vision_encoder(part, 128, jnp.float32)
    parameters = frozen.load_vision(part, encoder, jnp.float32)
    source = open_source("nano:test_concept")
    records = [source[index] for index in range(len(source))][::32][:12]
    twins = [next(source[i] for i in range(len(source)) if source[i]["key"] == other(r["key"])) for r in records]
    render = lambda records: np.stack([images.resize(images.decode(r["image"]), 128) for r in records])
    encode = jax.jit(lambda pictures: encoder.encode(parameters, pictures).reshape(len(pictures), -1))
    one, two = encode(render(records)), encode(render(twins))
    unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    found = (unit(one) @ unit(two).T).argmax(1)
    assert (found == np.arange(12)).sum() >= 8


def other(key):
    """The key of the other artist's drawing."""
    return key.replace("noto/", "TWEMOJI/").replace("twemoji/", "noto/").replace("TWEMOJI/", "twemoji/")


def test_a_random_encoder_has_the_same_shape_and_another_identity():
    shipped, random = frozen.find("vision", "nano:"), frozen.find("vision", "random:3")
    assert shipped.sha256 != random.sha256
    encoder = frozen.vision_encoder(shipped, 64, jnp.float32)
    chex.assert_trees_all_equal_shapes(*(frozen.load_vision(part, encoder, jnp.float32) for part in (shipped, random)))


def test_an_unknown_encoder_is_an_error(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "resnet"}')
    save_file({"x": np.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="the image encoder's model_type is 'resnet'; expected one of"):
        frozen.vision_encoder(frozen.find("vision", f"hf:{tmp_path}"), 64, jnp.float32)
