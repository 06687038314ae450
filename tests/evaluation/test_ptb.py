"""Tokens against those that pycocoevalcap found with Java, recorded by make_captions.py, and some by hand."""

import itertools
import json
import lzma
import pathlib

import pytest

from blip2_jax.evaluation import ptb, ptb_characters

CORPUS = pathlib.Path(__file__).parent.parent / "golden" / "captions" / "corpus.jsonl.xz"


@pytest.fixture(scope="module")
def pictures():
    with lzma.open(CORPUS, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def joined(captions):
    return [" ".join(tokens) for tokens in ptb.tokenize(captions)]


def different(captions, recorded):
    return [trio for trio in zip(captions, joined(captions), recorded, strict=True) if trio[1] != trio[2]]


def test_tokens_of_all_predictions(pictures):
    assert len(pictures) == 5000
    recorded = [picture["tokens"][0] for picture in pictures]
    assert different([picture["prediction"] for picture in pictures], recorded) == []


def test_tokens_of_all_references(pictures):
    recorded = [tokens for picture in pictures for tokens in picture["tokens"][1:]]
    assert len(recorded) > 10_000
    assert different([text for picture in pictures for text in picture["references"]], recorded) == []


def test_the_corpus_is_hard(pictures):
    naive = [picture["prediction"].lower().split() for picture in pictures]
    assert sum(" ".join(words) != p["tokens"][0] for words, p in zip(naive, pictures, strict=True)) > 3000
    text = "".join(picture["prediction"] for picture in pictures)
    assert all(character in text for character in "'\"’“…—½€£$@#&<>()[]{}/\\é日😀\u00a0\u00ad"), "not in the corpus"


@pytest.mark.parametrize(
    ("caption", "tokens"),
    [
        ("A cat's toy isn't here.", "a cat 's toy is n't here"),
        ("I cannot; they're gonna", "i can not they 're gon na"),
        ("Mr. Smith (USA) at 5 p.m.", "mr. smith -lrb- usa -rrb- at 5 p.m."),
        ("a man sits.then eats!", "a man sits.then eats"),
        ("“state-of-the-art” £5 café… 😀", "state-of-the-art # 5 café"),
        ("", ""),
        ("?! ... -- '' wait", "?! wait"),
    ],
)
def test_tokens_by_hand(caption, tokens):
    assert joined([caption, "next"]) == [tokens, "next"]


def test_captions_are_lines_of_one_text():
    assert joined(["plan B.", "The dog"])[0] == "plan b"
    assert joined(["plan B.", "the dog"])[0] == "plan b."


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\u000b", "\u000c", "\u0085", "\u2028", "\u2029"])
def test_what_ends_a_line_within_a_caption_is_a_space(end):
    assert joined([f"a{end}b", "c"]) == ["a b", "c"]


def test_no_captions_have_no_tokens():
    assert ptb.tokenize([]) == []


def test_every_character_of_the_basic_plane_is_in_at_most_one_table():
    ranges = sorted(
        (int(low, 16), int(high or low, 16))
        for table in ptb_characters.TABLES
        for low, _, high in (entry.partition("-") for entry in table.split())
    )
    assert all(high < low for (_, high), (low, _) in itertools.pairwise(ranges))
