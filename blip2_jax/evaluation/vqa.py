"""Accuracy of answers to questions about images: VQAv2 and OK-VQA, with ten answers to each, and GQA, with one.

An answer is right by a third for each person who gave it, at most wholly, averaged over leaving out one of the ten.
What counts as the same answer differs from scorer to scorer, so every result names its scorer:

- `official`, the one of visualqa.org since March 2021: where the ten disagree all answers are normalised, where they
  agree none is.
- `lavis`, the one of 2015, with which BLIP-2's figures were computed: the prediction is always normalised, the ten
  lose their punctuation where they disagree.
- `lmms_eval`: all are always normalised.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np

VERSION = "1, as visualqa.org's of March 2021, LAVIS 506965b and lmms-eval 0.7"

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"},
    **{"seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_ARTICLES = frozenset(("a", "an", "the"))
# Each is what becomes of it with one of its apostrophes left out.
_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_COMPLETED = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTIONS.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # The wrong way round, there too.
# The scorers mean to spare a full stop behind a digit as well, but their pattern does not.
_FULL_STOP = re.compile(r"\.(?!\d)")
# They pass re.UNICODE where re.sub takes how often to replace.
_MOST_FULL_STOPS = 32


def without_punctuation(answer: str) -> str:
    """The first half of a normalisation: signs become spaces, or nothing where one stands beside a space.

    They also become nothing, all of them, in an answer with a comma between digits.
    """
    number = re.search(r"\d,\d", answer)
    result = answer
    for sign in _SIGNS:
        beside_space = f"{sign} " in answer or f" {sign}" in answer
        result = result.replace(sign, "" if beside_space or number else " ")
    return _FULL_STOP.sub("", result, count=_MOST_FULL_STOPS)


def plain_words(answer: str) -> str:
    """The second half: lower case, numbers up to ten as digits, no articles, apostrophes in contractions."""
    words = (_NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(_COMPLETED.get(word, word) for word in words if word not in _ARTICLES)


def normalised(answer: str) -> str:
    """Both halves."""
    return plain_words(without_punctuation(answer))


def _trimmed(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _official(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    prediction, answers = _trimmed(prediction), [_trimmed(answer) for answer in answers]
    if len(set(answers)) == 1:
        return prediction, answers
    return normalised(prediction), [normalised(answer) for answer in answers]


def _lavis(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    if len(set(answers)) > 1:
        answers = [without_punctuation(answer) for answer in answers]
    return normalised(_trimmed(prediction)), list(answers)


def _lmms_eval(prediction: str, answers: Sequence[str]) -> tuple[str, list[str]]:
    return normalised(_trimmed(prediction)), [normalised(_trimmed(answer)) for answer in answers]


# By the name of the scorer what it compares.
SCORERS: dict[str, Callable[[str, Sequence[str]], tuple[str, list[str]]]] = {
    "official": _official,
    "lavis": _lavis,
    "lmms_eval": _lmms_eval,
}


def answer_accuracy(prediction: str, answers: Sequence[str], scorer: str = "official") -> float:
    """How right one answer is, 0 to 1.

    Args:
      prediction: what was answered.
      answers: what people answered, each as often as it was given; VQAv2 has ten.
      scorer: a key of `SCORERS`.

    Raises:
      ValueError: there are fewer than two answers, of which none can be left out.
    """
    if len(answers) < 2:
        raise ValueError(f"the answer {prediction!r} is to be compared with {answers!r}: expected two answers or more")
    predicted, known = SCORERS[scorer](prediction, answers)
    same = sum(answer == predicted for answer in known)
    # The person left out is one of those who agree, or one of the others.
    leaving_one_out = same * min(1, (same - 1) / 3) + (len(known) - same) * min(1, same / 3)
    return leaving_one_out / len(known)


def accuracy(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    *,
    question_types: Sequence[str] | None = None,
    answer_types: Sequence[str] | None = None,
    lemmatize: Callable[[str], str] | None = None,
) -> dict:
    """Mean accuracy by every scorer, and by type of question and of answer.

    Args:
      predictions: an answer to each question.
      answers: for each question what people answered, each as often as it was given.
      question_types: of each question, such as "what color is the".
      answer_types: of each question: "yes/no", "number" or "other".
      lemmatize: applied to predictions first, as for OK-VQA, whose answers are lemmas: `lemmatizer()`.

    Returns:
      {"accuracy_official": 0 to 1, "accuracy_lavis": ..., "accuracy_lmms_eval": ...}, with "questions", their number,
      and of each type given the same, as {"by_question_type": {type: ...}, "by_answer_type": {type: ...}}.

    Raises:
      ValueError: there are no questions, there is not one of everything for each, or too few answers to one.
    """
    count = len(predictions)
    given = {"answers": answers, "question types": question_types, "answer types": answer_types}
    for name, values in given.items():
        if values is not None and (not count or len(values) != count):
            raise ValueError(
                f"{count} predictions and {len(values)} {name}: expected one for each question, at least one"
            )
    if lemmatize:
        predictions = [lemmatize(prediction) for prediction in predictions]
    scores = np.array(
        [
            [answer_accuracy(prediction, known, scorer) for scorer in SCORERS]
            for prediction, known in zip(predictions, answers, strict=True)
        ]
    )

    def means(rows: Sequence[int]) -> dict:
        columns = scores[rows].mean(0)
        found = {f"accuracy_{name}": float(value) for name, value in zip(SCORERS, columns, strict=True)}
        return found | {"questions": len(rows)}

    result = means(range(count))
    for name, types in (("by_question_type", question_types), ("by_answer_type", answer_types)):
        if types is not None:
            members: Mapping[str, list[int]] = defaultdict(list)
            for index, kind in enumerate(types):
                members[kind].append(index)
            result[name] = {kind: means(members[kind]) for kind in sorted(members)}
    return result


def answers_given(answers: Sequence[str], weights: Sequence[float], asked: int = 10) -> list[str]:
    """Answers as often as they were given, of a record of `vqa:` sources, which has each once and its share.

    Args:
      answers: each once.
      weights: the share of those asked who gave each.
      asked: how many were asked.

    Raises:
      ValueError: the shares are not those of so many.
    """
    counts = [round(weight * asked) for weight in weights]
    if sum(counts) != asked or any(abs(weight * asked - n) > 1e-6 for weight, n in zip(weights, counts, strict=True)):
        raise ValueError(f"answers {list(answers)} with shares {list(weights)} are not the answers of {asked} people")
    return [answer for answer, count in zip(answers, counts, strict=True) for _ in range(count)]


def gqa_accuracy(predictions: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Share of GQA's questions that are answered right, by who compares.

    Args:
      predictions: an answer to each question.
      answers: the answer to each question.

    Returns:
      "accuracy": both normalised. "accuracy_official": equal as they are, as GQA's own script has it. "accuracy_lavis":
      the prediction alone normalised, so that "t-shirt" is never right.

    Raises:
      ValueError: there are no questions, or not an answer for each.
    """
    if not predictions or len(predictions) != len(answers):
        raise ValueError(f"{len(predictions)} predictions and {len(answers)} answers: expected one each, at least one")
    both = list(zip(predictions, answers, strict=True))
    return {
        "accuracy": float(np.mean([normalised(prediction) == normalised(answer) for prediction, answer in both])),
        "accuracy_official": float(np.mean([prediction == answer for prediction, answer in both])),
        "accuracy_lavis": float(np.mean([normalised(prediction) == answer for prediction, answer in both])),
    }


def lemmatizer() -> Callable[[str], str]:
    """What OK-VQA's answers went through: "riding horses" -> "ride horse".

    By lemminflect's dictionary, that of the NIH's SPECIALIST lexicon. LAVIS asks spaCy's en_core_web_sm for the parts
    of speech, which is downloaded, and takes lemmas of nouns and verbs. Here a word that may be a noun is taken for
    one, then one that may be an adjective or adverb is left as it is, then come verbs; what the dictionary does not
    have is left. So "left", "building" and "better" stay here, and what they become there depends on the words around.
    To have exactly LAVIS's, pass `accuracy` a function that asks spaCy.

    Raises:
      ImportError: lemminflect is not installed.
    """
    try:
        import lemminflect
    except ImportError as error:
        raise ImportError("lemmas need lemminflect: pip install 'blip2_jax[okvqa]'") from error

    def lemma(word: str) -> str:
        known = lemminflect.getAllLemmas(word)
        for part in ("NOUN", "ADJ", "ADV", "AUX", "VERB"):
            if part in known:
                return known[part][0] if part in ("NOUN", "AUX", "VERB") else word
        return word

    return lambda answer: " ".join(map(lemma, answer.split()))
