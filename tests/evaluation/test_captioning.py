"""Caption metrics against pycocoevalcap's (recorded by make_captions.py) and against what is plain by hand."""

import json
import lzma
import pathlib

import pytest

from blip2_jax.evaluation import captioning, java_captioning
from tests.evaluation import make_captions

GOLDEN = pathlib.Path(__file__).parent.parent / "golden"
RECORDED = json.loads((GOLDEN / "captions" / "scores.json").read_text())


@pytest.fixture(scope="module")
def pictures():
    with lzma.open(GOLDEN / "captions" / "corpus.jsonl.xz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def scores(pictures):
    """Of each subset, the whole from its texts, the others from the tokens of the whole."""
    texts = [p["prediction"] for p in pictures], [p["references"] for p in pictures]
    found = {"all": captioning.score(*texts)}
    tokens = [[text.split(" ") if text else [] for text in p["tokens"]] for p in pictures]
    for name, (first, last) in make_captions.SUBSETS.items():
        if name not in found:
            subset = [own for own, *_ in tokens[first:last]], [others for _, *others in tokens[first:last]]
            bleu = {f"bleu_{n}": value for n, value in enumerate(captioning.bleu(*subset), 1)}
            found[name] = bleu | {"rouge_l": captioning.rouge_l(*subset), "cider": captioning.cider_d(*subset)}
    return found


@pytest.mark.parametrize("subset", make_captions.SUBSETS)
def test_scores_are_those_of_pycocoevalcap(scores, subset):
    recorded = RECORDED[subset]
    assert set(recorded) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider"}
    assert {name: scores[subset][name] for name in recorded} == pytest.approx(recorded, rel=1e-10, abs=1e-10)


def test_cider_depends_on_the_references_given(scores):
    assert scores["first"]["cider"] == 0  # Of one picture no word tells anything.
    assert len({scores[name]["cider"] for name in ("all", "hundred", "thousand")}) == 3


def test_a_perfect_match():
    texts = ["one two three four five", "six seven eight nine ten"]
    scores = captioning.score(texts, [[text] for text in texts])
    assert scores.pop("cider") == pytest.approx(10)
    assert scores == pytest.approx(dict.fromkeys(scores, 1.0))


def test_bleu_by_hand():
    # Two of three words, one of two pairs; the nearer reference is as long as the caption.
    tokens = captioning.tokens(["a red dog"], [["a red cat", "a red cat on a very long mat"]])
    assert captioning.bleu(*tokens)[:2] == pytest.approx([2 / 3, (2 / 3 * 1 / 2) ** 0.5])


def test_rouge_by_hand():
    tokens = captioning.tokens(["a c b"], [["a b c d"]])
    precision, recall = 2 / 3, 2 / 4
    assert captioning.rouge_l(*tokens) == pytest.approx(2.44 * precision * recall / (recall + 1.44 * precision))


def test_empty_captions():
    scores = captioning.score(["", "a cat", ""], [["a dog"], [""], ["", "x"]])
    assert scores["rouge_l"] == pytest.approx(1 / 3)  # As there, an empty caption equals an empty reference.
    assert scores["exact_match"] == pytest.approx(1 / 3)
    assert scores["token_f1"] == 0


def test_exact_match_looks_at_tokens():
    tokens = captioning.tokens(["Red apple.", "red apples", "cat"], [["red apple"], ["red apple"], ["dog", "cat"]])
    assert captioning.exact_match(*tokens) == pytest.approx(2 / 3)


def test_f1_of_shared_tokens():
    f1 = lambda prediction, references: captioning.token_f1(*captioning.tokens([prediction], [references]))
    assert f1("red big apple", ["red apple"]) == pytest.approx(2 * 2 / 5)
    assert f1("x", ["red apple", "x y"]) == pytest.approx(2 / 3)
    assert f1("", ["red apple"]) == 0


def test_groups_are_scored_alone_and_together(pictures):
    chosen = pictures[:60]
    predictions, references = [p["prediction"] for p in chosen], [p["references"] for p in chosen]
    domains = ["in-domain", "near-domain", "out-domain"] * 20
    found = captioning.score_groups(predictions, references, domains)
    assert list(found) == ["overall", "in-domain", "near-domain", "out-domain"]
    assert found["overall"] == captioning.score(predictions, references)
    assert found["near-domain"] == captioning.score(predictions[1::3], references[1::3])


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["a", "b"], [["a"]], "2 predictions, 1 sets of references"),
        ([], [], "0 predictions"),
        (["a", "b"], [["a"], []], "prediction 1 of 2 has no references"),
    ],
)
def test_what_cannot_be_scored(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        captioning.score(predictions, references)


@pytest.mark.parametrize(
    ("groups", "message"), [(["a"], "groups for 1"), (["a", "overall"], "picture 1 is of the group 'overall'")]
)
def test_groups_that_are_none(groups, message):
    with pytest.raises(ValueError, match=message):
        captioning.score_groups(["a", "b"], [["a"], ["b"]], groups)


def test_what_needs_java_is_named_absent(monkeypatch, tmp_path):
    monkeypatch.setattr(java_captioning, "_package", lambda: None)
    scores, absent = java_captioning.score(["a cat"], [["a dog"]])
    assert scores == {} and set(absent) == {"meteor", "spice"}
    assert all("pip install" in reason for reason in absent.values())
    monkeypatch.setattr(java_captioning, "_package", lambda: tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert set(java_captioning.absent()) == {"meteor", "spice"}
    (tmp_path / "java").touch(mode=0o755)
    assert set(java_captioning.absent()) == {"spice"}
    assert "get_stanford_models" in java_captioning.absent()["spice"]


def test_what_java_fails_at_is_named_absent(monkeypatch):
    def broken(right, candidates):
        raise BrokenPipeError("the program has ended")

    monkeypatch.setattr(java_captioning, "absent", dict)
    monkeypatch.setattr(java_captioning, "_meteor", broken)
    monkeypatch.setattr(java_captioning, "_spice", lambda right, candidates: len(candidates) / 4)
    scores, absent = java_captioning.score(["a cat"], [["a dog"]])
    assert scores == {"spice": 0.25}
    assert set(absent) == {"meteor"} and "the program has ended" in absent["meteor"]
