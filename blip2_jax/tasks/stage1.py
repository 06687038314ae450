"""Stage 1: the Q-Former learns to read images, by ITC + ITM + ITG (paper section 3.2)."""

from __future__ import annotations

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
from blip2_jax.evaluation import retrieval
from blip2_jax.evaluation.batches import Layout, Reading, in_batches
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

    def fresh(self, key: jax.Array) -> params.Tree:
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
        if self.has_bert and self.config.objective.itg_prior and not has_language_head(self.parts["bert"].tensors):
            flat = params.flatten(tree)
            flat["qformer/lm_head/bias"] = jnp.asarray(self._token_prior(self.config.objective.itg_prior))
            tree = params.unflatten(flat)
        return tree

    def rate_table(self, trainable: params.Tree) -> params.Table[float]:
        return [(row, self.config.optimizer.text_multiplier) for row in TEXT] + list(super().rate_table(trainable))

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

    def captions(self, trainable, image_embeds, config, draws):
        if not self.writes:
            raise ValueError("a stage 1 trained with objective.itg = 0 has not learnt to write captions")
        cache, tokenizer = self._read_images(trainable, image_embeds), self.caption_tokenizer
        write = lambda draw: self._caption(trainable, cache, config, tokenizer.decoder_start, tokenizer.end, draw)
        written = [np.asarray(write(draw)) for draw in draws]
        return [[tokenizer.decode(row) for row in rows] for rows in zip(*written, strict=True)]

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
        ones are drawn by the same noise every time.
        """
        layout = self.evaluation_layout()
        reading = Reading(layout, pictures, self._evaluation_collate)
        judges = bool(self.config.evaluation.rerank and self.config.objective.itm)
        features, losses, tokens = [], [], []
        for number, (own, batch) in enumerate(reading):
            features.append(layout.call(self.image_features, trainable, batch["image_embeds"]))
            losses.append(layout.call(self._validation, trainable, batch, np.int32(number)))
            if judges:
                tokens.append(own["image_embeds"])
        captions = [clean_caption(example["caption"], self.config.data.lower_case) for example in reading.examples]
        gallery = retrieval.gallery(captions)
        ids, mask = self.caption_tokenizer(gallery.texts, self.config.data.max_text_tokens)
        encode = functools.partial(self.text_features, trainable)
        text_features = in_batches(layout, encode, (ids, mask), "captions")
        scores = np.einsum("iqe,te->itq", reading.of_examples(features), text_features).max(-1)
        ranked = {"itc": (scores, scores.T)}
        if judges:
            match = functools.partial(self._match_pairs, trainable, layout, reading.numbers, tokens, ids, mask)
            ranked["itm"] = self._reranked(float(trainable["temperature"]), scores, match)
        recalls = {
            by: retrieval.both_directions(of_images, gallery.relevant, of_texts)
            for by, (of_images, of_texts) in ranked.items()
        }
        metrics = _mean_losses(losses, reading.numbers // layout.batch_size)
        metrics |= {f"retrieval/{path}": value for path, value in params.flatten(recalls).items()}
        keys = [example["key"] for example in reading.examples]
        samples = (_retrieval_samples(by, keys, captions, gallery, *found) for by, found in ranked.items())
        return metrics, list(itertools.chain(*samples))

    def _reranked(self, temperature: float, scores, match) -> tuple[np.ndarray, np.ndarray]:
        """Scores, for images and for texts, when the best by ITC are judged again; `match` gives ITM's logits."""
        top, rule = self.config.evaluation.rerank, retrieval.RULES[self.config.evaluation.rerank_rule]

        def judge(image: np.ndarray, text: np.ndarray, label: str) -> np.ndarray:
            return rule(match(image, text, label), scores[image, text], temperature)

        of_images = retrieval.rerank(scores, lambda i, t: judge(i, t, "ITM, captions of an image"), top)
        of_texts = retrieval.rerank(scores.T, lambda t, i: judge(i, t, "ITM, images of a caption"), top)
        return of_images, of_texts

    def _match_pairs(self, trainable, layout: Layout, numbers, tokens, ids, mask, image, text, label) -> np.ndarray:
        """ITM's logits of pairs of an image and a caption, float32[N, 2].

        Every pair is judged where its image was read, so that no process has to have the tokens of all images.

        Args:
          trainable: the parameters.
          layout: of the batches in which images were read, and in which pairs are judged.
          numbers: int[images], which record each image is.
          tokens: [b, P, D] of every batch, those of this process.
          ids: int32[texts, T], the captions, with their `mask`.
          mask: bool[texts, T].
          image: int[N], of each pair.
          text: int[N].
          label: of the progress bar.
        """
        size, logits = layout.batch_size, np.zeros((len(image), 2), np.float32)
        dealt = layout.deal(layout.shard(numbers[image]))
        for chosen in progress(dealt, desc=label, unit="batch", leave=False):
            own = chosen[layout.rows]
            # Where there is no pair, any image of this process with any caption.
            record = np.where(own < 0, layout.rows, numbers[image[own]])
            batch = {
                "image_embeds": np.stack([tokens[n // size][np.searchsorted(layout.rows, n % size)] for n in record]),
                "text_ids": ids[text[own]],
                "text_mask": mask[text[own]],
            }
            found = layout.call(self.match_logits, trainable, *layout.place(batch).values())
            logits[chosen[chosen >= 0]] = found[chosen >= 0]
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


def _retrieval_samples(by, keys, captions, gallery, scores, text_scores, shown: int = 5) -> list[dict]:
    """For each caption the pictures found first, for each picture the captions, as the report shows them."""
    samples = []
    for text, order in enumerate(retrieval.ranking(text_scores)[:, :shown]):
        found = [keys[image] for image in order]
        right = [bool(gallery.relevant[image, text]) for image in order]
        sample = {"kind": "text_to_image", "by": by, "text": gallery.texts[text]}
        samples.append(sample | {"found": found, "right": right})
    for image, order in enumerate(retrieval.ranking(scores)[:, :shown]):
        found = [gallery.texts[text] for text in order]
        right = [bool(gallery.relevant[image, text]) for text in order]
        sample = {"kind": "image_to_text", "by": by, "key": keys[image], "text": captions[image]}
        samples.append(sample | {"found": found, "right": right, "similarity": float(scores[image].max())})
    return samples
