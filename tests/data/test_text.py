"""Captions to tokens."""

import math

import pytest

from blip2_jax.data.text import CaptionTokenizer, LanguageTokenizer, clean_caption, log_frequencies, pad
from tests import tiny


@pytest.fixture(scope="module")
def caption(tmp_path_factory):
    return CaptionTokenizer(tiny.bert(tmp_path_factory.mktemp("text") / "bert"))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny.llama(tmp_path_factory.mktemp("text") / "llama")


def test_cleaning():
    assert clean_caption('  A "Red" apple (big)!  ') == "a red apple big"
    assert clean_caption("A Red", lower_case=False) == "A Red"
    assert clean_caption("it's well-known, isn't it?") == "it's well-known, isn't it?"
    assert len(clean_caption("word " * 80).split()) == 50


def test_wordpiece_rows(caption):
    ids, mask = caption(["a red square", "a"], 6)
    assert ids.tolist() == [[2, 5, 7, 13, 3, 0], [2, 5, 3, 0, 0, 0]]
    assert mask.sum(1).tolist() == [5, 3]
    assert caption.decoder_start == 16


def test_a_long_text_keeps_its_separator(caption):
    ids, mask = caption(["a red square of a blue circle"], 4)
    assert ids.tolist() == [[2, 5, 7, 3]]
    assert mask.all()


def test_frequencies_are_smoothed_shares(caption):
    ids, mask = caption(["a red square", "a"], 6)
    prior = log_frequencies(ids[:, 1:], mask[:, 1:], 17)
    shares = {5: 3, 3: 3, 7: 2, 13: 2, 2: 1, 0: 1}
    for token, count in shares.items():
        assert prior[token] == pytest.approx(math.log(count / (6 + 17)))


def test_language_rows(llama):
    tokenizer = LanguageTokenizer(llama)
    assert (tokenizer.begin, tokenizer.end) == ([], 2)
    assert LanguageTokenizer(llama, begin="<|endoftext|>").begin == [0]
    ids = tokenizer.encode_target(" a red square", 12)
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == " a red square"
    assert tokenizer.encode_target(" a red square" * 9, 5) == [*tokenizer.encode(" a red square" * 9)[:4], 2]


def test_another_end(llama):
    tokenizer = LanguageTokenizer(llama, end="\n")
    assert tokenizer.encode("\n") == [tokenizer.end]
    assert tokenizer.decode([*tokenizer.encode(" a red"), tokenizer.end, *tokenizer.encode(" blue")]) == " a red"
    with pytest.raises(ValueError, match="it must be one"):
        LanguageTokenizer(llama, end="zq")


def test_a_prompt_is_never_cut(llama):
    with pytest.raises(ValueError, match="shorten it"):
        LanguageTokenizer(llama).prompts(["short", "a rather longer prompt"], 4)


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        CaptionTokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"no \[SEP\]"):
        CaptionTokenizer(tiny.llama(tmp_path / "llama"))


def test_padding():
    ids, mask = pad([[1, 2], []], 3, 9)
    assert ids.tolist() == [[1, 2, 9], [9, 9, 9]]
    assert mask.tolist() == [[True, True, False], [False, False, False]]
