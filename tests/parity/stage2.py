"""Gradients of LAVIS's stage 2 and InstructBLIP, by the code that trains."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import numpy as np
from jax.sharding import Mesh

from blip2_jax.checkpoints import mapping
from blip2_jax.models.vision.vit import ViT
from blip2_jax.tasks.stage2_loss import Stage2Loss
from tests.parity import golden
from tests.parity.forward_stage1 import Quantities
from tests.parity.golden import Case

# LAVIS's name of the language projection, the language model, and whether the Q-Former reads instructions.
CASES = {
    "stage2_opt": ("opt_proj", "opt", False),
    "stage2_t5": ("t5_proj", "t5", False),
    "instruct_t5": ("t5_proj", "t5", True),
    "instruct_vicuna": ("llm_proj", "llama", True),
}
_IGNORED = -100


def gradients(case: Case, mesh: Mesh | None) -> Quantities:
    """Loss and gradients of every recorded training pass, in one piece and in several; a T5's in float64.

    In float32 a T5's gradients are as far from the recorded ones as these from the truth; see `whole_gradients`.
    """
    exact = golden.float64() if CASES[case.name][1] == "t5" else contextlib.nullcontext()
    with exact:
        return _gradients(case, mesh)


def _gradients(case: Case, mesh: Mesh | None) -> Quantities:
    projection, kind, instruct = CASES[case.name]
    config, _, tower = golden.vit(case, prefix="visual_encoder.")
    prompter = golden.soft_prompt(case, instruct, projection)[1]
    language = golden.language_model(case, kind)[1]
    trees = {"vision": tower.parameters, "trainable": prompter.parameters, "language": language.parameters}

    def encode(parameters, image):
        return ViT(config).apply({"params": parameters}, image)

    silent = dataclasses.replace(prompter.module.config.qformer, dropout=0.0, attention_dropout=0.0)
    model = prompter.module.clone(config=dataclasses.replace(prompter.module.config, qformer=silent))
    found: Quantities = {}
    for name in (name for name in ("noprompt", "prompt", "train") if f"{name}.labels" in case.inputs):
        batch = _batch(case, name, encoder_decoder=kind == "t5")
        rows = len(batch["image"])
        for pieces in sorted({1, *[k for k in range(2, rows + 1) if rows % k == 0][:1]}):
            loss = Stage2Loss(model, language.module, encode, pieces=pieces)
            step = lambda trees, batch, loss=loss: loss.value_and_gradients(
                trees["trainable"], {name: trees[name] for name in ("vision", "language")}, batch, jax.random.key(0)
            )
            value, gradient = golden.run(step, trees, batch, mesh)
            suffix = f" in {pieces} pieces" if pieces > 1 else ""
            found[f"{name}.loss{suffix}"] = value, case.outputs[f"{name}.loss"]
            recorded = "" if instruct else f"{name}/"
            for path, array in mapping.export(gradient, prompter.mapped):
                if not path.endswith(".key.bias"):  # Zero, but for noise.
                    found[f"{recorded}{path}{suffix}"] = array, case.gradients[f"{recorded}{path}"]
    return found


def _batch(case: Case, name: str, encoder_decoder: bool) -> dict[str, np.ndarray]:
    """The recorded inputs of a pass as our batches have them."""
    get = lambda *keys: next(case.inputs[f"{name}.{key}"] for key in keys if f"{name}.{key}" in case.inputs)
    image, labels, ids = case.image("image"), get("labels"), get("llm_input_ids", "text_ids")
    mask = get("attention_mask")[:, -ids.shape[1] :].astype(bool)  # Without the queries.
    if encoder_decoder:
        fields = {"prompt": (ids, mask), "target": (np.maximum(labels, 0), labels != _IGNORED)}
    else:
        wanted = labels[:, -ids.shape[1] :] != _IGNORED
        fields = {"prompt": _compact(ids, mask & ~wanted), "target": _compact(ids, wanted)}
    batch = {"image": image, "example_mask": np.ones(len(image), bool)}
    for field, (tokens, there) in fields.items():
        batch |= {f"{field}_ids": tokens.astype(np.int32), f"{field}_mask": there}
    if f"{name}.qformer_input_ids" in case.inputs:
        batch["instruction_ids"] = get("qformer_input_ids").astype(np.int32)
        batch["instruction_mask"] = get("qformer_attention_mask").astype(bool)
    return batch


def _compact(ids: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens int[B, T] that are kept, moved to the left; and where there are some."""
    length = keep.sum(1).max()
    order = np.argsort(~keep, axis=1, kind="stable")[:, :length]
    return np.take_along_axis(ids, order, axis=1), np.take_along_axis(keep, order, axis=1)
