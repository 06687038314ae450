"""From examples to the batches of stage 2: captions behind a fixed prompt, and answers behind a question."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import ml_collections
import numpy as np

from blip2_jax.data.pipeline import Batch, Schema, collate_images
from blip2_jax.data.records import Record
from blip2_jax.data.text import CaptionTokenizer, LanguageTokenizer, clean_caption, pad


@dataclasses.dataclass(frozen=True)
class Stage2Batches:
    """Holds no weights, so that processes which make batches can have a copy.

    Attributes:
      tokenizer: of the language model.
      data: the recipe's block, with the prompts and the lengths.
      reads_apart: the language model reads prompts with an encoder.
      bos_target: the token between soft prompt and text is itself predicted where no prompt follows; compat.bos_target.
      instructions: the tokenizer of instructions that the Q-Former reads; None: it reads none.
      max_instruction: the longest instruction that it can read, in tokens.
    """

    tokenizer: LanguageTokenizer
    data: ml_collections.ConfigDict
    reads_apart: bool
    bos_target: bool
    instructions: CaptionTokenizer | None
    max_instruction: int

    def prepare_caption(self, example: Record, rng: np.random.Generator | None = None) -> Record:
        """A caption behind data.prompt; in training with data.split_captions its end behind its beginning.

        They are parted where the paper does: after a number of tokens drawn evenly from 1 to the half of them.
        """
        data = self.data
        text = clean_caption(example["caption"], data.lower_case)
        found = self._prepare(example, data.prompt, text, data.max_text_tokens)
        tokens = len(found["target_ids"]) - 1  # Without the end.
        if rng is None or not data.split_captions or tokens < 2:
            return found
        ids, place = found["target_ids"], int(rng.integers(1, tokens // 2 + 1))
        prompt = [*self.tokenizer.encode_prompt(data.prompt), *ids[:place], self.tokenizer.end]
        return found | {"prompt_ids": prompt, "target_ids": ids[place:]}

    def prepare_question(self, example: Record, rng: np.random.Generator | None = None) -> Record:
        """The example's category behind data.question.

        Raises:
          ValueError: it has none.
        """
        if "category" not in example:
            raise ValueError(
                f"data.questions = {self.data.questions!r}: {example['key']} has no category to ask for; "
                "set data.questions='' to train on captions alone"
            )
        return self._prepare(example, self.data.question, example["category"], self.data.max_answer_tokens)

    def _prepare(self, example: Record, prompt: str, target: str, target_length: int) -> Record:
        bos = self._predicted_bos(prompt)
        target_ids = [*bos, *self.tokenizer.encode_target(target, target_length - len(bos))]
        found = example | {"prompt_ids": self.encode_prompt(prompt), "target_ids": target_ids}
        return found | {"instruction": prompt} if self.instructions else found

    def _predicted_bos(self, prompt: str) -> list[int]:
        """The token between soft prompt and text where it is itself to be predicted."""
        return [] if prompt or self.reads_apart or not self.bos_target else self.tokenizer.bos

    def encode_prompt(self, prompt: str) -> list[int]:
        """What stands between soft prompt and target; an encoder's text has its end token, as T5's texts had."""
        if self._predicted_bos(prompt):
            return []
        return self.tokenizer.encode_prompt(prompt) + ([self.tokenizer.end] if self.reads_apart else [])

    @property
    def prompts(self) -> list[str]:
        """All prompts that batches have."""
        return [self.data.prompt, self.data.question] if self.data.questions else [self.data.prompt]

    @functools.cached_property
    def lengths(self) -> tuple[int, int, int]:
        """The longest prompt, the longest target, and the longest row of one behind the other, in tokens."""
        data = self.data
        prompts = [len(self.encode_prompt(prompt)) for prompt in self.prompts]
        targets = [data.max_text_tokens, data.max_answer_tokens][: len(prompts)]
        row = max(prompt + target for prompt, target in zip(prompts, targets, strict=True))
        if data.split_captions:
            prompts.append(prompts[0] + (data.max_text_tokens - 1) // 2)
        return max(prompts), max(targets), row

    @functools.cached_property
    def _instruction_length(self) -> int:
        """Of the longest instruction, in tokens of the Q-Former."""
        return int(self.instructions(self.prompts, self.max_instruction)[1].sum(1).max())

    def collate(self, examples: Sequence[Record]) -> Batch:
        """Images; of prompt, target and, if the Q-Former reads it, instruction: ids int32[B, T], mask bool[B, T]."""
        batch = collate_images(examples)
        for name, length in zip(("prompt", "target"), self.lengths, strict=False):
            rows = [example[f"{name}_ids"] for example in examples]
            batch[f"{name}_ids"], batch[f"{name}_mask"] = pad(rows, length, self.tokenizer.padding)
        if self.instructions:
            tokens = self.instructions([example["instruction"] for example in examples], self._instruction_length)
            batch["instruction_ids"], batch["instruction_mask"] = tokens
        return batch

    def schema(self, batch_size: int) -> Schema:
        """What `collate` adds to images."""
        lengths = dict(zip(("prompt", "target"), self.lengths, strict=False))
        if self.instructions:
            lengths["instruction"] = self._instruction_length
        fields = {}
        for name, length in lengths.items():
            fields[f"{name}_ids"] = jax.ShapeDtypeStruct((batch_size, length), np.int32)
            fields[f"{name}_mask"] = jax.ShapeDtypeStruct((batch_size, length), np.bool_)
        return fields
