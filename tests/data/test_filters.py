"""Which captions pass, in which writing, and what a user may get wrong."""

import dataclasses
import pickle

import pytest
from ml_collections import ConfigDict

from blip2_jax.data.filters import SCRIPTS, Filters, count_words, filters, script
from blip2_jax.data.images import Limits
from blip2_jax.data.records import BadRecord


def record(*captions):
    return {"key": "shard/7", "image": b"", "captions": list(captions)}


def reason(rules, *captions):
    with pytest.raises(BadRecord, match=r"^shard/7: expected") as caught:
        rules.captions(record(*captions))
    return caught.value.reason


def test_a_block_of_the_config():
    assert filters(ConfigDict()) == Filters()
    found = filters(ConfigDict({"min_side": 64, "max_aspect": 3, "max_pixels": 10**6, "scripts": "Latin, cyrillic"}))
    assert found == Filters(min_side=64, max_aspect=3, max_pixels=10**6, scripts=("latin", "cyrillic"))
    assert found.limits == Limits(64, 3, 10**6)
    assert pickle.loads(pickle.dumps(found)) == found
    written = dataclasses.asdict(Filters()) | {"scripts": ""}
    assert filters(ConfigDict(written)) == Filters()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"min_size": 3}, r"data\.filters\.min_size: no such filter; expected min_side, max_aspect,"),
        ({"min_side": 0}, r"data\.filters\.min_side: expected at least 1 pixel, found 0"),
        ({"min_side": 2.5}, r"data\.filters\.min_side: expected int, found 2\.5"),
        ({"min_side": True}, r"expected int, found True"),
        ({"max_aspect": 0.5}, r"data\.filters\.max_aspect: expected at least 1, which is a square, found 0\.5"),
        ({"max_aspect": float("nan")}, r"data\.filters\.max_aspect"),
        ({"min_side": 100, "max_pixels": 9999}, r"expected from 10,000, .* to 178,956,970, .* found 9999"),
        ({"max_pixels": 10**9}, r"found 1000000000"),
        ({"min_words": 0}, r"data\.filters\.min_words: expected at least 1"),
        (
            {"min_words": 5, "max_words": 4},
            r"data\.filters\.max_words: expected at least min_words, which is 5, found 4",
        ),
        ({"scripts": "latin,klingon"}, r"data\.filters\.scripts: expected names among latin, .*found.*klingon"),
        ({"scripts": ["latin"]}, r"data\.filters\.scripts: expected str"),
    ],
)
def test_nonsense_in_a_block(block, message):
    with pytest.raises(ValueError, match=message):
        filters(block)


def test_those_captions_stay_that_pass():
    rules = Filters(min_words=2, max_words=4, scripts=("latin",))
    kept = rules.captions(record("one", "two words", "собака на траве", "one two three four five", "café - crème"))
    assert kept == ["two words", "café - crème"]


def test_reasons():
    rules = Filters(min_words=2, max_words=4, scripts=("latin",))
    assert reason(rules) == "caption_missing"
    assert reason(rules, "") == reason(rules, "  ... !") == reason(rules, "🙂 🙂") == "caption_empty"
    assert reason(rules, "word") == reason(rules, "a b c d e") == "caption_length"
    assert reason(rules, "собака на траве") == "script"
    assert reason(rules, "собака на траве", "word", "") == "script"
    message = r"expected 90% of the letters in latin, found 67% cyrillic, 33% latin: 'собака dog' \(script\)"
    with pytest.raises(BadRecord, match=message):
        rules.captions(record("собака dog"))


def test_defaults_keep_captions_of_every_language():
    captions = ["a", "2019", "собака", "狗在草地上", "سگ روی چمن", "หมา", "कुत्ता घास पर", "犬 🙂", "개"]
    assert Filters().captions(record(*captions)) == captions


def test_a_tenth_of_the_letters_may_be_foreign():
    rules = Filters(scripts=("latin",))
    assert rules.captions(record("abcdefghiж"))
    assert reason(rules, "abcdefghжж") == "script"
    assert rules.captions(record("12.50 € ☃")), "nothing there is a letter"


def test_combined_scripts():
    assert Filters(scripts=("cjk", "hiragana", "katakana")).captions(record("草の上のイヌー、人々"))
    assert reason(Filters(scripts=("cjk",)), "くさのうえのいぬ") == "script"


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("aZßéŁªﬁＡ𝐀", "latin"),
        ("жЁӘ", "cyrillic"),
        ("λΩΩ", "greek"),
        ("中﨑𠀀", "cjk"),
        ("あ", "hiragana"),
        ("アｱー", "katakana"),
        ("한ㄱ", "hangul"),
        ("שﬠ", "hebrew"),
        ("عﻉ", "arabic"),
        ("क", "devanagari"),
        ("ง", "thai"),
        ("1.- 🙂ʹ々", ""),
    ],
)
def test_scripts_of_letters(letters, expected):
    assert {letter: script(letter) for letter in letters} == dict.fromkeys(letters, expected)


def test_every_known_script_has_letters():
    found = {script(chr(code)) for code in range(0x110000)}
    assert set(SCRIPTS) <= found


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A dog - on grass.", 4),
        ("it's 2 o'clock", 3),
        ("  ", 0),
        ("naïve café", 2),
        ("狗在草地上", 5),
        ("iPhone手机", 3),
        ("हिन्दी में", 2),
    ],
)
def test_words(text, words):
    assert count_words(text) == words
