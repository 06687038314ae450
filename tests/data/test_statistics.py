"""Counts that add up, and what is said of them."""

from collections import Counter

import numpy as np
import pytest

from blip2_jax.data import statistics
from blip2_jax.data.statistics import Statistics


def record(*captions, size=10, **more):
    return {"key": "k", "image": bytes(size), "captions": list(captions)} | more


def counted(*records):
    found = Statistics()
    for one in records:
        found.add(one, (200, 100), "JPEG")
    return found


def test_words_keep_their_apostrophes_hyphens_and_letters():
    assert statistics.words("The cat's half-open Äuge: 3 Ёлки, don’t!") == [
        "the",
        "cat's",
        "half-open",
        "äuge",
        "3",
        "ёлки",
        "don’t",
    ]


def test_quantiles_are_those_of_the_values(rng):
    values = rng.integers(0, 50, 1001)
    for share in (0, 0.05, 0.5, 0.95, 1):
        expected = np.quantile(values, share, method="inverted_cdf")
        assert statistics.quantile(Counter(values.tolist()), share) == expected
    with pytest.raises(ValueError, match="nothing"):
        statistics.quantile(Counter(), 0.5)


def test_parts_add_up_to_the_whole_also_through_their_files():
    records = [record("a cat", "a dog"), record("two dogs", size=30), record(question="what?", captions=[])]
    whole, parts = counted(*records), Statistics()
    for part in (counted(records[0]), counted(*records[1:])):
        parts.update(Statistics.from_json(part.to_json()))
    assert parts == whole
    assert (whole.records, whole.captions, whole.questions, whole.image_bytes) == (3, 3, 1, 50)
    assert whole.captions_an_image == {2: 1, 1: 1, 0: 1}
    assert whole.words == {"a": 2, "cat": 1, "dog": 1, "two": 1, "dogs": 1}


def test_of_a_large_vocabulary_the_most_frequent_words_are_kept():
    words = " ".join(f"w{number}" for number in range(10_010))
    kept = Statistics.from_json(counted(record(words, "w10009 w10008")).to_json())
    assert len(kept.words) == 10_000
    assert (kept.words["w10009"], kept.words["w10008"]) == (2, 2)
    assert kept.vocabularies_cut == 1
    assert "most frequent words (of 1 shards only" in statistics.table(kept)


def test_the_summary_says_what_was_counted():
    found = counted(record("a cat"), record("a dog of mine"))
    found.rejected.update({"unreadable": 1, "truncated": 3})
    summary = statistics.summary(found)
    assert summary["quantiles"]["shorter_side"] == dict.fromkeys(summary["quantiles"]["shorter_side"], 100)
    assert summary["quantiles"]["aspect"]["median"] == 2.0
    assert (summary["quantiles"]["words_a_caption"]["min"], summary["quantiles"]["words_a_caption"]["max"]) == (2, 4)
    assert summary["most_frequent_words"][0] == ("a", 2)
    assert list(summary["rejected"]) == ["truncated", "unreadable"]
    table = statistics.table(found)
    assert "truncated 3, unreadable 1" in table
    assert "questions" not in table
    assert max(map(len, table.splitlines())) <= 100


def test_of_nothing_there_is_little_to_say():
    assert "records                 0" in statistics.table(Statistics())
