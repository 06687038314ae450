"""Image-text retrieval: recall at 1, 5 and 10, by ITC alone and with the best candidates judged again by ITM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

RANKS = (1, 5, 10)
Directions = dict[str, dict[str, float]]


class Found(NamedTuple):
    """The best candidates of each query, best first; equal scores keep the candidates' order.

    Attributes:
      scores: float32[N, K].
      index: int32[N, K], the numbers of the candidates.
    """

    scores: np.ndarray
    index: np.ndarray


def best(scores: np.ndarray, keep: int = max(RANKS)) -> Found:
    """float[N, M], all scores of few queries and candidates -> the `keep` best of each query."""
    index = np.argsort(-scores, axis=1, kind="stable")[:, :keep]
    return Found(np.take_along_axis(scores, index, axis=1), index.astype(np.int32))


class Gallery(NamedTuple):
    """Images and the distinct captions of all of them.

    Attributes:
      texts: the captions, T, in order of appearance.
      first: for each, the index of the first image that has it.
      pairs: int64[R], image * T + caption of all that belong together, ascending.
      images: I.
    """

    texts: list[str]
    first: list[int]
    pairs: np.ndarray
    images: int

    def right(self, image: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Whether images and captions belong together: int[...] and int[...] -> bool[...]."""
        wanted = np.asarray(image, np.int64) * len(self.texts) + text
        place = np.minimum(np.searchsorted(self.pairs, wanted), len(self.pairs) - 1)
        return self.pairs[place] == wanted

    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """How many captions each image has, int[I], and how many images each caption, int[T]."""
        image, text = np.divmod(self.pairs, len(self.texts))
        return np.bincount(image, minlength=self.images), np.bincount(text, minlength=len(self.texts))


def gallery(captions: Sequence[Sequence[str]]) -> Gallery:
    """Of every image's captions; one that several images share counts once, and belongs to all of them."""
    numbers: dict[str, int] = {}
    first, pairs = [], []
    for image, own in enumerate(captions):
        for caption in own:
            if caption not in numbers:
                numbers[caption] = len(numbers)
                first.append(image)
            pairs.append((image, numbers[caption]))
    flat = np.asarray([image * len(numbers) + text for image, text in pairs], np.int64)
    return Gallery(list(numbers), first, np.unique(flat), len(captions))


def recalls(right: np.ndarray) -> dict[str, float]:
    """Share of queries with a right candidate among the first 1, 5 and 10: bool[N, K] -> from 0 to 1.

    Returns:
      {"r1": ..., "r5": ..., "r10": ...}.
    """
    return {f"r{rank}": float(right[:, :rank].any(1).mean()) for rank in RANKS}


def both_directions(gallery: Gallery, of_images: Found, of_texts: Found) -> Directions:
    """Recalls of images searched by text and of texts searched by image."""
    query = lambda found: np.arange(len(found.index))[:, None]
    return {
        "text_to_image": recalls(gallery.right(of_texts.index, query(of_texts))),
        "image_to_text": recalls(gallery.right(query(of_images), of_images.index)),
    }


def chance(gallery: Gallery) -> Directions:
    """Expected recalls of a random order."""

    def expected(right: np.ndarray, candidates: int) -> dict[str, float]:
        result = {}
        for rank in RANKS:
            miss = np.ones(len(right))
            for draw in range(min(rank, candidates)):
                miss *= np.clip((candidates - right - draw) / (candidates - draw), 0, None)
            result[f"r{rank}"] = float((1 - miss).mean())
        return result

    of_images, of_texts = gallery.counts()
    return {
        "text_to_image": expected(of_texts, gallery.images),
        "image_to_text": expected(of_images, len(gallery.texts)),
    }


def posterior(logits: np.ndarray, cosines: np.ndarray, temperature: float) -> np.ndarray:
    """How well images and captions fit by ITM and ITC together: ITM's log-odds plus cosine / temperature.

    ITM learns to tell pairs from hard negatives, which ITC's own softmax has drawn. Against negatives of density q a
    classifier's log-odds tend to log p/q (noise-contrastive estimation, Gutmann and Hyvarinen 2010), so they say what
    ITC does *not* know, and log q, the cosine over the temperature less its normaliser, has to be added. The normaliser
    is left out: for negatives of one kind all candidates share it, but half of ours are wrong images and half wrong
    captions, so this is an approximation.

    Args:
      logits: float[B, 2], of {no match, match}.
      cosines: float[B], of the query that fits best.
      temperature: of ITC.

    Returns:
      float[B], comparable among the candidates of one query.
    """
    return logits[:, 1] - logits[:, 0] + cosines / temperature


def tempered(logits: np.ndarray, cosines: np.ndarray, temperature: float) -> np.ndarray:
    """`posterior` with half of ITM's log-odds, which nano_long's validation prefers. Arguments as `posterior`."""
    return (logits[:, 1] - logits[:, 0]) / 2 + cosines / temperature


def match(logits: np.ndarray, cosines: np.ndarray, temperature: float) -> np.ndarray:
    """ITM's log-odds alone. Arguments as `posterior`."""
    return logits[:, 1] - logits[:, 0]


def lavis(logits: np.ndarray, cosines: np.ndarray, temperature: float) -> np.ndarray:
    """The original's score (compute_sim_matrix): the logit of a match plus the cosine. Arguments as `posterior`."""
    return logits[:, 1] + cosines


# evaluation.rerank_rule
RULES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "posterior": posterior,
    "tempered": tempered,
    "match": match,
    "lavis": lavis,
}


def rerank(found: Found, judgement: np.ndarray) -> Found:
    """The first candidates of each query in another order, before the others.

    Args:
      found: of N queries, K candidates each.
      judgement: float[N, J] of the first J of them; equal ones are in the candidates' order.

    Returns:
      The same candidates, with the judgement as the score of the first J.
    """
    first = judgement.shape[1]
    order = np.lexsort((found.index[:, :first], -judgement))
    again = lambda x: np.take_along_axis(x, order, axis=1)
    index = np.concatenate([again(found.index[:, :first]), found.index[:, first:]], axis=1)
    return Found(np.concatenate([again(judgement), found.scores[:, first:]], axis=1), index)
