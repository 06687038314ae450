"""A trained model on pictures of one's own.

from blip2_jax.api import load
model = load("WORKDIR")                       # or a checkpoint in it, or hf:DIR of transformers
model.caption(["cat.jpg"]), model.answer(["cat.jpg"], ["what colour is the cat?"])
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from blip2_jax import params, tasks
from blip2_jax.data import images
from blip2_jax.data.text import clean_caption
from blip2_jax.decoding import Draws, GenerationConfig
from blip2_jax.dialogue import Dialogue
from blip2_jax.evaluation import attention
from blip2_jax.pretrained import from_huggingface, is_huggingface
from blip2_jax.tasks.common import Task
from blip2_jax.tasks.stage1 import Stage1
from blip2_jax.tasks.stage2 import Stage2

Picture = str | os.PathLike | Image.Image | np.ndarray

# As the paper writes captions (section 4.2) and answers questions (4.1), but for the least length, which ours may have.
CAPTION = GenerationConfig(30, num_beams=5)
ANSWER = GenerationConfig(10, num_beams=5, length_penalty=-1.0)


class Similarity(NamedTuple):
    """How well B images and B texts fit, pair by pair.

    Attributes:
      itc: float32[B], the cosine of the query that fits best.
      itm: float32[B], the probability of a match.
    """

    itc: np.ndarray
    itm: np.ndarray


def load(checkpoint: str | os.PathLike) -> Blip2:
    """A model that can be used.

    Args:
      checkpoint: a workdir, one of its checkpoints, or a directory of transformers (a BLIP-2 or InstructBLIP), which
        "hf:ORG/NAME" finds in the hub's cache, or fetches.

    Raises:
      FileNotFoundError, ConnectionError, ValueError: there is no such model, or a part of it is missing.
    """
    name = os.fspath(checkpoint)
    if name.startswith("hf:") or is_huggingface(pathlib.Path(name)):
        return Blip2(*from_huggingface(name.removeprefix("hf:")))
    return Blip2(*tasks.load_trained(name))


class Blip2:
    """What `load` gives.

    Pictures are files, PIL images or uint8[H, W, 3]; a list of them, and lists of as many texts.

    Attributes:
      task: of blip2_jax.tasks, with the models and tokenizers.
      trainable: the parameters that were trained.
    """

    def __init__(self, task: Task, trainable: params.Tree):
        self.task, self.trainable = task, trainable
        self._multimodal = jax.jit(self._read_pairs)

    # Writing.

    def caption(
        self, pictures: Sequence[Picture], config: GenerationConfig = CAPTION, prompt: str | None = None, seed: int = 0
    ) -> list[str] | list[list[str]]:
        """A caption for each picture; of several (num_return_sequences) a list.

        Args:
          pictures: B of them.
          config: how.
          prompt: what the caption continues; by default what captions were trained with.
          seed: of what is drawn with a temperature.

        Raises:
          OSError, ValueError: a picture cannot be read, or the model does not write.
        """
        if isinstance(self.task, Stage1):
            if prompt:
                raise ValueError(f"prompt = {prompt!r}: a checkpoint of stage 1 has no language model to read one")
            return _alone(
                self.task.captions(self.trainable, self.encode(pictures), config, self._draws(pictures, seed))
            )
        prompt = self.task.config.data.prompt if prompt is None else prompt
        return self.write(pictures, [prompt] * len(pictures), config, seed)

    def answer(
        self, pictures: Sequence[Picture], questions: Sequence[str], config: GenerationConfig = ANSWER, seed: int = 0
    ) -> list[str] | list[list[str]]:
        """An answer to each question about its picture, behind the prompt that this model knows (`question_prompt`)."""
        self._stage2()
        return self.write(pictures, [self.question_prompt(question) for question in questions], config, seed)

    def write(
        self, pictures: Sequence[Picture], prompts: Sequence[str], config: GenerationConfig = CAPTION, seed: int = 0
    ) -> list[str] | list[list[str]]:
        """What the language model writes behind each picture and prompt."""
        soft_prompt = self._soft_prompt(pictures, prompts)
        return _alone(
            self.task.writing.write(
                self.task.language(self.trainable), soft_prompt, prompts, config, self._draws(pictures, seed)
            )
        )

    def choose(
        self,
        pictures: Sequence[Picture],
        prompts: Sequence[str],
        candidates: Sequence[Sequence[str]],
        normalize: bool = False,
    ) -> np.ndarray:
        """float32[B, C]: how likely the language model finds each candidate, see `tasks.writing.log_probabilities`."""
        soft_prompt = self._soft_prompt(pictures, prompts)
        return self.task.writing.log_probabilities(
            self.task.language(self.trainable), soft_prompt, prompts, candidates, normalize
        )

    def question_prompt(self, question: str) -> str:
        """A question as the recipe asks it; data.question has {} in its place where it is a template."""
        template = self.task.config.data.question
        return template.format(question) if "{}" in template else f"Question: {question} Answer:"

    def chat(self, picture: Picture, config: GenerationConfig = ANSWER) -> Dialogue:
        """A conversation about a picture, in which earlier questions and answers stand before a new one."""
        task, image_embeds = self._stage2(), self.encode([picture])

        def answer(prompt: str) -> str:
            soft_prompt = task.read(self.trainable, image_embeds, [prompt])
            ((text, *_),) = task.writing.write(task.language(self.trainable), soft_prompt, [prompt], config)
            return text

        return Dialogue(answer, self.question_prompt)

    def _soft_prompt(self, pictures: Sequence[Picture], prompts: Sequence[str]) -> jax.Array:
        task = self._stage2()
        if len(pictures) != len(prompts):
            raise ValueError(f"{len(pictures)} pictures and {len(prompts)} prompts: expected as many")
        return task.read(self.trainable, self.encode(pictures), prompts)

    def _stage2(self) -> Stage2:
        if not isinstance(self.task, Stage2):
            raise ValueError(f"a checkpoint of {self.task.name} has no language model to write behind prompts with")
        return self.task

    @staticmethod
    def _draws(pictures: Sequence[Picture], seed: int) -> Draws:
        return Draws(jax.random.key(seed), jnp.arange(len(pictures), dtype=jnp.uint32))

    # Features and scores.

    def encode(self, pictures: Sequence[Picture]) -> jax.Array:
        """The image encoder's tokens, float[B, P, D]."""
        if not len(pictures):
            raise ValueError("no pictures")
        size = self.task.config.image_size
        return self.task.encode(np.stack([seen(picture, size) for picture in pictures]))

    def image_features(self, pictures: Sequence[Picture]) -> np.ndarray:
        """float32[B, Q, E] of unit length, one for each query, where stage 1 compares images with texts."""
        task = self._stage1()
        return np.asarray(task.image_features(self.trainable, self.encode(pictures)))

    def text_features(self, texts: Sequence[str]) -> np.ndarray:
        """float32[B, E] of unit length, to be compared with `image_features`."""
        return np.asarray(self._stage1().text_features(self.trainable, *self._tokens(texts)))

    def multimodal_features(self, pictures: Sequence[Picture], texts: Sequence[str]) -> np.ndarray:
        """float32[B, Q, D]: the queries' output when they read an image and its text together."""
        self._stage1()
        return np.asarray(self._multimodal(self.trainable, self.encode(pictures), *self._tokens(texts)))

    def similarity(self, pictures: Sequence[Picture], texts: Sequence[str]) -> Similarity:
        """Of picture i and text i."""
        task, embeds = self._stage1(), self.encode(pictures)
        features = task.image_features(self.trainable, embeds)
        clean = [clean_caption(text, task.config.data.lower_case) for text in texts]
        cosines, logits = task.pair_scores(self.trainable, embeds, features, clean)
        return Similarity(cosines, np.asarray(jax.nn.softmax(logits)[:, 1]))

    def attention(self, pictures: Sequence[Picture]) -> np.ndarray:
        """float32[B, Q, P]: where each query looks, in the last cross-attention; `attention.overlay` draws it."""
        return np.asarray(attention.cross_attention(self.task, self.trainable, self.encode(pictures)))

    def _read_pairs(self, trainable, image_embeds, ids, mask):
        def method(model, image_embeds, ids, mask):
            return model.qformer.encode_pair(model.project_image(image_embeds), ids, mask)[0]

        arrays = image_embeds.astype(jnp.float32), ids, mask
        return self.task.model.apply({"params": trainable}, *arrays, method=method)

    def _tokens(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        data = self.task.config.data
        clean = [clean_caption(text, data.lower_case) for text in texts]
        return self.task.caption_tokenizer(clean, data.max_text_tokens)

    def _stage1(self) -> Stage1:
        if not isinstance(self.task, Stage1):
            raise ValueError(
                f"a checkpoint of {self.task.name} compares no texts with images: load one of stage 1 (or of retrieval)"
            )
        return self.task


def seen(picture: Picture, size: int) -> np.ndarray:
    """A picture as evaluation sees it: uint8[S, S, 3].

    Raises:
      OSError, ValueError: it is missing, or not a picture.
    """
    if isinstance(picture, str | os.PathLike):
        path = pathlib.Path(picture)
        return images.resize(images.decode(path.read_bytes(), str(path)), size)
    array = np.asarray(picture.convert("RGB")) if isinstance(picture, Image.Image) else np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"a picture {array.dtype}{list(array.shape)}: expected uint8[H, W, 3]")
    return images.resample(array, (0, 0, array.shape[1], array.shape[0]), size)


def _alone(texts: list[list[str]]) -> Any:
    """Without lists of one."""
    return [row[0] for row in texts] if all(len(row) == 1 for row in texts) else texts
