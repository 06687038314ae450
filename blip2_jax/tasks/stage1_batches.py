"""From examples to the batches of stage 1."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from blip2_jax.data.pipeline import Batch, Schema, collate_images
from blip2_jax.data.records import Record
from blip2_jax.data.sources import identify
from blip2_jax.data.text import CaptionTokenizer, clean_caption


@dataclasses.dataclass(frozen=True)
class Stage1Batches:
    """Holds no weights, so that processes which make batches can have a copy.

    Attributes:
      tokenizer: of captions.
      length: T, tokens of a caption.
      lower_case: of captions.
    """

    tokenizer: CaptionTokenizer
    length: int
    lower_case: bool

    def prepare_caption(self, example: Record, rng: np.random.Generator | None = None) -> Record:
        """The example with its cleaned `text`."""
        return example | {"text": clean_caption(example["caption"], self.lower_case)}

    def collate(self, examples: Sequence[Record]) -> Batch:
        """Images, image_id and text_id uint32[B, 2], text_ids int32[B, T], text_mask bool[B, T]."""
        texts = [example["text"] for example in examples]
        ids, mask = self.tokenizer(texts, self.length)
        text_id = np.stack([identify("text", text) for text in texts])
        return collate_images(examples) | {"text_ids": ids, "text_mask": mask, "text_id": text_id}

    def schema(self, batch_size: int) -> Schema:
        """What `collate` adds to images."""
        return {
            "text_id": jax.ShapeDtypeStruct((batch_size, 2), np.uint32),
            "text_ids": jax.ShapeDtypeStruct((batch_size, self.length), np.int32),
            "text_mask": jax.ShapeDtypeStruct((batch_size, self.length), np.bool_),
        }
