"""Published models at their full size, without their weights: every tensor has its place, in both directions."""

import functools
import pathlib
import re
import runpy

import pytest

from blip2_jax import params, tasks
from blip2_jax.checkpoints import frozen, language, mapping, published, qformer, trained, vision

CONFIGS = pathlib.Path(__file__).parent.parent.parent / "configs"
# The recipe that takes each model, and transformers' class.
MODELS = {
    "Salesforce/blip2-opt-2.7b": ("stage2:opt_2_7b", "Blip2ForConditionalGeneration"),
    "Salesforce/blip2-opt-6.7b": ("stage2:opt_6_7b", "Blip2ForConditionalGeneration"),
    "Salesforce/blip2-flan-t5-xl": ("stage2:flan_t5_xl", "Blip2ForConditionalGeneration"),
    "Salesforce/blip2-flan-t5-xxl": ("stage2:flan_t5_xxl", "Blip2ForConditionalGeneration"),
    "Salesforce/blip2-itm-vit-g": ("stage1:eva_g", "Blip2ForImageTextRetrieval"),
    "Salesforce/instructblip-vicuna-7b": ("stage2:instruct_vicuna_7b", "InstructBlipForConditionalGeneration"),
    "Salesforce/instructblip-flan-t5-xl": ("stage2:instruct_flan_t5_xl", "InstructBlipForConditionalGeneration"),
}
# What transformers' retrieval model has not, and our exports keep beside it.
BESIDE = r"temperature|qformer/lm_head/.*"


def our_tensors(task):
    """Every tensor of transformers' that the parameters of a task are made of, with its shape."""
    tower = vision.huggingface_tower(task.parts["vision"].config)
    encoder = task.encoder.module.config
    table, layers_of = vision.table(tower.dialect, encoder), functools.partial(vision.layers_of, encoder)
    found = mapping.names(mapping.resolve(task.frozen_shapes()["vision"], table, layers_of, "vision_model."))

    dialect = qformer.TRANSFORMERS[task.parts["vision"].config["model_type"]]
    leaves = {path: leaf for path, leaf in params.flatten(task.shapes()).items() if not re.fullmatch(BESIDE, path)}
    tree = params.unflatten(leaves)
    table = params.relevant(qformer.table(dialect), tree)
    layers_of = functools.partial(qformer.layers_of, task.blip2.qformer)
    found |= mapping.names(mapping.resolve(tree, table, layers_of))
    if "llm" not in task.parts:
        return found, ()
    family, model = language.family(language.own_config(task.parts["llm"].config)), task.language_model
    layers_of = functools.partial(family.layers, model.config)
    mapped = mapping.resolve(task.frozen_shapes()["language"], family.table(model.config), layers_of, "language_model.")
    return found | mapping.names(mapped), family.aside


@pytest.mark.torch
@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_accounted_for(name):
    import torch
    import transformers

    recipe, kind = MODELS[name]
    stage, _, variant = recipe.partition(":")
    config = runpy.run_path(str(CONFIGS / f"{stage}.py"))["get_config"](variant)
    config.update({part: f"hf:{name}" for part in ("vision", "bert", "llm") if part in config})
    ours, aside = our_tensors(tasks.create(config))
    with torch.device("meta"):
        own = getattr(transformers, kind)
        model = own(own.config_class.from_dict(published.config(name)))
    theirs = {tensor: tuple(value.shape) for tensor, value in model.state_dict().items()}
    wrong = {tensor: (ours[tensor], theirs[tensor]) for tensor in ours if ours[tensor] != theirs.get(tensor)}
    assert not wrong
    reasons = [*trained.ASIDE[2:3], *((f"language_model\\.{row}", reason) for row, reason in aside)]
    report = mapping.account(list(theirs), ours, reasons)
    assert not report.unexpected
    assert len(report.loaded) == len(ours)
    print(name, f"{len(report.loaded)} tensors,", f"{sum(p.numel() for p in model.parameters()):,} parameters")


def test_every_published_recipe_names_a_published_model():
    for stage, variant in [("stage1", "eva_g"), ("stage1", "clip_l"), ("stage2", "opt_2_7b"), ("stage2", "flan_t5_xl")]:
        config = runpy.run_path(str(CONFIGS / f"{stage}.py"))["get_config"](variant)
        for part in ("bert", "llm"):
            if part in config:
                assert frozen.find(part, config[part]).config["model_type"] in ("bert", "opt", "t5")
