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

from blip2_jax import compat, params
from blip2_jax.checkpoints import frozen, language
from blip2_jax.data.pipeline import Batch, Part, Pictures
from blip2_jax.data.text import LanguageTokenizer, clean_caption
from blip2_jax.decoding import GenerationConfig
from blip2_jax.evaluation import captioning
from blip2_jax.evaluation.batches import Layout, Reading
from blip2_jax.models import lora
from blip2_jax.models.blip2 import SoftPromptModel
from blip2_jax.models.language.t5 import T5
from blip2_jax.parallel import gathering
from blip2_jax.tasks.common import Metrics, Task
from blip2_jax.tasks.stage2_batches import Stage2Batches
from blip2_jax.tasks.stage2_loss import Stage2Loss
from blip2_jax.tasks.writing import Writing

_TEXTS = ("prompt_ids", "prompt_mask", "target_ids", "target_mask")


class Stage2(Task):
    """Causal language modelling of captions, and of answers to questions, behind the soft prompt."""

    name = "stage2"
    adapted_parts = lora.PARTS

    def __init__(self, config, dtype=None):
        super().__init__(config, dtype)
        self.parts["llm"] = frozen.find("llm", config.llm)
        self.language_model = frozen.language_model(self.parts["llm"], self.dtype, **self._language_changes())
        self.model = SoftPromptModel(self.blip2, self.language_model.config.width)
        self.compat = compat.resolve(config.compat)
        self._soft_prompt = jax.jit(self.soft_prompt)
        self._nats = jax.jit(self._count_nats)
        self.writing = Writing(self)
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
            self.lora.scale,
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
    def language_parameters(self) -> params.Tree:
        return frozen.load_language_model(self.parts["llm"], self.language_model, self.dtype, self.put("language"))

    def language(self, trainable: params.Tree) -> params.Tree:
        """The language model's parameters, with the adapters that were trained for it, if any were.

        Raises:
          ValueError: they are not among the trainable parameters.
        """
        if "language" not in self.lora.targets:
            return self.language_parameters
        if "language" not in trainable.get("lora", {}):
            raise ValueError(
                f"the language model has a LoRA of {self.lora.of('language')}, which is not among what is given"
            )
        return lora.attach(self.language_parameters, trainable["lora"]["language"], self.lora.scale)

    def adaptable(self, part: str) -> lora.Adaptable:
        if part != "language":
            return super().adaptable(part)
        return lora.adaptable(functools.partial(language.initialize, self.language_model))

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
        return super().frozen | {"language": self.language_parameters}

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

    def fresh_model(self, key: jax.Array) -> params.Tree:
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
        return True

    def read(self, trainable: params.Tree, image_embeds: jax.Array, prompts: Sequence[str]) -> jax.Array:
        """Soft prompts float[B, Q, D_language] of images float[B, P, D_image]; InstructBLIP's read the prompts, too."""
        return self._soft_prompt(trainable, image_embeds, self.writing.instructions(prompts))

    def captions(self, trainable, image_embeds, config, draws=None):
        prompts = [self.config.data.prompt] * len(image_embeds)
        soft_prompt = self.read(trainable, image_embeds, prompts)
        return self.writing.write(self.language(trainable), soft_prompt, prompts, config, draws)

    def evaluate(self, trainable, pictures: Pictures) -> tuple[dict[str, float], list[dict]]:
        """Captions and answers by greedy decoding, and how much the loss rises with the wrong picture."""
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
        language = self.language(trainable)
        true, shuffled = self._true_and_shuffled_loss(layout, language, soft_prompt, texts, captions)
        metrics = {"caption/loss": true, "caption/shuffled_image_loss_increase": shuffled - true}
        written, samples = self._written(language, soft_prompt, reading.examples, captions)
        return written | metrics, samples

    def _written(self, language, soft_prompt, examples, captions) -> tuple[dict[str, float], list[dict]]:
        """What is written for the pictures of some examples, judged."""
        data = self.config.data
        generated = self._write_all(language, soft_prompt, data.prompt, self.config.evaluation.max_new_tokens)
        scores = captioning.score(generated, [[caption] for caption in captions])
        metrics = {f"caption/{name}": value for name, value in scores.items()}
        samples = [
            {"kind": "caption", "key": example["key"], "text": caption, "generated": text}
            for example, caption, text in zip(examples, captions, generated, strict=True)
        ]
        if data.questions and all("category" in example for example in examples):
            answers = self._write_all(language, soft_prompt, data.question, data.max_answer_tokens)
            right = [answer == example["category"] for answer, example in zip(answers, examples, strict=True)]
            metrics["question/accuracy"] = float(np.mean(right))
            for sample, example, answer in zip(samples, examples, answers, strict=True):
                sample |= {"question": data.question, "answer": answer, "category": example["category"]}
        return metrics, samples

    def _evaluation_collate(self, examples: Sequence[dict]) -> Batch:
        return self.batches.collate([self.batches.prepare_caption(example) for example in examples])

    def _write_all(self, language, soft_prompt: np.ndarray, prompt: str, tokens: int) -> list[str]:
        """Greedily, a text for each soft prompt float32[N, Q, D]."""
        prompts, config = [prompt] * len(soft_prompt), GenerationConfig(tokens)
        label = f"writing behind {prompt!r}"
        return [text for (text,) in self.writing.write(language, soft_prompt, prompts, config, label=label)]

    def _count_nats(self, language, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Sum of the losses of the tokens that count, and their number, of soft prompts and texts."""
        texts = self.objective.texts(batch)
        weights = texts.counts.astype(jnp.float32)
        return self.objective.language_loss(language, batch["soft_prompt"], texts, weights), weights.sum()

    def _true_and_shuffled_loss(
        self, layout: Layout, language, soft_prompt, texts: Batch, captions
    ) -> tuple[float, float]:
        """Nats a target token with each caption's own picture, and with another's: half the set further on."""
        count = len(captions)
        other = np.roll(np.arange(count), count // 2)
        if count < 2 or all(captions[i] == captions[j] for i, j in enumerate(other)):
            raise ValueError("the loss with shuffled images needs at least two different captions")

        def mean_loss(soft_prompt: np.ndarray, label: str) -> float:
            total = tokens = 0.0
            for batch in layout.batches(texts | {"soft_prompt": soft_prompt}, label):
                loss, there = layout.call(self._nats, language, batch)
                total, tokens = total + float(loss), tokens + float(there)
            return total / tokens

        return mean_loss(soft_prompt, "loss"), mean_loss(soft_prompt[other], "loss with shuffled images")
