"""Caption metrics against the authors' own code (recorded) and against what is plain by hand."""

import json
import pathlib

import pytest

from blip2_jax.evaluation import captioning

GOLDEN = pathlib.Path(__file__).parent.parent / "golden" / "cider.json"


def test_cider_is_the_authors():
    golden = json.loads(GOLDEN.read_text())
    predictions, references = golden["predictions"], golden["references"]
    assert captioning.cider_d(predictions, references) == pytest.approx(golden["score"], rel=1e-9)


def test_a_perfect_match_is_ten_where_all_lengths_of_ngrams_exist():
    texts = ["one two three four five", "six seven eight nine ten"]
    assert captioning.cider_d(texts, [[text] for text in texts]) == pytest.approx(10)


def test_exact_match_looks_at_words():
    score = captioning.exact_match(["Red apple.", "red apples", "cat"], [["red apple"], ["red apple"], ["dog", "cat"]])
    assert score == pytest.approx(2 / 3)


def test_f1_of_shared_words():
    assert captioning.token_f1(["red big apple"], [["red apple"]]) == pytest.approx(2 * 2 / 5)
    assert captioning.token_f1(["x"], [["red apple", "x y"]]) == pytest.approx(2 / 3)
    assert captioning.token_f1([""], [["red apple"]]) == 0


def test_a_reference_for_each_prediction():
    with pytest.raises(ValueError, match="zip"):
        captioning.exact_match(["a", "b"], [["a"]])
