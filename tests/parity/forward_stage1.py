"""Vision towers and stage 1 of LAVIS: what our models compute, by the name of the recorded quantity."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blip2_jax import decoding
from blip2_jax.checkpoints import bert
from blip2_jax.checkpoints.huggingface import without_prefix
from blip2_jax.models.blip2 import ImageTextModel
from blip2_jax.models.vision.vit import ViT, resize_positions
from blip2_jax.objectives import contrastive
from tests.parity import golden, stage1
from tests.parity.golden import Case
from tests.parity.stage1 import Quantities


def _towers(case: Case, kind: str, mesh: Mesh | None) -> Quantities:
    """A vision tower alone, at its own size and at twice that."""
    config, dialect, tower = golden.vit(case, kind)
    encode = lambda module: lambda trees, batch: module.apply({"params": trees["vision"]}, batch["image"])
    found = {"out": golden.run(encode(ViT(config)), {"vision": tower.parameters}, {"image": case.image("image")}, mesh)}
    for name in case.inputs:
        if match := re.fullmatch(r"image(\d+)", name):
            size = match[1]
            large = dataclasses.replace(config, image_size=int(size))
            positions = resize_positions(tower.parameters["positions"], config.image_size, large, dialect.align_corners)
            parameters = tower.parameters | {"positions": positions}
            recorded = case.outputs[f"interp{size}.pos_embed"]
            found[f"interp{size}.pos_embed"] = positions.reshape(recorded.shape)
            image = {"image": case.image(name)}
            found[f"interp{size}.out"] = golden.run(encode(ViT(large)), {"vision": parameters}, image, mesh)
    return found


def vit_eva(case: Case, mesh: Mesh | None) -> Quantities:
    return _towers(case, "eva", mesh)


def vit_clip(case: Case, mesh: Mesh | None) -> Quantities:
    return _towers(case, "clip", mesh)


def qformer_init_from_bert(case: Case, mesh: Mesh | None) -> Quantities:
    """Every parameter that the original takes from BERT, by its LAVIS name; the fresh ones by mean and deviation."""
    config, fresh = golden.fresh_stage1(case)
    tree = bert.initialize_qformer(fresh["qformer"], without_prefix(case.weights, "bert/"), config.qformer)
    ours = golden.lavis_tensors({"qformer": tree}, config)
    recorded = without_prefix(case.weights, "lavis/")
    found: Quantities = {}
    for name, sources in case.meta["source_of_each_param"].items():
        if name.startswith("Qformer.cls.predictions.decoder."):
            continue  # Tied to the word embeddings and to cls.predictions.bias.
        theirs = recorded.read(name)
        if isinstance(sources, str):  # "fresh: mean ... std ..."
            spread = float(sources.rpartition(" ")[2])
            assert ours[name].shape == theirs.shape
            assert abs(ours[name].std() - spread) <= 0.2 * spread, f"{name}: {ours[name].std()}, expected {spread}"
            continue
        same = len(theirs) - any("+1 row" in source for source in sources)  # The row of [DEC] is fresh.
        found[name] = (ours[name][:same], theirs[:same])
    return found


def stage1_ws1(case: Case, mesh: Mesh | None) -> Quantities:
    """Every pass of stage 1 with the recorded negatives, and the losses."""
    recorded = stage1.read(case)
    model = recorded.loss.model
    start = recorded.loss.decoder_start

    def passes(model: ImageTextModel, image_embeds, batch) -> Quantities:
        ids, mask = batch["text_ids"], batch["text_mask"]
        rows = jnp.arange(len(ids))
        image = model.project_image(image_embeds)
        seen, text_output = model.image_features(image), model.qformer.encode_text(ids, mask)
        text_features = model.text_features(ids, mask)
        similarity = contrastive.similarities(seen.features, text_features) / model.temperature
        images = jnp.concatenate([rows, batch["negative_image"], rows])
        texts = jnp.concatenate([rows, rows, batch["negative_text"]])
        chosen = jax.tree.map(lambda x: x[:, images], image)
        features, matrix, bias = model.caption_features(seen.cache, ids.at[:, 0].set(start), mask)
        same = (batch["image_id"][:, None] == batch["image_id"][None]).all(-1)
        weights = lambda scores: jax.nn.softmax(jnp.where(same, -jnp.inf, scores), axis=-1)
        return {
            "vit_output": image_embeds,
            "image_embeds": model.ln_vision(image_embeds),
            "query_output": seen.query_output,
            "text_output": text_output,
            "image_feats": seen.features,
            "text_feat": text_features,
            "sim_i2t": similarity,
            "sim_t2i": similarity.T,
            "weights_i2t": weights(similarity),
            "weights_t2i": weights(similarity.T),
            "itm_output": jnp.concatenate(model.qformer.encode_pair(chosen, ids[texts], mask[texts]), axis=1),
            "itm_logits": model.match(chosen, ids[texts], mask[texts]),
            "lm_logits": features @ matrix.T + bias,
            "past": _layer_caches(seen.cache),
        }

    def forward(trees, batch):
        embeds = recorded.loss.encode(trees["vision"], batch["image"])
        return model.apply({"params": trees["trainable"]}, embeds, batch, method=passes)

    trees = {name: built.parameters for name, built in recorded.parts.items()}
    found = golden.run(forward, trees, recorded.batch, mesh)
    for layer, (key, value) in enumerate(found.pop("past")):
        found |= {f"past_key.{layer}": key.swapaxes(1, 2), f"past_value.{layer}": value.swapaxes(1, 2)}
    return _of_ranks(case, found, recorded.ranks) | stage1.losses(case, mesh)


def _of_ranks(case: Case, found: Quantities, ranks: int) -> Quantities:
    """Quantities of a whole batch as each of several ranks has recorded its own part of them."""
    if ranks == 1:
        return found
    split = {}
    for name, value in found.items():
        blocks = 3 if name.startswith("itm_") else 1  # ITM's triples stand one kind behind the other.
        parts = np.split(value.reshape(blocks, len(value) // blocks, *value.shape[1:]), ranks, axis=1)
        split |= {f"rank{rank}/{name}": part.reshape(-1, *value.shape[1:]) for rank, part in enumerate(parts)}
    return {name: value for name, value in split.items() if name in case.outputs}


stage1_ws1_image_id_unfrozen = stage1_ws1
stage1_ws2 = stage1_ws1
stage1_ws2_image_id_unfrozen = stage1_ws1


def stage1_ws1_grad_through_gather(case: Case, mesh: Mesh | None) -> Quantities:
    return stage1.losses(case, mesh)


def _layer_caches(cache) -> list:
    """The keys and values of a Q-Former cache, layer by layer."""
    groups = len(cache.groups[0].key) if cache.groups else 0
    scanned = [jax.tree.map(lambda x, g=g: x[g], layer) for g in range(groups) for layer in cache.groups]
    return [*scanned, *cache.tail]


def stage1_inference(case: Case, mesh: Mesh | None) -> Quantities:
    """Heads and features of stage 1 alone, and retrieval scores."""
    encoder, _, tower = golden.vit(case, prefix="visual_encoder.")
    _, built = golden.stage1(case)
    i = case.inputs
    trees = {"vision": tower.parameters, "trainable": built.parameters}
    batch = {name: i[name] for name in i if name.endswith(("input_ids", "attention_mask")) and "retr" not in name}
    batch = {"image": case.image("image")} | batch

    def passes(model: ImageTextModel, image_embeds, batch) -> Quantities:
        image = model.project_image(image_embeds)
        seen = model.image_features(image)
        itm = batch["itm_input_ids"], batch["itm_attention_mask"].astype(bool)
        text = batch["features_input_ids"], batch["features_attention_mask"].astype(bool)
        encoded = model.qformer.encode_text(*text)
        decoder_ids = batch["unilm_decoder_input_ids"]
        features, matrix, bias = model.caption_features(seen.cache, decoder_ids, jnp.ones(decoder_ids.shape, bool))
        return {
            "itm_logit": model.match(image, *itm),
            "itc_sim": (seen.features * model.text_features(*itm)[:, None]).sum(-1).max(-1, keepdims=True),
            "features_image.image_embeds": seen.query_output,
            "features_image.image_embeds_proj": seen.features,
            "features_text.text_embeds": encoded,
            "features_text.text_embeds_proj": unit(model.text_proj(encoded)),
            "features_multimodal.multimodal_embeds": model.qformer.encode_pair(image, *text)[0],
            "unilm_logits": features @ matrix.T + bias,
            "retr_image_feats": seen.features,
        }

    def forward(trees, batch):
        embeds = ViT(encoder).apply({"params": trees["vision"]}, batch["image"])
        return built.module.apply({"params": trees["trainable"]}, embeds, batch, method=passes)

    text = {"ids": i["retr_input_ids"], "mask": i["retr_attention_mask"].astype(bool)}
    read = lambda trees, batch: built.module.apply(
        {"params": trees["trainable"]}, batch["ids"], batch["mask"], method="text_features"
    )
    found = golden.run(forward, trees, batch, mesh)
    found["retr_text_feat"] = golden.run(read, trees, text, mesh)
    found["retr_sims_i2t"] = np.einsum("iqe,te->itq", found["retr_image_feats"], found["retr_text_feat"]).max(-1)
    found |= _reranked(case, found["retr_sims_i2t"], encoder, built, trees, mesh)
    return found


def _reranked(case: Case, similarity: np.ndarray, encoder, built, trees, mesh) -> Quantities:
    """The retrieval score of the original: cosine + matching logit for the first k, -100 for the rest."""
    i, k = case.inputs, case.meta["k_test"]

    def match(trees, batch):
        embeds = ViT(encoder).apply({"params": trees["vision"]}, batch["image"])
        projected = built.module.apply({"params": trees["trainable"]}, embeds, method="project_image")
        return built.module.apply(
            {"params": trees["trainable"]}, projected, batch["ids"], batch["mask"], method="match"
        )

    def scores(similarity: np.ndarray, pair) -> np.ndarray:
        result = np.full(similarity.shape, -100.0, np.float32)
        for row, line in enumerate(similarity):
            for column in np.argsort(-line)[:k]:
                image, text = pair(row, column)
                one = {
                    "image": case.image("image")[image : image + 1],
                    "ids": i["retr_input_ids"][text : text + 1],
                    "mask": i["retr_attention_mask"][text : text + 1].astype(bool),
                }
                result[row, column] = line[column] + golden.run(match, trees, one, mesh)[0, 1]
        return result

    by_image = scores(similarity, lambda row, column: (row, column))
    return {"retr_score_i2t": by_image, "retr_score_t2i": scores(similarity.T, lambda row, column: (column, row))}


def captions(case: Case, mesh: Mesh | None) -> Quantities:
    """What the Q-Former writes. The original's lengths count [DEC], which its ids begin with."""
    encoder, _, tower = golden.vit(case, prefix="visual_encoder.")
    _, built = golden.stage1(case)
    trees = {"vision": tower.parameters, "trainable": built.parameters}
    tokens = case.architecture["qformer"]
    found: Quantities = {}
    for recorded in [name for name in case.outputs if re.fullmatch(r"cap\w*\.ids", name)]:
        name, ids = recorded.removesuffix(".ids"), case.outputs[recorded]
        # Of beam search, which the original cannot run as it is, the name says it all: cap_beam3_min8.
        beams, least = re.fullmatch(r"cap_beam(\d+)(?:_min(\d+))?", name).groups()
        limits = case.meta["gen"].get(name, {}).get("kw", {})
        shortest, longest = limits.get("min_length", least), limits.get("max_length", ids.shape[1])
        config = decoding.GenerationConfig(
            longest - 1, max(int(shortest) - 1, 0), num_beams=int(beams), convention="lavis"
        )

        def write(trees, batch, config=config):
            embeds = ViT(encoder).apply({"params": trees["vision"]}, batch["image"])
            read = lambda model, embeds: model.image_features(model.project_image(embeds)).cache
            cache = built.module.apply({"params": trees["trainable"]}, embeds, method=read)
            constants = config, tokens["dec_id"], tokens["sep_id"]
            return decoding.caption(built.module, trees["trainable"], cache, *constants)

        written = golden.run(write, trees, {"image": case.image("image")}, mesh)
        new = written.tokens[:, 0]
        # The original fills rows up with [PAD] behind their end, and stops when all have ended.
        ends = np.cumsum(np.pad(new[:, :-1], ((0, 0), (1, 0))) == tokens["sep_id"], axis=1) > 0
        start = np.full((len(new), 1), tokens["dec_id"])
        found[recorded] = np.concatenate([start, np.where(ends, tokens["pad_id"], new)], axis=1)[:, : ids.shape[1]]
        if f"{name}.scores" in case.outputs:
            found[f"{name}.scores"] = written.scores[:, 0]
    return found


def unit(x: jax.Array) -> jax.Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
