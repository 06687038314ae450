"""VQA accuracy: where the scorers differ, their normalisations, GQA, and lemmas."""

import pytest

from blip2_jax.evaluation import vqa


def scored(prediction, answers):
    return {name: round(100 * vqa.answer_accuracy(prediction, answers, name), 2) for name in vqa.SCORERS}


@pytest.mark.parametrize(
    ("answers", "prediction", "lavis", "official", "lmms_eval"),
    [
        # Measured with the scorers themselves.
        (["the beach"] * 10, "the beach", 0, 100, 100),
        (["two"] * 9 + ["dog"], "two", 0, 100, 100),
        (["2"] * 10, "two", 100, 0, 100),
        (["Yes"] * 10, "Yes", 0, 100, 100),
        # All agree: nothing is normalised by the official one, not even what people wrote.
        (["yes"] * 10, "Yes", 100, 0, 100),
        (["t-shirt"] * 10, "t-shirt", 0, 100, 100),
        (["t-shirt"] * 9 + ["shirt"], "t shirt", 100, 100, 100),
        (["yes"] * 10, " yes\n", 100, 100, 100),
        # A contraction is completed on one side or on both.
        (["dont walk"] * 5 + ["don't walk"] * 5, "don't walk", 100, 100, 100),
        (["dont walk"] * 9 + ["stop"], "dont walk", 0, 100, 100),
    ],
)
def test_where_the_scorers_differ(answers, prediction, lavis, official, lmms_eval):
    assert scored(prediction, answers) == {"official": official, "lavis": lavis, "lmms_eval": lmms_eval}


@pytest.mark.parametrize(("same", "expected"), [(0, 0), (1, 30), (2, 60), (3, 90), (4, 100), (10, 100)])
def test_accuracy_is_the_mean_over_leaving_one_out(same, expected):
    answers = ["red"] * same + [f"other{i}" for i in range(10 - same)]
    assert set(scored("red", answers).values()) == {expected}
    brute = []
    for left_out in range(10):
        others = answers[:left_out] + answers[left_out + 1 :]
        brute.append(min(1, others.count("red") / 3))
    assert vqa.answer_accuracy("red", answers) == pytest.approx(sum(brute) / 10)


@pytest.mark.parametrize(
    ("answer", "without_punctuation", "normalised"),
    [
        ("red/white", "red white", "red white"),
        ("red / white", "red  white", "red white"),
        ("red, white", "red white", "red white"),
        ("1,000", "1000", "1000"),
        ("1,000 t-shirts", "1000 tshirts", "1000 tshirts"),
        ("3.5", "3.5", "3.5"),
        ("5.", "5", "5"),
        ("U.S.", "US", "us"),
        ("p.m. 5", "pm 5", "pm 5"),
        ("the Two dogs, a cat & an owl!", "the Two dogs a cat & an owl ", "2 dogs cat & owl"),
        ("none", "none", "0"),
        ("Dont", "Dont", "don't"),
        ("itd've been", "itd've been", "it'd've been"),
        ("somebody'd", "somebody'd", "somebodyd"),
        ("im", "im", "im"),  # "Im" is in their table, but words are lower case by then.
        ("it's: here", "it's: here", "it's: here"),  # Neither a colon nor an apostrophe is taken out.
        ("a" + "." * 40, "a" + "." * 8, "a" + "." * 8),  # Only 32 full stops are.
    ],
)
def test_normalisation(answer, without_punctuation, normalised):
    assert vqa.without_punctuation(answer) == without_punctuation
    assert vqa.normalised(answer) == normalised


def test_accuracy_by_type():
    answers = [["yes"] * 10, ["no"] * 10, ["2"] * 9 + ["3"], ["red"] * 2 + [f"x{i}" for i in range(8)]]
    found = vqa.accuracy(
        ["yes", "yes", "2", "red"],
        answers,
        question_types=["is the", "is the", "how many", "what color"],
        answer_types=["yes/no", "yes/no", "number", "other"],
    )
    assert found["accuracy_official"] == found["accuracy_lavis"] == pytest.approx((1 + 0 + 1 + 0.6) / 4)
    assert found["questions"] == 4
    assert list(found["by_answer_type"]) == ["number", "other", "yes/no"]
    assert found["by_answer_type"]["yes/no"]["accuracy_official"] == 0.5
    assert found["by_answer_type"]["other"] == pytest.approx(
        {"accuracy_official": 0.6, "accuracy_lavis": 0.6, "accuracy_lmms_eval": 0.6, "questions": 1}
    )
    assert found["by_question_type"]["is the"]["questions"] == 2
    assert "by_answer_type" not in vqa.accuracy(["yes"], [["yes"] * 10])


def test_lemmas_are_those_of_predictions():
    answers = [["ride horse"] * 9 + ["ski"]]
    lemmas = {"riding horses": "ride horse"}
    assert vqa.accuracy(["riding horses"], answers)["accuracy_official"] == 0
    assert vqa.accuracy(["riding horses"], answers, lemmatize=lemmas.get)["accuracy_official"] == 1


def test_lemmatizer():
    pytest.importorskip("lemminflect", reason="an extra: pip install 'blip2_jax[okvqa]'")
    lemmatize = vqa.lemmatizer()
    found = {text: lemmatize(text) for text in ("riding horses", "women", "playing frisbee", "hot dogs", "left", "red")}
    assert list(found.values()) == ["ride horse", "woman", "play frisbee", "hot dog", "left", "red"]


def test_without_lemminflect_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lemminflect", None)
    with pytest.raises(ImportError, match=r"blip2_jax\[okvqa\]"):
        vqa.lemmatizer()


def test_answers_as_often_as_they_were_given():
    assert vqa.answers_given(["a", "b"], [0.3, 0.7]) == ["a"] * 3 + ["b"] * 7
    assert vqa.answers_given(["a", "b", "c"], [1 / 3] * 3, asked=3) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="10 people"):
        vqa.answers_given(["a", "b"], [0.25, 0.75])


def test_gqa():
    found = vqa.gqa_accuracy(["Yes.", "the t-shirt", "t-shirt", "red"], ["yes", "t-shirt", "t-shirt", "blue"])
    assert found == {"accuracy": 0.75, "accuracy_official": 0.25, "accuracy_lavis": 0.25}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: vqa.accuracy([], []), "0 predictions"),
        (lambda: vqa.accuracy(["a"], [["a"] * 10] * 2), "1 predictions and 2 answers"),
        (lambda: vqa.accuracy(["a"], [["a"] * 10], answer_types=[]), "0 answer types"),
        (lambda: vqa.accuracy(["a"], [["a"]]), "expected two answers or more"),
        (lambda: vqa.gqa_accuracy(["a"], []), "1 predictions and 0 answers"),
    ],
)
def test_what_cannot_be_scored(call, message):
    with pytest.raises(ValueError, match=message):
        call()
