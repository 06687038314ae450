"""The stages of training, by name, and where their parameters start."""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from blip2_jax import params
from blip2_jax.checkpoints import frozen, mapping, store, trained
from blip2_jax.models import lora
from blip2_jax.tasks.common import Task
from blip2_jax.tasks.stage1 import Stage1
from blip2_jax.tasks.stage2 import Stage2

TASKS = {"stage1": Stage1, "stage2": Stage2}


def create(config: ml_collections.ConfigDict, dtype: Any = None) -> Task:
    """The task that config.task names; its frozen parts are read when they are first needed.

    Args:
      config: the recipe.
      dtype: of frozen parameters and of matrix products; None: as suits the accelerator that is here.
    """
    if config.task not in TASKS:
        raise ValueError(f"config.task = {config.task!r}: expected one of {', '.join(TASKS)}")
    return TASKS[config.task](config, dtype)


def starting_point(task: Task) -> Callable[[jax.Array], params.Tree]:
    """What config.init says the trainable parameters start from, as a function of a random key.

    Raises:
      FileNotFoundError, ValueError: there is nothing to start from, or it does not fit.
    """
    init = task.config.init
    if init == "scratch" or (not init and task.name == "stage1"):
        return task.initialize
    if not init:
        raise ValueError(
            "stage 2 starts from a Q-Former that stage 1 has trained: name its workdir with --config.init=DIR "
            "(or --config.init=scratch to train without stage 1)"
        )
    if init.startswith(("lavis:", "hf:")):
        return lambda key: _foreign_start(task, init, key)
    checkpoint = store.find_checkpoint(init)
    config, parts = store.read_facts(checkpoint)
    theirs = lora.Settings(**config["lora"])
    lora.check_same(task.lora, theirs, str(checkpoint))
    needed = {"vision"} | ({"llm"} if "language" in theirs.targets else set())
    frozen.check(task.parts, {name: parts[name] for name in needed}, str(checkpoint))
    return lambda key: warm_start(task, key, store.load_trainable(checkpoint), str(checkpoint))


def _foreign_start(task: Task, init: str, key: jax.Array) -> params.Tree:
    opened = trained.open_source(init)
    language = task.parts["llm"].model_type if isinstance(task, Stage2) else ""
    exact = language == "t5" and task.language_model.config.activation == "gelu"
    instruct = isinstance(task, Stage2) and task.config.instruct
    trained.check_fit(init, opened, language, exact, instruct, task.config.vision)
    # All of the model, be some of it frozen beside adapters.
    parameters, report = trained.read(opened, mapping.template(task.fresh_model), task.blip2.qformer)
    report.tell(init)
    return warm_start(task, key, parameters, init)


def warm_start(task: Task, key: jax.Array, known: params.Tree, where: str) -> params.Tree:
    """Every parameter that a checkpoint has, and fresh ones for the rest; prints which is which.

    Raises:
      ValueError: a shape differs, or nothing of the Q-Former is there.
    """
    new, old = params.flatten(task.shapes()), params.flatten(known)
    shared, missing = [path for path in new if path in old], [path for path in new if path not in old]
    for path in shared:
        if new[path].shape != old[path].shape:
            raise ValueError(
                f"{where}: {path} has shape {old[path].shape}, this model needs {new[path].shape}: "
                "give both runs the same config.model and config.image_size"
            )
    if "qformer" not in task.lora.targets and not any(path.startswith("qformer/") for path in shared):
        raise ValueError(f"{where} holds no Q-Former to start from")
    print(
        f"started from {where}: {len(shared)} parameters taken over; fresh: {', '.join(missing) or 'none'}; "
        f"not needed here: {sum(path not in new for path in old)}",
        file=sys.stderr,
    )
    # A whole Q-Former needs no BERT beside it.
    make = task.initialize if any(path.startswith("qformer/") for path in missing) else jax.jit(task.fresh)
    fresh = params.flatten(make(key)) if missing else {}
    return params.unflatten({path: jnp.asarray(old[path] if path in old else fresh[path]) for path in new})


def load_trained(path: str | pathlib.Path) -> tuple[Task, params.Tree]:
    """The task and the trained parameters of a workdir or a checkpoint of ours, as `Task.assembled` has them.

    Raises:
      FileNotFoundError, ValueError: no checkpoint there, or its frozen parts are not to be found.
    """
    checkpoint = store.find_checkpoint(path)
    config, parts = store.read_facts(checkpoint)
    if "qformer" in parts:  # Its source stands there as it was found.
        config["init"] = parts["qformer"]["source"]
    task = create(ml_collections.ConfigDict(config))
    frozen.check(task.parts, parts, str(checkpoint))
    return task, task.assembled(jax.tree.map(jnp.asarray, store.load_trainable(checkpoint)))
