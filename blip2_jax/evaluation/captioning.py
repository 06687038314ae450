"""Caption metrics: exact match, token F1 and CIDEr-D (arXiv 1411.5726)."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

_LENGTHS = (1, 2, 3, 4)
_SIGMA = 6.0


def tokenize(text: str) -> list[str]:
    """Lower-case words without punctuation."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of predictions that equal a reference, word for word."""
    hits = [any(tokenize(p) == tokenize(r) for r in rs) for p, rs in zip(predictions, references, strict=True)]
    return float(np.mean(hits))


def token_f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F1 of the words shared with the best reference."""

    def f1(prediction: str, reference: str) -> float:
        left, right = Counter(tokenize(prediction)), Counter(tokenize(reference))
        shared = sum((left & right).values())
        return 2 * shared / (sum(left.values()) + sum(right.values())) if shared else 0.0

    return float(np.mean([max(f1(p, r) for r in rs) for p, rs in zip(predictions, references, strict=True)]))


def _ngrams(words: Sequence[str]) -> Counter:
    return Counter(tuple(words[i : i + n]) for n in _LENGTHS for i in range(len(words) - n + 1))


def cider_d(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D: tf-idf similarity of n-grams up to 4, clipped, with a penalty on other lengths; 10 is a perfect match.

    The document frequencies come from the references given, so scores of different sets do not compare, and that of a
    single picture is 0.
    """
    reference_grams = [[_ngrams(tokenize(r)) for r in rs] for rs in references]
    documents: dict[tuple[str, ...], int] = defaultdict(int)
    for grams in reference_grams:
        for gram in set().union(*grams):
            documents[gram] += 1
    log_count = np.log(len(references))

    def vector(grams: Counter) -> tuple[list[dict], list[float], int]:
        weights: list[dict] = [{} for _ in _LENGTHS]
        for gram, frequency in grams.items():
            weights[len(gram) - 1][gram] = frequency * (log_count - np.log(max(1, documents.get(gram, 0))))
        norms = [float(np.sqrt(sum(w * w for w in ws.values()))) for ws in weights]
        # The length is counted in bigrams, as in the authors' code.
        return weights, norms, sum(frequency for gram, frequency in grams.items() if len(gram) == 2)

    scores = []
    for prediction, grams in zip(predictions, reference_grams, strict=True):
        weights, norms, length = vector(_ngrams(tokenize(prediction)))
        total = np.zeros(len(_LENGTHS))
        for reference in grams:
            r_weights, r_norms, r_length = vector(reference)
            penalty = np.exp(-((length - r_length) ** 2) / (2 * _SIGMA**2))
            for n in range(len(_LENGTHS)):
                overlap = sum(
                    min(w, r_weights[n].get(g, 0.0)) * r_weights[n].get(g, 0.0) for g, w in weights[n].items()
                )
                if norms[n] and r_norms[n]:
                    total[n] += overlap / (norms[n] * r_norms[n]) * penalty
        scores.append(10 * total.mean() / len(grams))
    return float(np.mean(scores))


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """All metrics of this file."""
    return {
        "cider": cider_d(predictions, references),
        "exact_match": exact_match(predictions, references),
        "token_f1": token_f1(predictions, references),
    }
