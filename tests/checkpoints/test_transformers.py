"""Directories as transformers saves them: our modules give what its own give (pytest -m torch)."""

import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax.checkpoints import frozen
from blip2_jax.models.layers import causal_mask
from tests.originals import LANGUAGE, TOWERS, saved

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("name", TOWERS)
def test_towers(name, tmp_path, rng):
    import torch

    model = saved(*TOWERS[name], tmp_path)
    part = frozen.find("vision", f"hf:{tmp_path}")
    encoder = frozen.vision_encoder(part, 28, jnp.float32)
    weights = frozen.load_vision(part, encoder, jnp.float32)
    pictures = rng.integers(0, 256, (2, 28, 28, 3)).astype(np.uint8)
    pixels = (pictures - np.asarray(encoder.image_mean)) / np.asarray(encoder.image_std)
    with torch.no_grad():
        said = model(torch.tensor(pixels.transpose(0, 3, 1, 2)).float(), output_hidden_states=True)
    # The paper takes CLIP's second-last layer; BLIP-2's own last norm is ln_vision, which is trained.
    hidden = {"CLIP": -2, "BLIP-2": -1}
    expected = said.hidden_states[hidden[name]] if name in hidden else said.last_hidden_state
    np.testing.assert_allclose(np.asarray(encoder.encode(weights, pictures)), expected.numpy(), atol=5e-5)


@pytest.mark.parametrize("name", LANGUAGE)
@pytest.mark.parametrize("file_size", ["1GB", "20KB"], ids=["one file", "shards"])
def test_language_models(name, file_size, tmp_path, rng):
    import torch

    model = saved(*LANGUAGE[name], tmp_path, file_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (file_size == "20KB")
    part = frozen.find("llm", f"hf:{tmp_path}")
    ours = frozen.language_model(part, jnp.float32)
    bound = ours.bind({"params": frozen.load_language_model(part, ours, jnp.float32)})
    ids = rng.integers(3, 90, (2, 24))
    if name == "Flan-T5":
        decoder_ids = rng.integers(3, 90, (2, 7))
        with torch.no_grad():
            expected = model(input_ids=torch.tensor(ids), decoder_input_ids=torch.tensor(decoder_ids)).logits
        encoded = bound.encode(bound.embed(jnp.asarray(ids)), jnp.ones(ids.shape, bool))
        hidden, _ = bound.decode(encoded, bound.embed(jnp.asarray(decoder_ids)))
    else:
        with torch.no_grad():
            expected = model(torch.tensor(ids)).logits
        positions = jnp.broadcast_to(jnp.arange(24), (2, 24))
        hidden, _ = bound(bound.embed(jnp.asarray(ids)), positions, causal_mask(24))
    expected = expected.numpy()
    assert np.abs(np.asarray(hidden @ bound.head().T) - expected).max() < 1e-5 * np.abs(expected).max() + 1e-4
