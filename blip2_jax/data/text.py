"""Captions to token ids, for the Q-Former (WordPiece) and for the language model."""

from __future__ import annotations

import pathlib
import re
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer

from blip2_jax.checkpoints.huggingface import complete, load_tokenizer, read_config

_STRIPPED = re.compile(r"[.!\"()*#:;~]")
_MAX_WORDS = 50


def clean_caption(text: str, lower_case: bool = True) -> str:
    """Captions as the original feeds them: lower case, without . ! " ( ) * # : ; ~, at most 50 words.

    Lower-casing is a choice, for other languages than English it may be the wrong one.
    """
    text = _STRIPPED.sub(" ", text.lower() if lower_case else text)
    return " ".join(text.split()[:_MAX_WORDS])


def _token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token by itself, with the space before it if it has one."""
    name = tokenizer.id_to_token(token)
    text = tokenizer.decode([token], skip_special_tokens=False)
    if name is None or not text or "\N{REPLACEMENT CHARACTER}" in text:  # A part of a letter's bytes.
        return name or f"[{token}]"
    if name.startswith("##"):
        return name
    return f" {text}" if name.startswith("▁") and not text.startswith(" ") else text


def pad(rows: Sequence[Sequence[int]], length: int, fill: int) -> tuple[np.ndarray, np.ndarray]:
    """Token lists to int32[B, T] and bool[B, T], filled on the right; longer rows are an error."""
    ids = np.full((len(rows), length), fill, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
        mask[index, : len(row)] = True
    return ids, mask


class CaptionTokenizer:
    """BERT's WordPiece with [CLS] and [SEP].

    Attributes:
      decoder_start: [DEC], which starts a caption in ITG; one past BERT's vocabulary where that does not know it.
      end: [SEP], which ends a text.
    """

    def __init__(self, directory: pathlib.Path):
        self._tokenizer = load_tokenizer(directory)
        self.end = self._tokenizer.token_to_id("[SEP]")
        self._padding = self._tokenizer.token_to_id("[PAD]")
        if self.end is None or self._padding is None:
            raise ValueError(f"{directory}: the tokenizer has no [SEP] or [PAD]; expected BERT's WordPiece")
        known = self._tokenizer.token_to_id("[DEC]")
        self.decoder_start = self._tokenizer.get_vocab_size() if known is None else known

    def __call__(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """int32[B, length] and bool[B, length]; a longer text loses its end, but not its [SEP]."""
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        rows = [row if len(row) <= length else [*row[: length - 1], self.end] for row in rows]
        return pad(rows, length, self._padding)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some tokens up to the first end, without special tokens."""
        return self._tokenizer.decode(until(ids, self.end), skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """A token by itself, to be shown."""
        return "[DEC]" if token == self.decoder_start else _token_text(self._tokenizer, token)


def until(ids: Sequence[int], end: int) -> list[int]:
    """The tokens before the first `end`."""
    ids = list(ids)
    return ids[: ids.index(end)] if end in ids else ids


def log_frequencies(ids: np.ndarray, mask: np.ndarray, vocab_size: int) -> np.ndarray:
    """float32[V]: log of how often each token occurs among `ids` int[N, T], one added to each count."""
    counts = np.bincount(ids[mask], minlength=vocab_size) + 1.0
    return np.log(counts / counts.sum()).astype(np.float32)


class LanguageTokenizer:
    """The language model's own tokenizer.

    Attributes:
      begin: the tokens before everything, one or none.
      bos: the tokens between the soft prompt and the text, one or none.
      space: what stands before a word in the middle of a text; nothing where the tokenizer sets it itself.
      end: the token that ends a text.
      padding: the token that fills rows up; never looked at.
    """

    def __init__(self, directory: pathlib.Path, begin: str = "", end: str = "", bos: str = ""):
        """Read the tokenizer of a model's directory.

        Args:
          directory: with tokenizer.json and config.json.
          begin: what stands before everything: one token, or "" for nothing.
          end: what ends a text: one token, such as "\\n", or "" for the model's own end-of-text token.
          bos: what stands between the soft prompt and the text: one token, or "" for nothing.

        Raises:
          FileNotFoundError, ValueError: no tokenizer is there, or one of these is not one token of it.
        """
        self._tokenizer = load_tokenizer(directory)
        config = read_config(directory / "config.json")
        config = config.get("text_config", config)
        if "eos_token_id" not in config:
            config = complete(config)
        own = config["eos_token_id"]
        own = own[0] if isinstance(own, list) else own  # Llama 3 has several, the first ends a text.
        self.begin = [self._token("begin", begin)] if begin else []
        self.bos = [self._token("bos", bos)] if bos else []
        self.space = " " if "ByteLevel" in str(self._tokenizer.pre_tokenizer) else ""
        self.end = self._token("end", end) if end else own
        self.padding = config.get("pad_token_id") or own

    @property
    def vocab_size(self) -> int:
        """How many tokens it knows."""
        return self._tokenizer.get_vocab_size()

    def _token(self, name: str, text: str) -> int:
        ids = self.encode(text)
        if len(ids) != 1:
            raise ValueError(f"data.{name} = {text!r} is {len(ids)} tokens of this language model; it must be one")
        return ids[0]

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of what the model continues."""
        return [*self.bos, *self.encode(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of some tokens up to the first end, without special tokens."""
        return self._tokenizer.decode(until(ids, self.end), skip_special_tokens=True)

    def token_text(self, token: int) -> str:
        """A token by itself, to be shown."""
        return _token_text(self._tokenizer, token)

    def encode_target(self, text: str, length: int) -> list[int]:
        """Of a text behind a prompt: at most `length` token ids, the last of them the end token.

        With its space a word in the middle of a text is one token, which is how the model knows it. A longer text loses
        its last words.
        """
        return [*self.encode(self.space + text)[: length - 1], self.end]
