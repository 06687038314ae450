"""Stage 2, InstructBLIP and transformers' models: what ours compute, by the name of the recorded quantity."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from blip2_jax.checkpoints import mapping
from blip2_jax.models.blip2 import ImageTextModel
from blip2_jax.models.language.t5 import T5
from blip2_jax.models.layers import causal_mask
from blip2_jax.models.vision.vit import ViT, resize_positions
from blip2_jax.objectives import contrastive
from blip2_jax.objectives.language_modeling import language_modeling_loss, token_weights
from tests.parity import golden
from tests.parity.forward_stage1 import Quantities, unit
from tests.parity.golden import Built, Case

_IGNORED = -100


class Model(NamedTuple):
    """A whole model: encoder, Q-Former with projection, language model."""

    vision: ViT
    prompter: Built
    language: Built
    trees: dict[str, Any]


def build(case: Case, instruct: bool, projection: str = "", kind: str = "") -> Model:
    config, _, tower = golden.vit(case, prefix="visual_encoder.")
    prompter = golden.soft_prompt(case, instruct, projection)[1]
    language = golden.language_model(case, kind)[1]
    trees = {"vision": tower.parameters, "trainable": prompter.parameters, "language": language.parameters}
    return Model(ViT(config), prompter, language, trees)


def _is_block(module, _name: str) -> bool:
    return type(module).__name__ == "Block"


def soft_prompt(model: Model, trees, batch) -> tuple[Any, dict[str, Any]]:
    """The soft prompt, and what the modules before it said."""
    embeds, blocks = model.vision.apply(
        {"params": trees["vision"]}, batch["image"], capture_intermediates=_is_block, mutable="intermediates"
    )
    instruction = ()
    if "instruction_ids" in batch:
        instruction = (batch["instruction_ids"], batch["instruction_mask"].astype(bool))
    prompt, inner = model.prompter.module.apply(
        {"params": trees["trainable"]},
        embeds,
        *instruction,
        capture_intermediates=True,
        mutable="intermediates",
    )
    return prompt, {"image_embeds": embeds, "blocks": blocks["intermediates"]} | inner["intermediates"]


def embed(model: Model, trees, ids):
    return model.language.module.apply({"params": trees["language"]}, ids, method="embed")


def _logits(model: Model, trees, hidden):
    return hidden @ model.language.module.apply({"params": trees["language"]}, method="head").T


def _decoder_hidden(model: Model, trees, embeds, mask):
    mask, length = mask.astype(bool), embeds.shape[1]
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    seen = causal_mask(length) & mask[:, None, None]
    return model.language.module.apply({"params": trees["language"]}, embeds, positions, seen)[0]


def _mean_loss(model: Model, trees, hidden, targets):
    """Mean cross-entropy of the targets int[B, T] at their positions, those of -100 left out."""
    head = model.language.module.apply({"params": trees["language"]}, method="head")
    weights = token_weights(targets != _IGNORED)
    return language_modeling_loss(hidden, head, None, jnp.maximum(targets, 0), weights)


def _causal(model: Model, trees, embeds, mask, labels: dict[str, Any]) -> Quantities:
    """Logits, and losses by name; position t predicts label t + 1."""
    hidden = _decoder_hidden(model, trees, embeds, mask)
    shifted = lambda x: jnp.pad(x[:, 1:], ((0, 0), (0, 1)), constant_values=_IGNORED)
    losses = {name: _mean_loss(model, trees, hidden, shifted(x)) for name, x in labels.items()}
    return {"logits": _logits(model, trees, hidden)} | losses


def _encoder_decoder(model: Model, trees, embeds, mask, labels) -> Quantities:
    """Logits and loss; the decoder starts with token 0, which is also padding."""
    t5 = lambda *args, method: model.language.module.apply({"params": trees["language"]}, *args, method=method)
    decoder_ids = jnp.pad(jnp.maximum(labels, 0)[:, :-1], ((0, 0), (1, 0)))
    hidden, _ = t5(t5(embeds, mask, method="encode"), t5(decoder_ids, method="embed"), method="decode")
    return {
        "encoder_last_hidden_state": t5(embeds, mask, method="encode_hidden"),
        "logits": _logits(model, trees, hidden),
        "loss": _mean_loss(model, trees, hidden, labels),
    }


def _where(found: np.ndarray, recorded: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both where there are tokens: what stands on padding has no meaning."""
    keep = mask.astype(bool)
    return found[keep], recorded[keep]


def _hidden(inner: dict[str, Any]) -> list[np.ndarray]:
    """The Q-Former's hidden states behind each layer: queries, and text behind them if there is any."""
    return [
        queries if text is None else np.concatenate([queries, text], axis=1)
        for (queries, text), _ in golden.by_layer(inner["qformer"]["transformer"], lambda layer: layer["__call__"][0])
    ]


# LAVIS.


def _lavis(case: Case, mesh: Mesh | None, projection: str, kind: str, instruct: bool = False) -> Quantities:
    """Every training pass and every beginning of a generation that the case has."""
    model = build(case, instruct, projection, kind)
    passes = sorted({name.partition(".")[0] for name in case.outputs if name.endswith(".inputs_embeds")})
    found: Quantities = {}
    for name in passes:
        inputs = lavis_inputs(case, name, instruct)
        if inputs is not None:
            found |= _lavis_pass(case, name, model, inputs, mesh)
    return found


def lavis_inputs(case: Case, name: str, instruct: bool) -> dict[str, np.ndarray] | None:
    """The recorded inputs of a pass; None where tokens are not recorded."""
    get = lambda *names: next((case.inputs[key] for key in names if key in case.inputs), None)
    generation = name.startswith("gen_")
    group = "gen" if instruct and generation else name
    ids = get(f"{group}.llm_input_ids", f"{group}.text_ids", f"{group}.prompt_ids")
    if ids is None:
        return None
    batch = {"image": case.image("image"), "ids": ids}
    optional = {
        "instruction_ids": get(f"{group}.qformer_input_ids"),
        "instruction_mask": get(f"{group}.qformer_attention_mask"),
        "labels": get(f"{name}.labels"),
        "mask": get(f"{name}.attention_mask"),
    }
    if optional["mask"] is None:
        optional["mask"] = case.outputs[f"{name}.attention_mask"]
    return batch | {key: value for key, value in optional.items() if value is not None}


def _lavis_pass(case: Case, name: str, model: Model, inputs, mesh: Mesh | None) -> Quantities:
    def forward(trees, batch):
        prompt, inner = soft_prompt(model, trees, batch)
        embeds = jnp.concatenate([prompt, embed(model, trees, batch["ids"])], axis=1)
        says = {}
        if "labels" in batch and isinstance(model.language.module, T5):
            says = _encoder_decoder(model, trees, embeds, batch["mask"], batch["labels"])
        elif "labels" in batch:
            says = _causal(model, trees, embeds, batch["mask"], {"loss": batch["labels"]})
        return {"inputs_embeds": embeds} | says, inner

    says, inner = golden.run(forward, model.trees, inputs, mesh)
    found: Quantities = {f"{name}.inputs_embeds": says["inputs_embeds"]}
    if "labels" not in inputs:
        return found
    there = inputs["mask"]
    if isinstance(model.language.module, T5):
        there = case.inputs[f"{name}.decoder_attention_mask"]
    found[f"{name}.logits"] = _where(says["logits"], case.outputs[f"{name}.logits"], there)
    found[f"{name}.loss"] = says["loss"]
    hidden = _hidden(inner)[-1]
    output = f"{name}.qformer_output" if "instruction_ids" in inputs else f"{name}.query_output"
    there = np.ones(hidden.shape[:2], bool)
    if "instruction_ids" in inputs:
        there[:, -inputs["instruction_mask"].shape[1] :] = inputs["instruction_mask"]
    return found | {output: _where(hidden, case.outputs[output], there)}


def stage2_opt(case: Case, mesh: Mesh | None) -> Quantities:
    return _lavis(case, mesh, "opt_proj", "opt")


def stage2_t5(case: Case, mesh: Mesh | None) -> Quantities:
    return _lavis(case, mesh, "t5_proj", "t5")


def instruct_t5(case: Case, mesh: Mesh | None) -> Quantities:
    return _lavis(case, mesh, "t5_proj", "t5", instruct=True)


def instruct_vicuna(case: Case, mesh: Mesh | None) -> Quantities:
    return _lavis(case, mesh, "llm_proj", "llama", instruct=True)


# transformers.


def put(prompt, embeds, is_image):
    """The soft prompt in the place of the image tokens bool[B, T]."""
    place = jnp.maximum(jnp.cumsum(is_image, axis=1) - 1, 0)
    return jnp.where(is_image[..., None], jnp.take_along_axis(prompt, place[..., None], axis=1), embeds)


def whole_model(case: Case) -> tuple[Model, dict[str, np.ndarray]]:
    """Model and batch of a case with a loss."""
    model = build(case, instruct="qformer_input_ids" in case.inputs)
    names = ("input_ids", "attention_mask", "labels", "labels_prompt_masked")
    batch = {"image": case.image("pixel_values")} | {name: case.inputs[name] for name in names if name in case.inputs}
    if "qformer_input_ids" in case.inputs:
        batch["instruction_ids"] = case.inputs["qformer_input_ids"]
        batch["instruction_mask"] = case.inputs["qformer_attention_mask"]
    return model, batch


def whole_forward(case: Case, model: Model, trees, batch) -> tuple[Quantities, Any, dict[str, Any]]:
    """What the language model says, the soft prompt, and what the modules before it said."""
    prompt, inner = soft_prompt(model, trees, batch)
    is_image = batch["input_ids"] == case.config["image_token_index"]
    embeds = put(prompt, embed(model, trees, batch["input_ids"]), is_image)
    mask = batch["attention_mask"]
    if isinstance(model.language.module, T5):
        return _encoder_decoder(model, trees, embeds, mask, batch["labels"]), prompt, inner
    losses = {"loss": "labels", "loss_prompt_masked": "labels_prompt_masked"}
    labels = {loss: batch[name] for loss, name in losses.items() if name in batch}
    return _causal(model, trees, embeds, mask, labels), prompt, inner


def whole_gradients(case: Case, mesh: Mesh | None) -> Quantities:
    """Gradients of the loss by every parameter, nothing frozen, by their names in transformers; a T5's in float64.

    T5 divides attention's products by nothing, and its recorded cases are so near to saturation that in float32 the
    order of a sum moves a gradient by more than it may differ: a mesh has another order (tests/parity/noise.py).
    """
    if case.config["text_config"]["model_type"] == "t5":
        with golden.float64():
            return gradients(case, mesh)
    return gradients(case, mesh)


def gradients(case: Case, mesh: Mesh | None) -> Quantities:
    """The same in float32, unless it is called within `golden.float64`."""
    model, batch = whole_model(case)
    loss = lambda trees, batch: whole_forward(case, model, trees, batch)[0]["loss"]
    gradients = golden.run(jax.grad(loss), model.trees, batch, mesh)
    parts = {"vision": golden.vit(case)[2], "trainable": model.prompter, "language": model.language}
    return {
        name: (gradient, case.gradients[name])
        for part, built in parts.items()
        for name, gradient in mapping.export(gradients[part], built.mapped)
    }


def conditional_generation(case: Case, mesh: Mesh | None) -> Quantities:
    """Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration and Blip2Model."""
    model, batch = whole_model(case)
    forward = lambda trees, batch: whole_forward(case, model, trees, batch)
    says, prompt, inner = golden.run(forward, model.trees, batch, mesh)
    mask, recorded = batch["attention_mask"], case.outputs
    found: Quantities = {name: says[name] for name in says if name.startswith("loss") and name in recorded}
    if "encoder_last_hidden_state" in says:
        found["logits"] = says["logits"]
        if "encoder_last_hidden_state" in recorded:
            found["encoder_last_hidden_state"] = _where(
                says["encoder_last_hidden_state"], recorded["encoder_last_hidden_state"], mask
            )
    else:
        found["logits"] = _where(says["logits"], recorded["logits"], mask)
    found["language_projection"] = prompt
    return found | _states(case, inner) | _features(case, model, inner, mesh)


def _states(case: Case, inner: dict[str, Any]) -> Quantities:
    """Hidden states and attention of the encoder and the Q-Former."""
    recorded = case.outputs
    found: Quantities = {}
    for layer, hidden in enumerate(inner["blocks"]["blocks"]["__call__"][0][0]):
        found[f"vision.hidden_states.{layer + 1}"] = hidden
    if "vision.last_hidden_state" in recorded:
        found["vision.last_hidden_state"] = inner["ln_vision"]["__call__"][0]
    states = _hidden(inner)
    there = np.ones(states[0].shape[:2], bool)
    if "qformer_attention_mask" in case.inputs:
        mask = case.inputs["qformer_attention_mask"]
        there[:, -mask.shape[1] :] = mask
    for layer, hidden in enumerate(states):
        name = f"qformer.hidden_states.{layer + 1}"
        found[name] = _where(hidden, recorded[name], there)
    if "qformer.last_hidden_state" in recorded:
        found["qformer.last_hidden_state"] = _where(states[-1], recorded["qformer.last_hidden_state"], there)
    maps, crosses = [], []
    for layer in golden.by_layer(inner["qformer"]["transformer"], lambda layer: layer):
        maps.append(layer["attention"]["weights"][0])
        if "cross_attention" in layer:
            maps.append(layer["cross_attention"]["weights"][0])
            crosses.append(maps[-1])
    for number, weights in enumerate(maps):
        name = f"qformer.attentions.{number}"
        rows = there if weights.shape[2] == there.shape[1] else np.ones((len(weights), weights.shape[2]), bool)
        found[name] = _where(weights.swapaxes(1, 2), recorded[name].swapaxes(1, 2), rows)
    return found | {f"qformer.cross_attentions.{number}": weights for number, weights in enumerate(crosses)}


def _features(case: Case, model: Model, inner: dict[str, Any], mesh: Mesh | None) -> Quantities:
    """What Blip2Model's get_..._features give."""
    recorded = case.outputs
    if "image_features.last_hidden_state" not in recorded:
        return {}
    found: Quantities = {
        "image_features.last_hidden_state": inner["ln_vision"]["__call__"][0],
        "qformer_features": _hidden(inner)[-1],
    }
    # The text of an OPT alone; the recorded ids are cut so that none is the image token.
    largest = int(case.meta["notes"].partition("max=")[2].rstrip(")"))
    ids, mask = np.minimum(case.inputs["input_ids"], largest), case.inputs["attention_mask"]
    read = lambda trees, batch: _decoder_hidden(model, trees, embed(model, trees, batch["ids"]), batch["mask"])
    text = golden.run(read, model.trees, {"ids": ids, "mask": mask}, mesh)
    name = "text_features.last_hidden_state"
    found[name] = _where(text, recorded[name], mask)
    for name in case.inputs:
        if name.startswith("pixel_values_"):
            found |= _resized(case, model, int(name.rpartition("_")[2]), mesh)
    return found


def _resized(case: Case, model: Model, size: int, mesh: Mesh | None) -> Quantities:
    """Pictures of another size, by interpolated positions."""
    config, dialect, tower = golden.vit(case)
    large = dataclasses.replace(config, image_size=size)
    positions = resize_positions(tower.parameters["positions"], config.image_size, large, dialect.align_corners)
    trees = model.trees | {"vision": tower.parameters | {"positions": positions}}
    resized = model._replace(vision=ViT(large))
    forward = lambda trees, batch: soft_prompt(resized, trees, batch)[1]
    inner = golden.run(forward, trees, {"image": case.image(f"pixel_values_{size}")}, mesh)
    return {
        f"interp{size}.position_embedding": positions[None],
        f"image_features_interp{size}.last_hidden_state": inner["ln_vision"]["__call__"][0],
        f"qformer_features_interp{size}": _hidden(inner)[-1],
    }


def image_text_retrieval(case: Case, mesh: Mesh | None) -> Quantities:
    """Blip2ForImageTextRetrieval and the two models with projections."""
    config, _, tower = golden.vit(case)
    blip2, built = golden.stage1(case)
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    if case.config.get("image_token_index") is not None and (ids[:, 0] == case.config["image_token_index"]).all():
        ids, mask = ids[:, blip2.qformer.queries :], mask[:, blip2.qformer.queries :]

    def passes(model: ImageTextModel, image_embeds, batch) -> Quantities:
        ids, mask = batch["ids"], batch["mask"].astype(bool)
        image = model.project_image(image_embeds)
        seen = model.image_features(image)
        texts, encoded = model.text_features(ids, mask), model.qformer.encode_text(ids, mask)
        tokens = model.ln_vision(image_embeds)
        similarity = contrastive.similarities(seen.features, texts)
        pair = model.qformer.encode_pair(image, ids, mask)
        match = model.match(image, ids, mask)
        return {
            "vision.last_hidden_state": tokens,
            "vision_model.last_hidden_state": tokens,
            "vision_model.image_embeds": seen.features,
            "text_model.text_embeds": unit(model.text_proj(encoded)),
            "text_model.last_hidden_state": encoded,
            "itm.image_embeds": tokens,
            "itm.logits_per_image": match,
            "itm.logits_per_text": match.T,
            "itm.qformer_last_hidden_state": jnp.concatenate(pair, axis=1),
            "itc.logits_per_image": similarity,
            "itc.logits_per_text": similarity.T,
            "itc.image_embeds": seen.features,
            "itc.text_embeds": texts,
            "itc.qformer_last_hidden_state": encoded,
        }

    def forward(trees, batch):
        embeds = ViT(config).apply({"params": trees["vision"]}, batch["image"])
        return built.module.apply({"params": trees["trainable"]}, embeds, batch, method=passes)

    trees = {"vision": tower.parameters, "trainable": built.parameters}
    batch = {"image": case.image("pixel_values"), "ids": ids, "mask": mask}
    found = golden.run(forward, trees, batch, mesh)
    there = np.concatenate([np.ones((len(mask), blip2.qformer.queries), bool), mask.astype(bool)], axis=1)
    for name, keep in {
        "itm.qformer_last_hidden_state": there,
        "itc.qformer_last_hidden_state": mask,
        "text_model.last_hidden_state": mask,
        "text_model.text_embeds": mask,
    }.items():
        if name in case.outputs:
            found[name] = _where(found[name], case.outputs[name], keep)
    return {name: value for name, value in found.items() if name in case.outputs}
