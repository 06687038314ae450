"""Stage 1: the Q-Former learns to read images, by ITC + ITM + ITG (paper section 3.2)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from blip2_jax import compat, decoding, params
from blip2_jax.checkpoints.bert import has_language_head
from blip2_jax.data.mixture import parse_mixture
from blip2_jax.data.pipeline import Batch, Part, Pictures
from blip2_jax.data.records import BadRecord, Source
from blip2_jax.data.text import clean_caption, log_frequencies
from blip2_jax.evaluation import classification, retrieval
from blip2_jax.evaluation.batches import Layout, Reading, in_batches
from blip2_jax.evaluation.retrieval import Found
from blip2_jax.evaluation.search import RowsOnDisk, search
from blip2_jax.models.blip2 import ImageTextModel
from blip2_jax.monitoring.progress import progress
from blip2_jax.parallel.exchange import EXCHANGES
from blip2_jax.tasks.common import Metrics, Task
from blip2_jax.tasks.stage1_batches import Stage1Batches
from blip2_jax.tasks.stage1_loss import Stage1Loss

# What reads text and nothing else.
TEXT = (r"qformer/(word|position)_embeddings/.*", r".*/text_mlp/.*")


class Stage1(Task):
    """Image-text contrastive learning, image-text matching, image-grounded text generation."""

    name = "stage1"

    def __init__(self, config, dtype=None):
        super().__init__(config, dtype)
        if config.data.max_text_tokens > self.blip2.qformer.max_positions:
            raise ValueError(
                f"data.max_text_tokens = {config.data.max_text_tokens}, but the BERT {config.bert!r} has "
                f"{self.blip2.qformer.max_positions} positions"
            )
        if config.evaluation.rerank_rule not in retrieval.RULES:
            raise ValueError(
                f"evaluation.rerank_rule = {config.evaluation.rerank_rule!r}: expected one of "
                f"{', '.join(retrieval.RULES)}"
            )
        classification.parse_templates(config.evaluation.templates)  # Raises what is wrong.
        if config.objective.exchange not in EXCHANGES:
            raise ValueError(
                f"objective.exchange = {config.objective.exchange!r}: expected one of {', '.join(EXCHANGES)}"
            )
        self.compat = compat.resolve(config.compat)
        self.model = ImageTextModel(self.blip2)
        # Of trainable parameters and images float[B, P, D], texts int32[B, T] with their masks, or pairs of them.
        self.image_features = jax.jit(self._encode_images)
        self.text_features = jax.jit(self._encode_texts)
        self.match_logits = jax.jit(self._match)
        self._read_images = jax.jit(self._read)
        constants = ("config", "start_token", "end_token")
        self._caption = jax.jit(functools.partial(decoding.caption, self.model), static_argnames=constants)

    def training_parts(self) -> list[Part]:
        return self.mixture(self.config.data.train, self.batches.prepare_caption)

    @functools.cached_property
    def batches(self) -> Stage1Batches:
        data = self.config.data
        return Stage1Batches(self.caption_tokenizer, data.max_text_tokens, data.lower_case)

    def fresh_model(self, key: jax.Array) -> params.Tree:
        image = jnp.zeros((2, self.encoder.tokens, self.encoder.width))
        ids, mask = jnp.zeros((2, 4), jnp.int32), jnp.ones((2, 4), bool)

        def every_pass(model: ImageTextModel):
            projected = model.project_image(image)
            seen = model.image_features(projected)
            model.text_features(ids, mask)
            model.match(projected, ids, mask)
            model.caption_features(seen.cache, ids, mask)

        return self.model.init(key, method=every_pass)["params"]

    def initialize(self, key: jax.Array) -> params.Tree:
        tree = super().initialize(key)
        prior = "qformer" in tree and self.has_bert and self.config.objective.itg_prior
        if prior and not has_language_head(self.parts["bert"].tensors):
            flat = params.flatten(tree)
            flat["qformer/lm_head/bias"] = jnp.asarray(self._token_prior(self.config.objective.itg_prior))
            tree = params.unflatten(flat)
        return tree

    def rate_table(self, trainable: params.Tree) -> params.Table[float]:
        text = [(row, self.config.optimizer.text_multiplier) for row in TEXT]
        adapters, rest = (r"lora/.*", self.lora.multiplier), super().rate_table(trainable)
        return params.relevant([adapters, *text, *rest], trainable)

    def _token_prior(self, captions: int) -> np.ndarray:
        """float32[V]: log frequency of the tokens to be predicted in the first captions of each training source."""
        texts = []
        for name, _ in parse_mixture(self.config.data.train):
            source = self.source(name)
            texts += [text for index in range(min(captions, len(source))) for text in _captions(source, index)]
        texts = [clean_caption(text, self.config.data.lower_case) for text in texts]
        ids, mask = self.caption_tokenizer(texts, self.config.data.max_text_tokens)
        return log_frequencies(ids[:, 1:], mask[:, 1:], self.blip2.qformer.vocab_size)

    @functools.cached_property
    def objective(self) -> Stage1Loss:
        """How a batch becomes the loss."""
        c = self.config
        o = c.objective
        return Stage1Loss(
            self.model,
            self.encoder.encode,
            self.caption_tokenizer.decoder_start,
            itc=o.itc,
            itm=o.itm,
            itg=o.itg,
            diversity=o.diversity,
            itm_every=_every("itm_share", o.itm_share),
            itg_every=_every("itg_share", o.itg_share),
            label_smoothing=o.label_smoothing,
            pieces=c.pieces,
            block=o.block,
            exchange=o.exchange,
            switches=self.compat,
            lora_scale=self.lora.scale,
        )

    def rows_in_step(self) -> int:
        o = self.config.objective
        return self.config.pieces * math.lcm(_every("itm_share", o.itm_share), _every("itg_share", o.itg_share))

    def value_and_gradients(self, trainable, frozen, batch, key):
        return self.objective.value_and_gradients(trainable, frozen, batch, key)

    # Captions.

    @property
    def writes(self) -> bool:
        return bool(self.config.objective.itg)

    def _read(self, trainable, image_embeds):
        read = lambda model, image: model.image_features(model.project_image(image)).cache
        return self.model.apply({"params": trainable}, image_embeds.astype(jnp.float32), method=read)

    def captions(self, trainable, image_embeds, config, draws=None):
        if not self.writes:
            raise ValueError("a stage 1 trained with objective.itg = 0 has not learnt to write captions")
        cache, tokenizer = self._read_images(trainable, image_embeds), self.caption_tokenizer
        written = self._caption(trainable, cache, config, tokenizer.decoder_start, tokenizer.end, draws)
        return [[tokenizer.decode(text) for text in texts] for texts in np.asarray(written.tokens)]

    # Evaluation.

    def pair_scores(
        self, trainable: params.Tree, image_embeds: jax.Array, image_features: jax.Array, texts: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """How well images and texts fit, pair by pair.

        Args:
          trainable: the parameters.
          image_embeds: float[B, P, D].
          image_features: float32[B, Q, E] of them, so that several texts an image need them once.
          texts: B cleaned captions.

        Returns:
          Cosines of the best query float32[B], and ITM's logits of {no match, match} float32[B, 2].
        """
        ids, mask = self.caption_tokenizer(texts, self.config.data.max_text_tokens)
        text_features = np.asarray(self.text_features(trainable, ids, mask))
        cosines = np.einsum("bqe,be->bq", np.asarray(image_features), text_features).max(-1)
        return cosines, np.asarray(self.match_logits(trainable, image_embeds, ids, mask))

    def read_image(self, model: ImageTextModel, image_embeds: jax.Array) -> jax.Array:
        return model.image_features(model.project_image(image_embeds)).features

    def _encode_images(self, trainable, image_embeds):
        return self.model.apply({"params": trainable}, image_embeds.astype(jnp.float32), method=self.read_image)

    def _encode_texts(self, trainable, ids, mask):
        return self.model.apply({"params": trainable}, ids, mask, method="text_features")

    def _match(self, trainable, image_embeds, ids, mask):
        def method(model, image_embeds, ids, mask):
            return model.match(model.project_image(image_embeds), ids, mask)

        return self.model.apply({"params": trainable}, image_embeds.astype(jnp.float32), ids, mask, method=method)

    @functools.cached_property
    def _validation(self) -> Callable[[params.Tree, Batch, jax.Array], Metrics]:
        """The losses of a batch, every row of which takes part in every term, without dropout."""
        quiet = dataclasses.replace(self.blip2.qformer, dropout=0.0, attention_dropout=0.0)
        objective = dataclasses.replace(
            self.objective,
            model=ImageTextModel(dataclasses.replace(self.blip2, qformer=quiet)),
            itm_every=1,
            itg_every=1,
            # A mean over ranks would depend on the mesh.
            switches=dataclasses.replace(self.compat, rank_token_mean=False),
        )

        @jax.jit
        def losses(trainable: params.Tree, batch: Batch, number: jax.Array) -> Metrics:
            key = jax.random.fold_in(jax.random.key(self.config.seed), number)
            _, metrics = objective.loss(trainable, {}, batch, key)
            return {name: value for name, value in metrics.items() if name.startswith("loss_")}

        return losses

    def evaluate(self, trainable, pictures: Pictures) -> tuple[dict[str, float], list[dict]]:
        """Losses, and retrieval by ITC and re-ranked by ITM; samples are each caption's and each picture's first finds.

        A loss is the mean over the examples of what each has in its batch of config.evaluation.batch_size; ITM's wrong
        ones are drawn by the same noise every time. Of an image with several captions it sees the first, retrieval all.
        """
        layout = self.evaluation_layout()
        reading = Reading(layout, pictures, self._evaluation_collate)
        losses = []
        with contextlib.closing(RowsOnDisk()) as features:
            for number, (_, batch) in enumerate(reading):
                features.append(layout.own(layout.run(self.image_features, trainable, batch["image_embeds"])))
                losses.append(layout.call(self._validation, trainable, batch, np.int32(number)))
            clean = lambda texts: [clean_caption(text, self.config.data.lower_case) for text in texts]
            captions = [clean(example["captions"]) for example in reading.examples]
            gallery = retrieval.gallery(captions)
            tokens = self.caption_tokenizer(gallery.texts, self.config.data.max_text_tokens)
            encode = functools.partial(self.text_features, trainable)
            text_features = in_batches(layout, encode, tokens, "captions")
            keep = max(self.config.evaluation.rerank, *retrieval.RANKS)
            found = search(layout, features, reading.numbers, text_features, keep)
            classified = self._classified(trainable, layout, pictures, reading, features)
        ranked = {"itc": found}
        if self.config.evaluation.rerank and self.config.objective.itm:
            match = functools.partial(self._match_pairs, trainable, layout, pictures, reading.numbers, *tokens)
            ranked |= self._reranked(float(trainable["temperature"]), *found, match)
        recalls = {by: retrieval.both_directions(gallery, *both) for by, both in ranked.items()}
        metrics = _mean_losses(losses, reading.numbers // layout.batch_size)
        metrics |= {f"retrieval/{path}": value for path, value in params.flatten(recalls).items()}
        metrics |= {f"classification/{path}": value for path, value in params.flatten(classified).items()}
        keys = [example["key"] for example in reading.examples]
        samples = (
            _retrieval_samples(by, keys, captions, gallery, *ranked[by]) for by in ("itc", "itm") if by in ranked
        )
        return metrics, list(itertools.chain(*samples))

    def class_features(
        self, trainable: params.Tree, layout: Layout, classes: Sequence[str], templates: Sequence[str]
    ) -> np.ndarray:
        """Names of classes in templates with one "{}" -> float32[C, E] of unit length, to compare with images."""
        tokens = self._tokens(classification.prompts(classes, templates))
        features = in_batches(layout, functools.partial(self.text_features, trainable), tokens, "classes")
        return classification.class_features(features, len(templates))

    def _classified(self, trainable, layout, pictures, reading, features) -> dict[str, dict[str, float]]:
        """Zero-shot accuracy by ITC, and with the best classes judged again by ITM; of pictures with a category alone.

        The classes are the categories that the pictures have; ITM judges each in all templates, and their mean counts.
        """
        templates = classification.parse_templates(self.config.evaluation.templates)
        categories = [example.get("category") for example in reading.examples]
        if not templates or None in categories:
            return {}
        classes, labels = np.unique(categories, return_inverse=True)
        texts, top = self.class_features(trainable, layout, classes.tolist(), templates), self.config.evaluation.rerank
        keep = max(top, *classification.RANKS)
        found, _ = search(layout, features, reading.numbers, texts, keep)
        result = {"itc": classification.accuracies(found.index, labels)}
        if not (top and self.config.objective.itm):
            return result
        first = Found(found.scores[:, :top], found.index[:, :top])
        shape = (*first.index.shape, len(templates))
        image, chosen, template = (x.ravel() for x in np.indices(shape))
        prompt = first.index[image, chosen] * len(templates) + template
        tokens = self._tokens(classification.prompts(classes.tolist(), templates))
        logits = self._match_pairs(trainable, layout, pictures, reading.numbers, *tokens, image, prompt, "ITM, classes")
        rule, temperature = retrieval.RULES[self.config.evaluation.rerank_rule], float(trainable["temperature"])
        judged = rule(logits, first.scores[image, chosen], temperature).reshape(shape).mean(-1)
        return result | {"itm": classification.accuracies(retrieval.rerank(found, judged).index, labels)}

    def _tokens(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Of texts, cleaned: int32[N, T] and their mask."""
        clean = [clean_caption(text, self.config.data.lower_case) for text in texts]
        return self.caption_tokenizer(clean, self.config.data.max_text_tokens)

    def _reranked(self, temperature: float, of_images, of_texts, match) -> dict[str, tuple[Found, Found]]:
        """The best by ITC judged again: "itm" by the recipe's rule, and by name ITM alone and LAVIS's sum with ITC.

        `match` gives ITM's logits of images and captions.
        """
        top, named = self.config.evaluation.rerank, self.config.evaluation.rerank_rule
        rules = {"itm": named, "itm_alone": "match", "itm_lavis": "lavis"}

        def judge(found: Found, pairs: Callable, label: str) -> dict[str, Found]:
            first = Found(found.scores[:, :top], found.index[:, :top])
            query = np.broadcast_to(np.arange(len(first.index))[:, None], first.index.shape)
            logits = match(*pairs(query.ravel(), first.index.ravel()), label)
            judged = lambda rule: retrieval.RULES[rule](logits, first.scores.ravel(), temperature)
            return {by: retrieval.rerank(found, judged(rule).reshape(query.shape)) for by, rule in rules.items()}

        images = judge(of_images, lambda query, found: (query, found), "ITM, captions of an image")
        texts = judge(of_texts, lambda query, found: (found, query), "ITM, images of a caption")
        return {by: (images[by], texts[by]) for by in rules}

    def _match_pairs(
        self, trainable, layout: Layout, pictures: Pictures, numbers, ids, mask, image, text, label
    ) -> np.ndarray:
        """ITM's logits of pairs of an image and a caption, float32[N, 2].

        Image tokens are read again from the files they were computed into, in the order of the images: no more than
        those of a batch are in memory.

        Args:
          trainable: the parameters.
          layout: of the batches in which pairs are judged.
          pictures: with the image tokens.
          numbers: int[images], which record each image is.
          ids: int32[texts, T], the captions, with their `mask`.
          mask: bool[texts, T].
          image: int[N], of each pair.
          text: int[N].
          label: of the progress bar.
        """
        size, logits = layout.batch_size, np.zeros((len(image), 2), np.float32)
        order = np.argsort(image, kind="stable")
        tokens = functools.lru_cache(size)(lambda number: pictures.features[0, number])
        for start in progress(range(0, len(order), size), desc=label, unit="batch", leave=False):
            chosen = np.resize(order[start : start + size], size)  # Where there is no pair, one again.
            own = chosen[layout.rows]
            batch = {
                "image_embeds": np.stack([tokens(int(numbers[number])) for number in image[own]]),
                "text_ids": ids[text[own]],
                "text_mask": mask[text[own]],
            }
            logits[chosen] = layout.call(self.match_logits, trainable, *layout.place(batch).values())
        return logits

    def _evaluation_collate(self, examples: Sequence[dict]) -> Batch:
        return self.batches.collate([self.batches.prepare_caption(example) for example in examples])


def _captions(source: Source, index: int) -> list[str]:
    """Of a record; none of one that cannot be used."""
    try:
        return source[index]["captions"]
    except BadRecord:
        return []


def _mean_losses(losses: Sequence[dict[str, np.ndarray]], batches: np.ndarray) -> dict[str, float]:
    """Of the losses of batches the mean over examples, whose batches are int[N]."""
    weights = np.bincount(batches, minlength=len(losses)) / len(batches)
    return {name: float(sum(weights * [loss[name] for loss in losses])) for name in losses[0]}


def _every(name: str, share: float) -> int:
    """A share of the rows as every n-th row."""
    step = round(1 / share) if 0 < share <= 1 else 0
    if not step or abs(step * share - 1) > 1e-6:
        raise ValueError(
            f"objective.{name} = {share}: expected 1, 1/2, 1/3, ... of the rows; 0 as the term's weight leaves it out"
        )
    return step


def _retrieval_samples(
    by, keys, captions, gallery, of_images, of_texts, shown: int = 5, most: int = 1000
) -> list[dict]:
    """For captions the pictures found first, for pictures the captions, as the report shows them: `most` of each."""
    samples = []
    for text in _spread(len(gallery.texts), most):
        found = of_texts.index[text, :shown]
        sample = {"kind": "text_to_image", "by": by, "text": gallery.texts[text]}
        right = gallery.right(found, text).tolist()
        samples.append(sample | {"found": [keys[image] for image in found], "right": right})
    for image in _spread(len(keys), most):
        found = of_images.index[image, :shown]
        sample = {"kind": "image_to_text", "by": by, "key": keys[image], "text": captions[image][0]}
        sample |= {"found": [gallery.texts[text] for text in found], "right": gallery.right(image, found).tolist()}
        samples.append(sample | {"similarity": float(of_images.scores[image, 0])})
    return samples


def _spread(count: int, most: int) -> list[int]:
    """At most so many numbers below `count`, evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int)).tolist()
