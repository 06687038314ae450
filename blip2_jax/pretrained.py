"""Models of transformers as they are: a directory with a BLIP-2 or InstructBLIP becomes a task with its parameters."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import jax
import ml_collections
from tokenizers import Tokenizer

from blip2_jax import configuration, params, tasks
from blip2_jax.checkpoints import hub, qformer
from blip2_jax.checkpoints.huggingface import Directory, complete, load_tokenizer, read_config
from blip2_jax.tasks.common import Task


def is_huggingface(directory: pathlib.Path) -> bool:
    """Whether transformers has saved a model there; a workdir of ours has a config.json, too."""
    file = directory / "config.json"
    return file.is_file() and "model_type" in read_config(file)


def from_huggingface(directory: str) -> tuple[Task, params.Tree]:
    """The task and the parameters of a BLIP-2 or InstructBLIP that transformers has saved.

    Args:
      directory: its path, or ORG/NAME for the hub's cache.

    Raises:
      FileNotFoundError, ConnectionError: it is not there.
      ValueError: it is something else.
    """
    path = hub.directory(directory)
    opened = Directory(path, beside=qformer.HEADS_FILE)
    settings = complete(opened.config(), opened.where)
    if settings.get("model_type") not in qformer.TRANSFORMERS:
        kinds = ", ".join(qformer.TRANSFORMERS)
        raise ValueError(f"{path}: config.json is of a {settings.get('model_type')!r}; expected one of {kinds}")
    writes = "language_projection.weight" in opened.names()
    config = _stage2(settings, load_tokenizer(path)) if writes else configuration.recipe("stage1", "eva_g")
    _sizes(config, settings)
    for part in ("vision", "bert", "init", *(("llm",) if writes else ())):
        config[part] = f"hf:{path}"
    task = tasks.create(configuration.resolved(config))
    print(f"{path}: a {settings['model_type']} for {config.task}", file=sys.stderr)
    return task, tasks.starting_point(task)(jax.random.key(0))


def _sizes(config: ml_collections.ConfigDict, settings: dict[str, Any]) -> None:
    """Of the Q-Former and the pictures."""
    sizes, tower = settings["qformer_config"], settings["vision_config"]
    config.image_size = tower["image_size"]
    config.model.layers = sizes["num_hidden_layers"]
    config.model.cross_attention_every = sizes["cross_attention_frequency"]
    config.model.queries = settings["num_query_tokens"]
    config.model.embed_width = settings.get("image_text_hidden_size") or config.model.embed_width
    config.model.ln_vision_epsilon = tower["layer_norm_eps"]


def _stage2(settings: dict[str, Any], tokenizer: Tokenizer) -> ml_collections.ConfigDict:
    """The recipe nearest to a model with a language model."""
    kind = settings["text_config"]["model_type"]
    config = configuration.recipe("stage2", "flan_t5_xl" if kind == "t5" else "opt_2_7b")
    config.instruct = settings["model_type"] == "instructblip"
    config.data.split_captions = False
    if kind == "t5" and settings["text_config"].get("dense_act_fn") == "gelu":
        config.llm_activation = "gelu"
    config.data.prompt = "a photo of"
    # The token before a text is the one that the tokenizer puts there; a T5's has none.
    before = tokenizer.encode("a", add_special_tokens=True).ids
    before = before[: len(before) - len(tokenizer.encode("a", add_special_tokens=False).ids)] if kind != "t5" else []
    config.data.bos = "".join(tokenizer.id_to_token(token) for token in before)
    # OPT was taught to end a text with a line; the others have a token for that.
    config.data.end = "\n" if kind == "opt" else ""
    return config
