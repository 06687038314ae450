"""Caption metrics on Penn Treebank tokens: BLEU, ROUGE-L, CIDEr-D, exact match and token F1.

BLEU (Papineni et al. 2002), ROUGE-L (Lin 2004) and CIDEr-D (arXiv 1411.5726) equal pycocoevalcap's, with which captions
are scored in the literature, in every digit that it prints. METEOR and SPICE are in `java_captioning`.

`tokens` makes of texts what the metrics take: T tokens of each of N predictions, and of each of the references of each.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from blip2_jax.evaluation import ptb

VERSION = "1, as pycocoevalcap 1.2"

Tokens = Sequence[str]
Metric = Callable[[Sequence[Tokens], Sequence[Sequence[Tokens]]], float]

_LENGTHS = (1, 2, 3, 4)
_SIGMA = 6.0  # Of CIDEr-D's penalty, in bigrams.
_BETA = 1.2  # How much recall outweighs precision in ROUGE-L.
# What keeps BLEU from dividing by 0; a caption too short to have an n-gram gets nearly 0.
_SMALL, _TINY = 1e-9, 1e-15


def tokens(
    predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[list[list[str]], list[list[list[str]]]]:
    """Tokens of the predictions and of their references.

    Raises:
      ValueError: there are no predictions, their number is not that of the sets of references, or one has none.
    """
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"captions cannot be scored: {len(predictions)} predictions, {len(references)} sets of references; "
            "expected as many of the one as of the other, and at least one"
        )
    without = [index for index, texts in enumerate(references) if not texts]
    if without:
        raise ValueError(f"captions cannot be scored: prediction {without[0]} of {len(predictions)} has no references")
    flat = iter(ptb.tokenize([text for texts in references for text in texts]))
    return ptb.tokenize(predictions), [[next(flat) for _ in texts] for texts in references]


def exact_match(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Share of predictions that equal a reference, token for token."""
    return float(np.mean([any(p == r for r in rs) for p, rs in zip(predictions, references, strict=True)]))


def token_f1(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Mean F1 of the tokens shared with the best reference."""

    def f1(prediction: Tokens, reference: Tokens) -> float:
        shared = sum((Counter(prediction) & Counter(reference)).values())
        return 2 * shared / (len(prediction) + len(reference)) if shared else 0.0

    return float(np.mean([max(f1(p, r) for r in rs) for p, rs in zip(predictions, references, strict=True)]))


def _ngrams(caption: Tokens) -> Counter:
    """How often each n-gram occurs. A token with a space in it, such as "1 1/2", is several words here, as there."""
    words = " ".join(caption).split()
    return Counter(tuple(words[i : i + n]) for n in _LENGTHS for i in range(len(words) - n + 1))


def _words(ngrams: Counter) -> int:
    return sum(count for gram, count in ngrams.items() if len(gram) == 1)


def bleu(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """BLEU-1 to BLEU-4 of the corpus, each 0 to 1: clipped n-gram precisions, and a penalty on brevity.

    A caption's reference length is that of the reference nearest in length, the shorter one of two.
    """
    matched, proposed = np.zeros(len(_LENGTHS)), np.zeros(len(_LENGTHS))
    length = reference_length = 0
    for prediction, texts in zip(predictions, references, strict=True):
        ngrams, known = _ngrams(prediction), [_ngrams(text) for text in texts]
        words = _words(ngrams)
        length += words
        reference_length += min((abs(_words(counts) - words), _words(counts)) for counts in known)[1]
        for n in _LENGTHS:
            proposed[n - 1] += max(0, words - n + 1)
        for gram, count in ngrams.items():
            matched[len(gram) - 1] += min(count, max(counts[gram] for counts in known))
    precisions = (matched + _TINY) / (proposed + _SMALL)
    ratio = (length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    return [float(np.prod(precisions[:n]) ** (1 / n) * brevity) for n in _LENGTHS]


def _common_subsequence(left: Tokens, right: Tokens) -> int:
    """Length of the longest common subsequence."""
    lengths = [0] * (len(right) + 1)
    for token in left:
        diagonal = 0
        for place, other in enumerate(right, 1):
            diagonal, above = lengths[place], diagonal
            lengths[place] = above + 1 if token == other else max(lengths[place - 1], lengths[place])
    return lengths[-1]


def rouge_l(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """Mean F of the longest common subsequence, 0 to 1, of the best precision and the best recall of any reference.

    An empty caption counts as one empty token, as there: it is right where a reference is empty.
    """
    scores = []
    for prediction, texts in zip(predictions, references, strict=True):
        prediction, texts = prediction or [""], [text or [""] for text in texts]
        common = [_common_subsequence(prediction, text) for text in texts]
        precision = max(common) / len(prediction)
        recall = max(length / len(text) for length, text in zip(common, texts, strict=True))
        both = (1 + _BETA**2) * precision * recall
        scores.append(both / (recall + _BETA**2 * precision) if both else 0.0)
    return float(np.mean(scores))


def cider_d(predictions: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> float:
    """CIDEr-D: tf-idf similarity of n-grams up to 4, clipped, with a penalty on other lengths; 10 is a perfect match.

    The document frequencies come from the references given. So scores of different sets do not compare, not even that
    of a published subset with that of the whole, and the score of a single picture is 0.
    """
    reference_grams = [[_ngrams(text) for text in texts] for texts in references]
    documents: dict[tuple[str, ...], int] = defaultdict(int)
    for grams in reference_grams:
        for gram in set().union(*grams):
            documents[gram] += 1
    log_count = np.log(len(references))

    def vector(grams: Counter) -> tuple[list[dict], list[float], int]:
        weights: list[dict] = [{} for _ in _LENGTHS]
        for gram, frequency in grams.items():
            weights[len(gram) - 1][gram] = frequency * (log_count - math.log(max(1, documents.get(gram, 0))))
        norms = [math.sqrt(sum(w * w for w in ws.values())) for ws in weights]
        # The length is counted in bigrams, as in the authors' code.
        return weights, norms, sum(frequency for gram, frequency in grams.items() if len(gram) == 2)

    scores = []
    for prediction, grams in zip(predictions, reference_grams, strict=True):
        weights, norms, length = vector(_ngrams(prediction))
        total = 0.0
        for reference in grams:
            r_weights, r_norms, r_length = vector(reference)
            penalty = math.exp(-((length - r_length) ** 2) / (2 * _SIGMA**2))
            for n in range(len(_LENGTHS)):
                there = r_weights[n]
                overlap = sum(min(w, there[g]) * there[g] for g, w in weights[n].items() if g in there)
                if norms[n] and r_norms[n]:
                    total += overlap / (norms[n] * r_norms[n]) * penalty
        scores.append(10 * total / len(_LENGTHS) / len(grams))
    return float(np.mean(scores))


_METRICS: dict[str, Metric] = {
    "rouge_l": rouge_l,
    "cider": cider_d,
    "exact_match": exact_match,
    "token_f1": token_f1,
}


def score(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """All metrics of this file, by name: bleu_1 to bleu_4, rouge_l, cider (0 to 10), exact_match and token_f1.

    Args:
      predictions: a caption for each picture.
      references: for each picture all that is right.

    Raises:
      ValueError: as `tokens`.
    """
    tokenised = tokens(predictions, references)
    scores = {f"bleu_{n}": value for n, value in zip(_LENGTHS, bleu(*tokenised), strict=True)}
    return scores | {name: metric(*tokenised) for name, metric in _METRICS.items()}


def score_groups(
    predictions: Sequence[str], references: Sequence[Sequence[str]], groups: Sequence[str]
) -> dict[str, dict[str, float]]:
    """`score` of all together, as "overall", and of each group alone, such as NoCaps' domains.

    A group's CIDEr-D takes its document frequencies from the references of that group alone.

    Args:
      predictions: a caption for each picture.
      references: for each picture all that is right.
      groups: the group of each picture, such as "in-domain", "near-domain" or "out-domain".

    Raises:
      ValueError: as `tokens`, or a picture is without a group, or a group is called "overall".
    """
    if len(groups) != len(predictions):
        raise ValueError(f"{len(predictions)} predictions, but groups for {len(groups)}: expected one for each")
    if "overall" in groups:
        raise ValueError(f"picture {groups.index('overall')} is of the group 'overall', which is the name of all")
    members: Mapping[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    result = {"overall": score(predictions, references)}
    for group in sorted(members):
        chosen = members[group]
        result[group] = score([predictions[i] for i in chosen], [references[i] for i in chosen])
    return result
