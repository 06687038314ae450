"""Captions to tokens."""

import json
import math

import numpy as np
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


def test_a_written_caption_ends_at_its_separator(caption):
    assert caption.decode(np.asarray([5, 7, 13, caption.end, 9, 9])) == "a red square"
    assert caption.decode([5, caption.decoder_start, 7]) == "a red"
    assert caption.decode([caption.end]) == ""


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
    ids = tokenizer.encode_target("a red square", 12)  # A space before the first word is its own affair.
    assert ids[-1] == 2
    assert tokenizer.decode(ids) == " a red square"
    assert tokenizer.encode_target("a red square" * 9, 5) == [*tokenizer.encode(" a red square" * 9)[:4], 2]


def test_another_end(llama):
    tokenizer = LanguageTokenizer(llama, end="\n")
    assert tokenizer.encode("\n") == [tokenizer.end]
    assert tokenizer.decode([*tokenizer.encode(" a red"), tokenizer.end, *tokenizer.encode(" blue")]) == " a red"
    with pytest.raises(ValueError, match="it must be one"):
        LanguageTokenizer(llama, end="zq")


def test_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing"):
        CaptionTokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"no \[SEP\]"):
        CaptionTokenizer(tiny.llama(tmp_path / "llama"))


def test_padding():
    ids, mask = pad([[1, 2], []], 3, 9)
    assert ids.tolist() == [[1, 2, 9], [9, 9, 9]]
    assert mask.tolist() == [[True, True, False], [False, False, False]]


def test_a_tokenizer_of_older_files(tmp_path, llama):
    """OPT comes with vocab.json and merges.txt; transformers makes of them what tokenizer.json would be."""
    model = json.loads((llama / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    names = {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer", **names}))
    config = json.loads((llama / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 1]}))
    old, new = LanguageTokenizer(tmp_path), LanguageTokenizer(llama)
    text = "a red square Question: category?"
    assert old.encode(text) == new.encode(text)
    assert (old.end, old.vocab_size) == (2, new.vocab_size)


def test_a_directory_without_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json is missing, and transformers makes no tokenizer"):
        LanguageTokenizer(tmp_path)


def test_tokens_to_be_shown(caption, llama):
    shown = [caption.token_text(token) for token in (2, 5, 7, 3, caption.decoder_start, 10**6)]
    assert shown == ["[CLS]", "a", "red", "[SEP]", "[DEC]", "[1000000]"]
    tokenizer = LanguageTokenizer(llama)
    shown = [tokenizer.token_text(token) for token in [0, *tokenizer.encode("a red square\n")]]
    assert shown[0] == "<|endoftext|>"
    assert "".join(shown[1:]) == "a red square\n"
    # A letter of three bytes is three tokens here.
    parts = [tokenizer.token_text(token) for token in tokenizer.encode("猫")]
    assert len(parts) == 3
    assert all(part and "\N{REPLACEMENT CHARACTER}" not in part for part in parts)
