"""A conversation about one picture: what was asked and answered before stands in front of the next question."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass
class Dialogue:
    """Attributes:
    answer: what the model writes behind a prompt.
    ask_for: a question to its prompt, such as "Question: {} Answer:".
    turns: questions with their answers, the oldest first; those of a recorded dialogue may be put in.
    kept: only so many of the last turns stand before a question; None: all.
    """

    answer: Callable[[str], str]
    ask_for: Callable[[str], str]
    turns: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    kept: int | None = None

    def prompt(self, question: str) -> str:
        """The conversation so far, and the question."""
        turns = self.turns if self.kept is None else self.turns[len(self.turns) - self.kept :]
        return " ".join([*(f"{self.ask_for(asked)} {answer}." for asked, answer in turns), self.ask_for(question)])

    def ask(self, question: str) -> str:
        """The answer, which is remembered.

        Raises:
          ValueError: the question is empty, or the conversation has become longer than the model can read.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        answer = self.answer(self.prompt(question.strip())).strip()
        self.turns.append((question.strip(), answer.rstrip(".")))
        return answer
