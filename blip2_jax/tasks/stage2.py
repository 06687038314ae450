"""Stage 2: the Q-Former's output becomes a soft prompt of a frozen language model (paper section 3.3).

A decoder continues soft prompt and prompt; of an encoder-decoder the encoder reads them and the decoder answers.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax import compat, decoding, params
from blip2_jax.checkpoints import frozen, language
from blip2_jax.data.pipeline import Batch, Part, Pictures
from blip2_jax.data.text import LanguageTokenizer, clean_caption
from blip2_jax.decoding import Draws, GenerationConfig
from blip2_jax.evaluation import captioning
from blip2_jax.evaluation.batches import Layout, Reading, in_batches
from blip2_jax.models.blip2 import SoftPromptModel
from blip2_jax.models.language.t5 import T5
from blip2_jax.parallel import gathering
from blip2_jax.tasks.common import Metrics, Task
from blip2_jax.tasks.stage2_batches import Stage2Batches
from blip2_jax.tasks.stage2_loss import Stage2Loss

_TEXTS = ("prompt_ids", "prompt_mask", "target_ids", "target_mask")


class Stage2(Task):
    """Causal language modelling of captions, and of answers to questions, behind the soft prompt."""

    name = "stage2"

    def __init__(self, config, dtype=None):
        super().__init__(config, dtype)
        self.parts["llm"] = frozen.find("llm", config.llm)
        self.language_model = frozen.language_model(self.parts["llm"], self.dtype, **self._language_changes())
        self.model = SoftPromptModel(self.blip2, self.language_model.config.width)
        self.compat = compat.resolve(config.compat)
        self._soft_prompt = jax.jit(self.soft_prompt)
        self._nats = jax.jit(self._count_nats)
        self._write = jax.jit(self._write_tokens, static_argnames="config")
        if config.data.split_captions and not self.reads_apart:
            raise ValueError(
                f"data.split_captions with a language model {self.parts['llm'].model_type!r}: only an encoder-decoder "
                "reads the beginning of a caption and writes its end"
            )

    @property
    def reads_apart(self) -> bool:
        """Whether the language model reads prompts with an encoder and writes with a decoder."""
        return isinstance(self.language_model, T5)

    @functools.cached_property
    def objective(self) -> Stage2Loss:
        return Stage2Loss(
            self.model,
            self.language_model,
            self.encoder.encode,
            tuple(self.tokenizer.begin) if self.config.data.begin else (),
            0 if self.reads_apart else self.batches.lengths[2],
            self.config.pieces,
            self.compat,
        )

    def _language_changes(self) -> dict[str, Any]:
        activation, remat = self.config.llm_activation, {"remat": self.config.llm_remat}
        if not activation:
            return remat
        kind = self.parts["llm"].model_type
        if kind != "t5" or activation not in ("gelu", "gelu_tanh"):
            raise ValueError(
                f"config.llm_activation = {activation!r} with a language model {kind!r}: expected '', or gelu or "
                "gelu_tanh with a T5"
            )
        return remat | {"activation": activation}

    @functools.cached_property
    def _language(self) -> params.Tree:
        return frozen.load_language_model(self.parts["llm"], self.language_model, self.dtype, self.put("language"))

    @functools.cached_property
    def tokenizer(self) -> LanguageTokenizer:
        """That of the language model.

        Raises:
          ValueError: it has more tokens than the model has rows.
        """
        path, rows, data = self.parts["llm"].path, self.language_model.config.vocab_size, self.config.data
        tokenizer = LanguageTokenizer(path, data.begin, data.end, data.bos)
        if tokenizer.vocab_size > rows:
            raise ValueError(
                f"{path}: the tokenizer has {tokenizer.vocab_size} tokens, but the model's vocabulary {rows} rows: "
                "they do not belong together"
            )
        return tokenizer

    def frozen_shapes(self) -> params.Tree:
        return super().frozen_shapes() | {"language": language.shapes(self.language_model, self.dtype)}

    @property
    def frozen(self) -> params.Tree:
        return super().frozen | {"language": self._language}

    @functools.cached_property
    def batches(self) -> Stage2Batches:
        instructions = self.caption_tokenizer if self.config.instruct else None
        return Stage2Batches(
            self.tokenizer,
            self.config.data,
            self.reads_apart,
            self.compat.bos_target,
            instructions,
            self.blip2.qformer.max_positions,
        )

    def training_parts(self) -> list[Part]:
        data = self.config.data
        asked = data.question_share if data.questions else 0.0
        if not 0 <= asked < 1:
            raise ValueError(f"data.question_share must be at least 0 and below 1, found {asked}")
        parts = self.mixture(data.train, self.batches.prepare_caption, 1 - asked)
        return parts + (self.mixture(data.questions, self.batches.prepare_question, asked) if asked else [])

    # Model and loss.

    def fresh(self, key: jax.Array) -> params.Tree:
        image = jnp.zeros((2, self.encoder.tokens, self.encoder.width))
        # InstructBLIP's Q-Former reads the instruction too, and so has the text's parameters.
        text = (jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 4), bool)) if self.config.instruct else ()
        return self.model.init(key, image, *text)["params"]

    def read_image(self, model: SoftPromptModel, image_embeds: jax.Array) -> jax.Array:
        return model(image_embeds)

    def soft_prompt(self, trainable: params.Tree, image_embeds: jax.Array, batch: Batch | None = None) -> jax.Array:
        """float[B, P, D_image], and of an InstructBLIP the batch with its instructions -> float[B, Q, D_language]."""
        return self.objective.soft_prompt(trainable, image_embeds, batch or {})

    def value_and_gradients(self, trainable, frozen, batch, key) -> tuple[tuple[jax.Array, Metrics], params.Tree]:
        loss, gradients = self.objective.value_and_gradients(trainable, frozen, batch, key)
        return (loss, {}), gradients

    # Generation and evaluation.

    @property
    def writes(self) -> bool:
        """Whether this language model can be decoded from so far."""
        return not self.config.instruct and not self.reads_apart

    def _write_tokens(self, language, soft_prompt, prompt_ids, prompt_mask, config, draws):
        model = self.language_model.bind({"params": language})
        image = self.objective.prefix(model, soft_prompt)
        prefix = jnp.concatenate([image, model.embed(prompt_ids)], axis=1)
        present = jnp.concatenate([jnp.ones(image.shape[:2], bool), prompt_mask], axis=1)
        return decoding.generate(self.language_model, language, prefix, present, config, self.tokenizer.end, draws)

    def generate(
        self,
        soft_prompt: jax.Array | np.ndarray,
        prompts: Sequence[str],
        config: GenerationConfig,
        draws: Draws | None = None,
    ) -> list[str]:
        """Texts for soft prompts float[B, Q, D] and as many prompts; without a temperature `draws` are not needed.

        Raises:
          ValueError: the language model is an encoder-decoder, or the Q-Former reads instructions.
        """
        if not self.writes:
            what = "InstructBLIP" if self.config.instruct else f"{type(self.language_model).__name__} as config.llm"
            raise ValueError(f"{what}: import, export, inspection and training are there, generation not yet")
        return self._texts(self._write(self._language, soft_prompt, *self._prompts(prompts), config, draws))

    def _prompts(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Their tokens int32[B, T], as many as the longest has, and bool[B, T] where there are some."""
        return self.tokenizer.prompts(prompts, max(len(self.tokenizer.encode_prompt(prompt)) for prompt in prompts))

    def _texts(self, tokens: jax.Array | np.ndarray) -> list[str]:
        """From int32[B, N]."""
        return [self.tokenizer.decode(row).strip() for row in np.asarray(tokens)]

    def captions(self, trainable, image_embeds, config, draws):
        soft_prompt, prompts = self._soft_prompt(trainable, image_embeds), [self.config.data.prompt] * len(image_embeds)
        written = [self.generate(soft_prompt, prompts, config, draw) for draw in draws]
        return [list(texts) for texts in zip(*written, strict=True)]

    def evaluate(self, trainable, pictures: Pictures) -> tuple[dict[str, float], list[dict]]:
        """Captions and answers by greedy decoding, and how much the loss rises with the wrong picture.

        Of a language model that cannot be decoded from (`writes`) the losses alone, and no samples.
        """
        layout = self.evaluation_layout()
        reading = Reading(layout, pictures, self._evaluation_collate)
        soft_prompts, texts = [], []
        for _, batch in reading:
            instruction = {name: batch[name] for name in batch if name.startswith("instruction_")}
            soft_prompts.append(layout.call(self._soft_prompt, trainable, batch["image_embeds"], instruction))
            texts.append(gathering.whole({name: batch[name] for name in _TEXTS}))
        captions = [clean_caption(example["caption"], self.config.data.lower_case) for example in reading.examples]
        soft_prompt = reading.of_examples(soft_prompts)
        texts = {name: reading.of_examples([text[name] for text in texts]) for name in texts[0]}
        true, shuffled = self._true_and_shuffled_loss(layout, soft_prompt, texts, captions)
        metrics = {"caption/loss": true, "caption/shuffled_image_loss_increase": shuffled - true}
        if not self.writes:
            return metrics, []
        written, samples = self._written(layout, soft_prompt, reading.examples, captions)
        return written | metrics, samples

    def _written(self, layout: Layout, soft_prompt, examples, captions) -> tuple[dict[str, float], list[dict]]:
        """What is written for the pictures of some examples, judged."""
        data = self.config.data
        generated = self._write_all(layout, soft_prompt, data.prompt, self.config.evaluation.max_new_tokens)
        scores = captioning.score(generated, [[caption] for caption in captions])
        metrics = {f"caption/{name}": value for name, value in scores.items()}
        samples = [
            {"kind": "caption", "key": example["key"], "text": caption, "generated": text}
            for example, caption, text in zip(examples, captions, generated, strict=True)
        ]
        if data.questions and all("category" in example for example in examples):
            answers = self._write_all(layout, soft_prompt, data.question, data.max_answer_tokens)
            right = [answer == example["category"] for answer, example in zip(answers, examples, strict=True)]
            metrics["question/accuracy"] = float(np.mean(right))
            for sample, example, answer in zip(samples, examples, answers, strict=True):
                sample |= {"question": data.question, "answer": answer, "category": example["category"]}
        return metrics, samples

    def _evaluation_collate(self, examples: Sequence[dict]) -> Batch:
        return self.batches.collate([self.batches.prepare_caption(example) for example in examples])

    def _write_all(self, layout: Layout, soft_prompt: np.ndarray, prompt: str, tokens: int) -> list[str]:
        """Greedily, a text for each soft prompt float32[N, Q, D]."""
        ids, mask = self._prompts([prompt] * len(soft_prompt))
        write = lambda *inputs: self._write(self._language, *inputs, GenerationConfig(tokens), None)
        return self._texts(in_batches(layout, write, (soft_prompt, ids, mask), f"writing behind {prompt!r}"))

    def _count_nats(self, language, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Sum of the losses of the tokens that count, and their number, of soft prompts and texts."""
        texts = self.objective.texts(batch)
        weights = texts.counts.astype(jnp.float32)
        return self.objective.language_loss(language, batch["soft_prompt"], texts, weights), weights.sum()

    def _true_and_shuffled_loss(self, layout: Layout, soft_prompt, texts: Batch, captions) -> tuple[float, float]:
        """Nats a target token with each caption's own picture, and with another's: half the set further on."""
        count = len(captions)
        other = np.roll(np.arange(count), count // 2)
        if count < 2 or all(captions[i] == captions[j] for i, j in enumerate(other)):
            raise ValueError("the loss with shuffled images needs at least two different captions")

        def mean_loss(soft_prompt: np.ndarray, label: str) -> float:
            total = tokens = 0.0
            for batch in layout.batches(texts | {"soft_prompt": soft_prompt}, label):
                loss, there = layout.call(self._nats, self._language, batch)
                total, tokens = total + float(loss), tokens + float(there)
            return total / tokens

        return mean_loss(soft_prompt, "loss"), mean_loss(soft_prompt[other], "loss with shuffled images")
