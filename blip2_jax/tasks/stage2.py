"""Stage 2: the Q-Former's output becomes a soft prompt of a frozen language model (paper section 3.3)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax import decoding, params
from blip2_jax.checkpoints import frozen, language
from blip2_jax.data.pipeline import Batch, Part, Pictures, Schema, collate_images, evaluation_batches
from blip2_jax.data.text import LanguageTokenizer, clean_caption, pad
from blip2_jax.evaluation import captioning
from blip2_jax.models.blip2 import SoftPromptModel
from blip2_jax.models.language import Row, join
from blip2_jax.models.language.decoder import Decoder
from blip2_jax.models.layers import causal_mask
from blip2_jax.monitoring.progress import progress
from blip2_jax.objectives.language_modeling import language_modeling_loss
from blip2_jax.tasks.common import Metrics, Task


class Stage2(Task):
    """Causal language modelling of captions, and of answers to questions, behind the soft prompt."""

    name = "stage2"

    def __init__(self, config, dtype=None):
        super().__init__(config, dtype)
        self.parts["llm"] = frozen.find("llm", config.llm)
        self.language_model = frozen.language_model(self.parts["llm"], self.dtype, **self._language_changes())
        self.model = SoftPromptModel(self.blip2, self.language_model.config.width)
        self._soft_prompt = jax.jit(self.soft_prompt)
        self._loss_sum = jax.jit(self._language_loss)
        self._generate = jax.jit(self._greedy, static_argnames="max_new_tokens")

    def _language_changes(self) -> dict[str, str]:
        activation = self.config.llm_activation
        if not activation:
            return {}
        kind = self.parts["llm"].model_type
        if kind != "t5" or activation not in ("gelu", "gelu_tanh"):
            raise ValueError(
                f"config.llm_activation = {activation!r} with a language model {kind!r}: expected '', or gelu or "
                "gelu_tanh with a T5"
            )
        return {"activation": activation}

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

    # Data: captions behind a fixed prompt, and answers behind a question.

    def training_parts(self) -> list[Part]:
        self._require_what_is_built()
        data = self.config.data
        asked = data.question_share if data.questions else 0.0
        if not 0 <= asked < 1:
            raise ValueError(f"data.question_share must be at least 0 and below 1, found {asked}")
        parts = self.mixture(data.train, self.prepare_caption, 1 - asked)
        return parts + (self.mixture(data.questions, self.prepare_question, asked) if asked else [])

    def prepare_caption(self, example: dict, rng: np.random.Generator | None = None) -> dict:
        text = clean_caption(example["caption"], self.config.data.lower_case)
        return self._prepare(example, self.config.data.prompt, text, self.config.data.max_text_tokens)

    def prepare_question(self, example: dict, rng: np.random.Generator | None = None) -> dict:
        if "category" not in example:
            raise ValueError(
                f"data.questions = {self.config.data.questions!r}: {example['key']} has no category to ask for; "
                "set data.questions='' to train on captions alone"
            )
        return self._prepare(
            example, self.config.data.question, example["category"], self.config.data.max_answer_tokens
        )

    def _prepare(self, example: dict, prompt: str, target: str, target_length: int) -> dict:
        target_ids = self.tokenizer.encode_target(target, target_length)
        return example | {"prompt_ids": self.tokenizer.encode_prompt(prompt), "target_ids": target_ids}

    def _lengths(self) -> tuple[int, int, int]:
        """The longest prompt, the longest target, and the longest row of one behind the other, in tokens."""
        data = self.config.data
        kinds = [(len(self.tokenizer.encode_prompt(data.prompt)), data.max_text_tokens)]
        if data.questions:
            kinds.append((len(self.tokenizer.encode_prompt(data.question)), data.max_answer_tokens))
        return *(max(lengths) for lengths in zip(*kinds, strict=True)), max(sum(kind) for kind in kinds)

    def schema(self) -> Schema:
        fields = {}
        for name, length in zip(("prompt", "target"), self._lengths(), strict=False):
            shape = (self.config.batch_size, length)
            fields[f"{name}_ids"] = jax.ShapeDtypeStruct(shape, np.int32)
            fields[f"{name}_mask"] = jax.ShapeDtypeStruct(shape, np.bool_)
        return self.image_schema() | fields

    def collate(self, examples: Sequence[dict]) -> Batch:
        batch = collate_images(examples)
        for name, length in zip(("prompt", "target"), self._lengths(), strict=False):
            rows = [example[f"{name}_ids"] for example in examples]
            batch[f"{name}_ids"], batch[f"{name}_mask"] = pad(rows, length, self.tokenizer.padding)
        return batch

    # Model and loss.

    def fresh(self, key: jax.Array) -> params.Tree:
        image = jnp.zeros((2, self.encoder.tokens, self.encoder.width))
        # InstructBLIP's Q-Former reads the instruction too, and so has the text's parameters.
        text = (jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 4), bool)) if self.config.instruct else ()
        return self.model.init(key, image, *text)["params"]

    def _require_what_is_built(self) -> None:
        """Say clearly what can so far be imported, exported and looked at, and not more."""
        if self.config.instruct or not isinstance(self.language_model, Decoder):
            what = "InstructBLIP" if self.config.instruct else f"{type(self.language_model).__name__} as config.llm"
            raise ValueError(f"{what}: import, export and inspect are there, training and generation not yet")

    def read_image(self, model: SoftPromptModel, image_embeds: jax.Array) -> jax.Array:
        return model(image_embeds)

    def soft_prompt(self, trainable: params.Tree, image_embeds: jax.Array, dropout_key: jax.Array | None = None):
        """float[B, P, D_image] -> float[B, Q, D_language]; with dropout if a key is given."""
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        embeds = image_embeds.astype(jnp.float32)
        return self.model.apply({"params": trainable}, embeds, deterministic=dropout_key is None, rngs=rngs)

    def _prefix(self, language: params.Tree, soft_prompt: jax.Array) -> jax.Array:
        """The beginning of a text as the language model knows it, then the soft prompt: float[B, N + Q, D]."""
        begin = jnp.tile(jnp.asarray(self.tokenizer.begin, jnp.int32), (len(soft_prompt), 1))
        embeds = self.language_model.apply({"params": language}, begin, method="embed")
        return jnp.concatenate([embeds, soft_prompt.astype(embeds.dtype)], axis=1)

    def _language_loss(self, language: params.Tree, soft_prompt: jax.Array, row: Row) -> tuple[jax.Array, jax.Array]:
        """Sum of the losses of the target tokens behind the soft prompt, and their number."""
        model = self.language_model.bind({"params": language})
        prefix = self._prefix(language, soft_prompt)
        embeds = jnp.concatenate([prefix, model.embed(row.ids)], axis=1)
        batch, length = embeds.shape[:2]
        # Padding stands at the end, where causality already hides it.
        positions = jnp.broadcast_to(jnp.arange(length), (batch, length))
        hidden, _ = model(embeds, positions, causal_mask(length))
        # The last query predicts the first token.
        features = hidden[:, prefix.shape[1] - 1 : -1]
        return language_modeling_loss(features, model.head(), None, row.ids, row.is_target, frozen_head=True)

    def loss(self, trainable, frozen, batch, key) -> tuple[jax.Array, Metrics]:
        dropout_key = key if self.blip2.qformer.dropout else None
        soft_prompt = self.soft_prompt(trainable, self.image_embeds(frozen, batch), dropout_key)
        row = self._row(batch)
        row = row._replace(is_target=row.is_target & batch["example_mask"][:, None])
        loss, tokens = self._language_loss(frozen["language"], soft_prompt, row)
        return loss / jnp.maximum(tokens, 1.0), {}

    def _row(self, batch: Batch) -> Row:
        prompt, target = ((batch[f"{name}_ids"], batch[f"{name}_mask"]) for name in ("prompt", "target"))
        return join(*prompt, *target, self._lengths()[2])

    # Generation and evaluation.

    def _greedy(self, language, soft_prompt, prompt_ids, prompt_mask, max_new_tokens: int):
        embeds = self.language_model.apply({"params": language}, prompt_ids, method="embed")
        image = self._prefix(language, soft_prompt)
        prefix = jnp.concatenate([image, embeds], axis=1)
        present = jnp.concatenate([jnp.ones(image.shape[:2], bool), prompt_mask], axis=1)
        return decoding.greedy(
            self.language_model,
            language,
            prefix,
            present,
            max_new_tokens=max_new_tokens,
            end_token=self.tokenizer.end,
        )

    def generate(self, soft_prompt: np.ndarray, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """Greedy texts for soft prompts float[B, Q, D] and as many prompts."""
        self._require_what_is_built()
        length = max(len(self.tokenizer.encode_prompt(prompt)) for prompt in prompts)
        ids, mask = self.tokenizer.prompts(prompts, length)
        tokens = self._generate(self._language, soft_prompt, ids, mask, max_new_tokens=max_new_tokens)
        return [self.tokenizer.decode(row).strip() for row in np.asarray(tokens)]

    def evaluate(self, trainable, pictures: Pictures) -> tuple[dict[str, float], list[dict]]:
        """Captions and answers by greedy decoding, and how much the loss rises with the wrong picture."""
        size, data = self.config.evaluation.batch_size, self.config.data
        examples, soft_prompts, rows = [], [], []
        for batch_examples, batch in evaluation_batches(pictures, self._evaluation_collate, size):
            soft_prompts.append(np.asarray(self._soft_prompt(trainable, batch["image_embeds"])))
            rows.append((self._row(batch), batch["example_mask"]))
            examples += batch_examples
        captions = [clean_caption(example["caption"], data.lower_case) for example in examples]
        write = lambda prompt, tokens: self._write_all(soft_prompts, len(examples), prompt, tokens)
        generated = write(data.prompt, self.config.evaluation.max_new_tokens)
        true, shuffled = self._true_and_shuffled_loss(np.concatenate(soft_prompts), rows, captions)
        metrics = {
            f"caption/{name}": value for name, value in captioning.score(generated, [[c] for c in captions]).items()
        }
        metrics |= {"caption/loss": true, "caption/shuffled_image_loss_increase": shuffled - true}
        samples = [
            {"kind": "caption", "key": example["key"], "text": caption, "generated": text}
            for example, caption, text in zip(examples, captions, generated, strict=True)
        ]
        if data.questions and all("category" in example for example in examples):
            answers = write(data.question, data.max_answer_tokens)
            right = [answer == example["category"] for answer, example in zip(answers, examples, strict=True)]
            metrics["question/accuracy"] = float(np.mean(right))
            for sample, example, answer in zip(samples, examples, answers, strict=True):
                sample |= {"question": data.question, "answer": answer, "category": example["category"]}
        return metrics, samples

    def _evaluation_collate(self, examples: Sequence[dict]) -> Batch:
        return self.collate([self.prepare_caption(example) for example in examples])

    def _write_all(self, soft_prompts: list[np.ndarray], count: int, prompt: str, tokens: int) -> list[str]:
        texts = []
        for part in progress(soft_prompts, desc=f"writing behind {prompt!r}", unit="batch", leave=False):
            texts += self.generate(part, [prompt] * len(part), tokens)
        return texts[:count]

    def _true_and_shuffled_loss(self, soft_prompts, rows, captions) -> tuple[float, float]:
        """Nats a target token with each caption's own picture, and with another's: half the set further on."""
        count = len(captions)
        other = np.roll(np.arange(count), count // 2)
        if count < 2 or all(captions[i] == captions[j] for i, j in enumerate(other)):
            raise ValueError("the loss with shuffled images needs at least two different captions")
        size = len(rows[0][1])

        def mean_loss(order: np.ndarray, label: str) -> float:
            order = np.pad(order, (0, len(rows) * size - count))
            total = tokens = 0.0
            for number, (row, real) in enumerate(progress(rows, desc=label, unit="batch", leave=False)):
                prompts = soft_prompts[order[number * size : (number + 1) * size]]
                row = row._replace(is_target=row.is_target & real[:, None])
                loss, count_ = self._loss_sum(self._language, prompts, row)
                total, tokens = total + float(loss), tokens + float(count_)
            return total / tokens

        return mean_loss(np.arange(count), "loss"), mean_loss(other, "loss with shuffled images")
