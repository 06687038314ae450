"""How a batch of image-caption pairs becomes the loss of stage 1, and its gradient (paper section 3.2).

    image --[encoder]--> image_embeds --> keys, values --+--> queries alone ----> ITC with all captions of the batch
                               |                         |         `-- cache ---> ITG
                               |                         +--> queries + own caption, + a wrong caption --+
                               `--[take_rows]--> a wrong image's --> queries + own caption --------------+--> ITM

Everything but ITC and the choice of the wrong ones is a sum over rows, which is what makes a gradient in pieces exact.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from blip2_jax import params
from blip2_jax.compat import Compat
from blip2_jax.data.pipeline import Batch
from blip2_jax.models import lora
from blip2_jax.models.blip2 import ImageFeatures, ImageTextModel
from blip2_jax.models.layers import KeyValue
from blip2_jax.models.qformer import QFormerCache
from blip2_jax.objectives import contrastive, diversity, language_modeling, matching
from blip2_jax.parallel import exchange
from blip2_jax.parallel.rows import rows_of
from blip2_jax.tasks.encoding import Encode, image_embeds

Metrics = dict[str, jax.Array]

# ITM's true pair, the caption with a wrong image, the image with a wrong caption.
_TRIPLE = (1, 0, 0)

# Each pass has dropout of its own.
_IMAGE_PASS, _TEXT_PASS, _MATCH_PASS, _CAPTION_PASS = range(4)


class Reading(NamedTuple):
    """What images and captions are by themselves.

    Attributes:
      image: keys and values float[C, B, P, H, d].
      seen: what the queries make of it.
      text_features: float32[B, E].
    """

    image: KeyValue
    seen: ImageFeatures
    text_features: jax.Array


class RowTerms(NamedTuple):
    """Sums over rows, float32[] each."""

    itm: jax.Array
    itm_accuracy_positive: jax.Array
    itm_accuracy_negative: jax.Array
    itg: jax.Array
    diversity: jax.Array
    query_cosine: jax.Array


class Work(NamedTuple):
    """What the rows of a batch have to do, by row, so that it can be cut into pieces.

    Attributes:
      weights: float32[B], summing to 1 over the real rows of the whole batch.
      wrong_embeds: float[B', P, D], a wrong image's tokens for each row that takes part in ITM.
      match, generate: texts, row numbers and weights of the rows that take part in ITM and in ITG.

    What a term that is left out needs is None.
    """

    weights: jax.Array
    wrong_embeds: jax.Array | None
    match: Batch | None
    generate: Batch | None


@dataclasses.dataclass(frozen=True)
class Stage1Loss:
    """The objective of stage 1; knows no files, no tokenizer and no optimizer.

    Trainable are the parameters of `model`, and those of the encoder if they stand beside them under "vision"; if not,
    they are frozen["vision"]. Adapters stand under "lora", and the Q-Former that they adapt is frozen["qformer"].

    Attributes:
      model: the Q-Former with its heads.
      encode: (parameters, a batch's image) -> image_embeds float[B, P, D], raw from the encoder.
      decoder_start: the token [DEC], which stands before a caption in ITG.
      itc, itm, itg, diversity: weights of the terms; the number 0 leaves one out.
      itm_every, itg_every: the rows 0, n, 2n, ... take part in ITM and in ITG.
      label_smoothing: of ITC and ITG.
      pieces: in how many pieces the batch goes through the model.
      block: captions that ITC compares at once with a device's images.
      exchange: how wrong images' tokens travel; see `exchange.take_rows`.
      switches: what is done as LAVIS does it.
      lora_scale: of adapters.
    """

    model: ImageTextModel
    encode: Encode
    decoder_start: int
    itc: float = 1.0
    itm: float = 1.0
    itg: float = 1.0
    diversity: float = 0.0
    itm_every: int = 1
    itg_every: int = 1
    label_smoothing: float = 0.1
    pieces: int = 1
    block: int = 512
    exchange: str = "ring"
    switches: Compat = dataclasses.field(default_factory=Compat)
    lora_scale: float = 0.0

    def value_and_gradients(
        self,
        trainable: params.Tree,
        frozen: params.Tree,
        batch: Batch,
        key: jax.Array,
        negatives: matching.HardNegatives | None = None,
    ) -> tuple[tuple[jax.Array, Metrics], params.Tree]:
        """Loss float32[] and metrics, and the gradient by `trainable`.

        Args:
          trainable, frozen: see the class.
          batch: of `Stage1.schema`; rows without `example_mask` weigh nothing.
          key: of this step.
          negatives: the wrong ones, where they are known; else they are drawn.
        """
        if self.pieces > 1:
            return self._in_pieces(trainable, frozen, batch, key, negatives)
        loss = lambda trainable: self.loss(trainable, frozen, batch, key, negatives)
        return jax.value_and_grad(loss, has_aux=True)(trainable)

    def loss(self, trainable, frozen, batch: Batch, key: jax.Array, negatives=None) -> tuple[jax.Array, Metrics]:
        """Loss float32[] and metrics of a batch in one piece."""
        batch, (trainable, frozen) = _numbered(batch), lora.assemble(trainable, frozen, self.lora_scale)
        embeds = image_embeds(self.encode, trainable, frozen, batch)
        read = self._read(trainable, embeds, batch, key)
        features = read.seen.features, read.text_features
        itc = self._compare(*features, trainable["temperature"], batch)
        negatives = negatives or self._draw(*features, trainable["temperature"], batch, key)
        work = self._work(embeds, batch, negatives)
        return self._total(itc, self._row_terms(trainable, read, work, key), trainable, work, batch, negatives)

    # What images and captions are by themselves.

    def _apply(self, trainable, method: str, number: int, key: jax.Array, *inputs: Any, rows: jax.Array) -> Any:
        """A pass of the model, with dropout by the numbers of its rows if the model has any."""
        config, own = self.model.config.qformer, _of_model(trainable)
        if not (config.dropout or config.attention_dropout):
            return self.model.apply(own, *inputs, method=method)
        rngs = {"dropout": jax.random.fold_in(_dropout_key(key), number)}
        return self.model.apply(own, *inputs, method=method, dropout_rows=rows, rngs=rngs)

    def _project(self, trainable, embeds: jax.Array) -> KeyValue:
        return self.model.apply(_of_model(trainable), embeds, method="project_image")

    def _read(self, trainable, embeds: jax.Array, batch: Batch, key: jax.Array) -> Reading:
        rows = batch["row"]
        image = self._project(trainable, embeds)
        seen = self._apply(trainable, "image_features", _IMAGE_PASS, key, image, rows=rows)
        text = batch["text_ids"], batch["text_mask"]
        return Reading(image, seen, self._apply(trainable, "text_features", _TEXT_PASS, key, *text, rows=rows))

    # What needs the whole batch.

    def _pairs(self, batch: Batch) -> contrastive.Pairs:
        return contrastive.Pairs(batch["image_id"], batch["text_id"], batch["example_mask"], self.switches.positives)

    def _compare(self, image_features, text_features, temperature, batch: Batch) -> jax.Array:
        if _left_out(self.itc):
            return jnp.float32(0)
        return contrastive.contrastive_loss(
            image_features,
            text_features,
            temperature,
            self._pairs(batch),
            label_smoothing=self.label_smoothing,
            gather_gradient=self.switches.gather_gradient,
            block=self.block,
        )

    def _draw(self, image_features, text_features, temperature, batch: Batch, key) -> matching.HardNegatives | None:
        if _left_out(self.itm):
            return None
        pairs = self._pairs(batch)
        return matching.hard_negatives(
            _negatives_key(key),
            image_features,
            text_features,
            temperature,
            pairs,
            sampling=self.switches.negatives,
            block=self.block,
        )

    def _work(self, embeds: jax.Array, batch: Batch, negatives: matching.HardNegatives | None) -> Work:
        """What the rows of the batch have to do, with the weight that each has in the whole batch."""
        shards, real = rows_of(len(embeds)).shards, batch["example_mask"]
        weights = real / jnp.maximum(real.sum(), 1)
        wrong_embeds = match = generate = None
        if not _left_out(self.itm):
            pick = lambda x: _every(x, self.itm_every)
            valid = pick(negatives.valid)
            labels = jnp.broadcast_to(jnp.array(_TRIPLE), (len(valid), 3))
            counted = jnp.stack([pick(real), valid, valid], axis=1)
            wrong_text = pick(negatives.text)
            wrong_embeds = exchange.take_rows(embeds, pick(negatives.image), self.exchange)
            match = {
                "row": pick(batch["row"]),
                "own_ids": pick(batch["text_ids"]),
                "own_mask": pick(batch["text_mask"]),
                "wrong_ids": exchange.take_rows(batch["text_ids"], wrong_text, "gather"),
                "wrong_mask": exchange.take_rows(batch["text_mask"], wrong_text, "gather"),
                "labels": labels,
                "weights": matching.matching_weights(labels, counted),
            }
        if not _left_out(self.itg):
            pick = lambda x: _every(x, self.itg_every)
            ids, mask = pick(batch["text_ids"]).at[:, 0].set(self.decoder_start), pick(batch["text_mask"])
            targets, wanted = language_modeling.next_token_targets(ids, mask)
            ranks = (self.switches.world_size or shards) if self.switches.rank_token_mean else 1
            weighed = language_modeling.token_weights(wanted & pick(real)[:, None], ranks)
            generate = {"row": pick(batch["row"]), "ids": ids, "mask": mask, "targets": targets, "weights": weighed}
        return Work(weights, wrong_embeds, match, generate)

    # What is a sum over rows.

    def _row_terms(self, trainable, read: Reading, work: Work, key: jax.Array) -> RowTerms:
        apart = diversity.query_diversity(read.seen.query_output, work.weights)
        zero = jnp.float32(0)
        itm = matching.MatchingLoss(zero, zero, zero)
        if work.match is not None:
            itm = self._match(trainable, read.image, work.wrong_embeds, work.match, key)
        itg = zero if work.generate is None else self._generate(trainable, read.seen.cache, work.generate, key)
        return RowTerms(*itm, itg, *apart)

    def _match(self, trainable, image: KeyValue, wrong_embeds, work: Batch, key) -> matching.MatchingLoss:
        """Triples: the pair, the caption with a wrong image, the image with a wrong caption."""
        image = jax.tree.map(lambda x: _every(x, self.itm_every, axis=1), image)
        wrong_image = self._project(trainable, wrong_embeds)
        both = lambda own, wrong: jnp.stack([own, wrong], axis=1).reshape(-1, *own.shape[1:])
        texts = both(work["own_ids"], work["wrong_ids"]), both(work["own_mask"], work["wrong_mask"])
        numbers = both(3 * work["row"], 3 * work["row"] + 2)
        judge = lambda *inputs, rows: self._apply(trainable, "match", _MATCH_PASS, key, *inputs, rows=rows)
        of_image = judge(image, *texts, rows=numbers).reshape(-1, 2, 2)
        of_wrong = judge(wrong_image, work["own_ids"], work["own_mask"], rows=3 * work["row"] + 1)
        logits = jnp.stack([of_image[:, 0], of_wrong, of_image[:, 1]], axis=1)
        labels, weights = jax.tree.map(jnp.ravel, (work["labels"], work["weights"]))
        return matching.matching_loss(logits.reshape(-1, 2), labels, weights)

    def _generate(self, trainable, cache: QFormerCache, work: Batch, key: jax.Array) -> jax.Array:
        """Sum of the weighted losses of captions behind the cached queries, [DEC] in the place of [CLS]."""
        groups = jax.tree.map(lambda x: _every(x, self.itg_every, axis=1), cache.groups)
        cache = QFormerCache(groups, jax.tree.map(lambda x: _every(x, self.itg_every), cache.tail))
        text = work["ids"], work["mask"]
        output = self._apply(trainable, "caption_features", _CAPTION_PASS, key, cache, *text, rows=work["row"])
        return language_modeling.language_modeling_loss(
            *output, work["targets"], work["weights"], label_smoothing=self.label_smoothing
        )

    def _total(self, itc, terms: RowTerms, trainable, work: Work, batch, negatives) -> tuple[jax.Array, Metrics]:
        loss = self.itc * itc + self.itm * terms.itm + self.itg * terms.itg + self.diversity * terms.diversity
        metrics = {"temperature": trainable["temperature"], "query_cosine": terms.query_cosine}
        if not _left_out(self.itc):
            metrics["loss_itc"] = itc
        if not _left_out(self.itm):
            metrics |= {
                "loss_itm": terms.itm,
                "itm_accuracy_positive": terms.itm_accuracy_positive,
                "itm_accuracy_negative": terms.itm_accuracy_negative,
                "itm_rows_without_negative": batch["example_mask"].sum() - negatives.valid.sum(),
            }
        if not _left_out(self.itg):
            metrics["loss_itg"] = terms.itg
        return loss, metrics

    # In pieces, as GradCache (arXiv 2101.06983) does it.

    def _in_pieces(self, trainable, frozen, batch: Batch, key: jax.Array, negatives):
        """The gradient of `loss`, with the activations of one piece at a time.

        The features of all pieces come first, without anything kept; ITC's gradient by these features is then what each
        piece sends back through its passes, which run again, together with the terms that are sums over rows.
        """
        batch, differentiated = _numbered(batch), trainable
        trainable, _ = lora.assemble(differentiated, frozen, self.lora_scale)
        rows = rows_of(len(batch["row"]))
        cut = lambda tree: jax.tree.map(lambda x: rows_of(len(x)).pieces(x, self.pieces), tree)
        pieces = cut(batch)
        embeds = jax.lax.map(lambda piece: image_embeds(self.encode, trainable, frozen, piece), pieces)

        def features(inputs):
            read = self._read(trainable, *inputs, key)
            return read.seen.features, read.text_features

        known = jax.tree.map(rows.whole, jax.lax.map(features, (embeds, pieces)))
        compare = lambda *inputs: self._compare(*inputs, batch)
        itc, pulls = jax.value_and_grad(compare, argnums=(0, 1, 2))(*known, trainable["temperature"])
        negatives = negatives or self._draw(*known, trainable["temperature"], batch, key)
        whole_embeds = rows.whole(embeds)
        work = self._work(whole_embeds, batch, negatives)

        def piece_loss(differentiated, embeds, wrong_embeds, work, piece, pulls):
            trainable, _ = lora.assemble(differentiated, frozen, self.lora_scale)
            work = work._replace(wrong_embeds=wrong_embeds)
            read = self._read(trainable, embeds, piece, key)
            terms = self._row_terms(trainable, read, work, key)
            pulled = jnp.vdot(read.seen.features, pulls[0]) + jnp.vdot(read.text_features, pulls[1])
            loss = self.itm * terms.itm + self.itg * terms.itg + self.diversity * terms.diversity
            return loss + self.itc * pulled, terms

        trained = "vision" in trainable and "image_embeds" not in batch

        def body(carry, inputs):
            differentiate = jax.grad(piece_loss, argnums=(0, 1, 2) if trained else (0,), has_aux=True)
            (gradients, *by_embeds), terms = differentiate(differentiated, *inputs)
            return jax.tree.map(jnp.add, carry, (gradients, terms)), by_embeds

        zeros = jax.tree.map(jnp.zeros_like, differentiated), RowTerms(*[jnp.float32(0)] * len(RowTerms._fields))
        inputs = embeds, cut(work.wrong_embeds), cut(work._replace(wrong_embeds=None)), pieces, cut(pulls[:2])
        (gradients, terms), by_embeds = jax.lax.scan(body, zeros, inputs)
        gradients |= {"temperature": gradients["temperature"] + self.itc * pulls[2]}
        if trained:
            by_own, by_wrong = by_embeds
            if not _left_out(self.itm):
                index = _every(negatives.image, self.itm_every)
                _, back = jax.vjp(lambda x: exchange.take_rows(x, index, self.exchange), whole_embeds)
                by_own += rows.pieces(back(rows_of(len(index)).whole(by_wrong))[0], self.pieces)
            gradients |= {"vision": self._encoder_gradient(trainable["vision"], pieces, by_own)}
        return self._total(itc, terms, trainable, work, batch, negatives), gradients

    def _encoder_gradient(self, vision: params.Tree, pieces: Batch, by_embeds: jax.Array) -> params.Tree:
        """Gradient by the encoder's parameters, from that by its tokens float[pieces, B / pieces, P, D]."""

        def body(gradients, inputs):
            image, pull = inputs
            _, back = jax.vjp(lambda vision: self.encode(vision, image), vision)
            return jax.tree.map(jnp.add, gradients, back(pull)[0]), None

        zeros = jax.tree.map(jnp.zeros_like, vision)
        return jax.lax.scan(body, zeros, (pieces["image"], by_embeds))[0]


def _of_model(trainable: params.Tree) -> dict[str, params.Tree]:
    """Without an encoder that is trained beside it."""
    return {"params": {name: tree for name, tree in trainable.items() if name != "vision"}}


def _left_out(weight: float | jax.Array) -> bool:
    return isinstance(weight, int | float) and weight == 0


def _numbered(batch: Batch) -> Batch:
    return batch | {"row": jnp.arange(len(batch["text_ids"]), dtype=jnp.uint32)}


def _dropout_key(key: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, 0)


def _negatives_key(key: jax.Array) -> jax.Array:
    return jax.random.fold_in(key, 1)


def _every(x: jax.Array, step: int, axis: int = 0) -> jax.Array:
    """The rows 0, step, 2 step, ... of an axis; of rows divided over devices, as many of each."""
    if step == 1:
        return x
    shape = (*x.shape[:axis], x.shape[axis] // step, step, *x.shape[axis + 1 :])
    return jax.lax.index_in_dim(x.reshape(shape), 0, axis + 1, keepdims=False)
