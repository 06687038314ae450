"""What needs no training: the numbers that a trained model must beat to have learnt anything.

A picture's nearest training picture in the encoder's own features gives a caption and a category; a caption's nearest
training caption in BERT's own sentence embedding gives a picture, and that one's neighbours are what it finds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from blip2_jax.evaluation import captioning, retrieval


class Known(NamedTuple):
    """A set of pictures with all that the baselines look at.

    Attributes:
      features: float[N, F] of unit length from the image encoder, by the name of the description.
      captions: N texts.
      sentences: float[N, D] of unit length, from BERT.
      categories: N labels, or None.
    """

    features: dict[str, np.ndarray]
    captions: list[str]
    sentences: np.ndarray
    categories: list[str] | None


def join(parts: Sequence[Known]) -> Known:
    """Several sets as one; it has categories if all of them have."""
    return Known(
        {name: np.concatenate([part.features[name] for part in parts]) for name in parts[0].features},
        [caption for part in parts for caption in part.captions],
        np.concatenate([part.sentences for part in parts]),
        [c for part in parts for c in part.categories or ()] if all(part.categories for part in parts) else None,
    )


def pooled(image_embeds: np.ndarray) -> np.ndarray:
    """float[N, P, D] -> float32[N, D] of unit length: the mean of the image tokens."""
    return unit(image_embeds.astype(np.float32).mean(1))


def flattened(image_embeds: np.ndarray) -> np.ndarray:
    """float[N, P, D] -> float32[N, P * D] of unit length: token by token, so that it matters what is where."""
    return unit(image_embeds.astype(np.float32).reshape(len(image_embeds), -1))


def unit(x: np.ndarray) -> np.ndarray:
    """float[..., D], its rows scaled to length 1."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


DESCRIPTIONS = {"pooled": pooled, "by_token": flattened}


def nearest_neighbour(test: Known, train: Known, description: str) -> dict:
    """Copied captions and categories, and retrieval by way of the training pictures."""
    ours, theirs = test.features[description], train.features[description]
    nearest = (ours @ theirs.T).argmax(1)
    copied = [train.captions[index] for index in nearest]
    result: dict = {"caption": captioning.score(copied, [[caption] for caption in test.captions])}
    if test.categories and train.categories:
        right = [train.categories[i] == category for i, category in zip(nearest, test.categories, strict=True)]
        result["question"] = {"accuracy": float(np.mean(right))}
    gallery = retrieval.gallery([[caption] for caption in test.captions])
    like = (test.sentences[gallery.first] @ train.sentences.T).argmax(1)
    scores = ours @ theirs[like].T
    of_images, of_texts = retrieval.best(scores), retrieval.best(scores.T)
    result["retrieval"] = retrieval.both_directions(gallery, of_images, of_texts)
    return result


def majority(categories: Sequence[str], train_categories: Sequence[str]) -> dict:
    """The answer that is right most often in training."""
    answer = Counter(train_categories).most_common(1)[0][0]
    return {"question": {"accuracy": float(np.mean([category == answer for category in categories]))}}


def chance(captions: Sequence[str]) -> dict:
    """Retrieval in random order."""
    return {"retrieval": retrieval.chance(retrieval.gallery([[caption] for caption in captions]))}


def measure(test: Known, train: Known) -> dict[str, dict]:
    """Every baseline of this file, by name."""
    result = {f"nearest_neighbour_{name}": nearest_neighbour(test, train, name) for name in DESCRIPTIONS}
    result["chance"] = chance(test.captions)
    if test.categories and train.categories:
        result["majority"] = majority(test.categories, train.categories)
    return result
