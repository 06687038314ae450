"""ITC and the hard negatives as whole tables, all images against all captions: what the streamed ones must equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax.objectives.candidates import Pairs


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def features(rng: np.random.Generator, batch: int, queries: int = 4, width: int = 8) -> tuple[jax.Array, jax.Array]:
    """Of images, float32[B, Q, E], and of captions, float32[B, E]."""
    images, texts = rng.normal(size=(batch, queries, width)), rng.normal(size=(batch, width))
    return jnp.asarray(unit(images), jnp.float32), jnp.asarray(unit(texts), jnp.float32)


def identities(rng: np.random.Generator, batch: int, kinds: int) -> jax.Array:
    """uint32[B, 2]: hashes, of which some differ in one of their two words alone."""
    return jnp.asarray(rng.integers(0, kinds, (batch, 2)), jnp.uint32)


def pairs(rng: np.random.Generator, batch: int, by: str = "image_or_text", real: float = 0.8) -> Pairs:
    """With images and captions that occur several times, and rows that are not real."""
    kinds = max(2, round((batch / 2) ** 0.5))
    mask = jnp.asarray(rng.random(batch) < real)
    return Pairs(identities(rng, batch, kinds), identities(rng, batch, kinds), mask, by)


def same(pairs: Pairs) -> np.ndarray:
    """bool[B, B], one pair of rows at a time."""
    image, text, real = map(np.asarray, (pairs.image_id, pairs.text_id, pairs.example_mask))
    found = np.eye(len(real), dtype=bool)
    for i, j in np.ndindex(found.shape):
        if real[i] and real[j]:
            found[i, j] |= pairs.by != "pair" and (image[i] == image[j]).all()
            found[i, j] |= pairs.by == "image_or_text" and (text[i] == text[j]).all()
    return found


def contrastive_loss(images, texts, temperature, pairs, label_smoothing=0.1, gather_gradient=True) -> jax.Array:
    """The loss, and by jax.grad its gradient; with gather_gradient=False, what is gathered is held constant."""
    real = np.asarray(pairs.example_mask)
    count, related = max(real.sum(), 1), same(pairs) & real[None]
    target = (1 - label_smoothing) * related / np.maximum(related.sum(1, keepdims=True), 1)
    target = (target + label_smoothing * real[None] / count) * real[:, None]
    gathered = (lambda x: x) if gather_gradient else jax.lax.stop_gradient

    def cross_entropy(similarity: jax.Array) -> jax.Array:
        logits = jnp.where(real[None], similarity / temperature, -1e30)
        return -(target * jnp.where(real[None], jax.nn.log_softmax(logits), 0)).sum() / count

    table = lambda images, texts: (images[:, None] * texts[None, :, None]).sum(-1).max(-1)
    image_to_text, text_to_image = table(images, gathered(texts)), table(gathered(images), texts).T
    return 0.5 * (cross_entropy(image_to_text) + cross_entropy(text_to_image))


def negative_probabilities(similarity: np.ndarray, temperature: float, pairs: Pairs, sampling: str) -> np.ndarray:
    """float64[B, B]: how likely row i is to get candidate j; zero for a row that has none."""
    real = np.asarray(pairs.example_mask)
    weight = np.where(real[None], np.exp(np.float64(similarity) / temperature), 0)
    if sampling == "before_2023_07":
        weight = weight / np.maximum(weight.sum(1, keepdims=True), 1e-300) + 1e-4
    weight = np.where(~same(pairs) & real[None] & real[:, None], weight, 0)
    return weight / np.maximum(weight.sum(1, keepdims=True), 1e-300)
