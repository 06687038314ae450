"""What is to be written, and what comes of it."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

CONVENTIONS = ("hf", "lavis")


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """How a text is written. The names are those of transformers' `generate`; tokens of the prompt never count.

    Attributes:
      max_new_tokens: N, at most, the end included.
      min_new_tokens: at least, before the end.
      num_beams: K lines that a beam search follows; 1: none.
      num_return_sequences: R texts a row: the best of its beams, or so many drawn.
      length_penalty: a text's score is its log-probability over its length to this power: above 0 favours long texts.
      early_stopping: a beam search ends when K texts have ended (True); or when by a guess (False), or certainly
        ("never"), no line can become better than them.
      repetition_penalty: divides the positive and multiplies the negative scores of tokens that were written before
        (arXiv 1909.05858); 1: none.
      no_repeat_ngram_size: so many tokens in a row are not written twice; 0: they may be.
      temperature: divisor of the logits of tokens that are drawn; 0: always the likeliest token (greedy).
      top_p: tokens are drawn from the fewest likeliest ones that have this share of the probability (nucleus sampling,
        arXiv 1904.09751); 1: from all.
      top_k: before that, from so many likeliest tokens; 0: from all.
      convention: how beams are scored and stopped. "hf": as transformers 5 does; a length is that of the new tokens.
        "lavis": as transformers 4.33 did for LAVIS; a start token counts as well and the end does not, texts cut off
        at N compete only at the end, and the guess of `early_stopping` looks at candidates that end, too.
    """

    max_new_tokens: int
    min_new_tokens: int = 0
    _: dataclasses.KW_ONLY
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    convention: str = "hf"

    def __post_init__(self):
        expected = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "min_new_tokens": (0 <= self.min_new_tokens <= self.max_new_tokens, "from 0 to max_new_tokens"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "num_return_sequences": (self.num_return_sequences >= 1, "at least 1"),
            "early_stopping": (self.early_stopping in (True, False, "never"), "True, False or 'never'"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "at least 0"),
            "temperature": (self.temperature >= 0, "at least 0"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "at least 0"),
            "convention": (self.convention in CONVENTIONS, f"one of {', '.join(CONVENTIONS)}"),
        }
        for name, (holds, what) in expected.items():
            if not holds:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected {what}")
        if self.temperature and self.num_beams > 1:
            raise ValueError(
                f"temperature = {self.temperature} draws tokens, and num_beams = {self.num_beams} searches for the "
                "likeliest text: choose one of them"
            )
        if not self.temperature and self.num_return_sequences > self.num_beams:
            raise ValueError(
                f"num_return_sequences = {self.num_return_sequences}, but a search with num_beams = {self.num_beams} "
                "has no more texts: raise num_beams, or draw with a temperature"
            )

    @property
    def lines(self) -> int:
        """K, the texts that a row writes at the same time."""
        return self.num_beams if self.num_beams > 1 else self.num_return_sequences


class Draws(NamedTuple):
    """What decides the random choices: a row's texts are functions of the key and of the row's own number.

    Attributes:
      key: of this run.
      rows: uint32[B].
    """

    key: jax.Array
    rows: jax.Array


class Written(NamedTuple):
    """Texts, the best of a row first where they were searched for.

    Attributes:
      tokens: int32[B, R, N]; behind the end of a text the end token again.
      scores: float32[B, R], log-probability over length to the power of `length_penalty`.
    """

    tokens: jax.Array
    scores: jax.Array
