"""Checkpoints in and out, and what a model is made of.

python -m blip2_jax.convert import  --config=configs/stage2.py:opt_2_7b --config.init=lavis:FILE --output=DIR
python -m blip2_jax.convert export  --checkpoint=DIR --output=DIR
python -m blip2_jax.convert inspect --config=configs/stage1.py:eva_g [--devices=256]
python -m blip2_jax.convert inspect --checkpoint=DIR

import writes what --config.init names (lavis:FILE, hf:DIR, or a checkpoint of ours for another recipe) as a checkpoint
of ours, for generate, evaluate and --config.init. export writes a checkpoint as a directory that transformers loads,
adapters (config.lora) merged into the weights. inspect prints every parameter without allocating any.
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from ml_collections import config_flags

from blip2_jax import configuration, params, tasks
from blip2_jax.checkpoints import export, frozen, store
from blip2_jax.models import lora
from blip2_jax.parallel import mesh as meshes
from blip2_jax.parallel import sharding
from blip2_jax.tasks.stage2 import Stage2

_CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe: a file of configs/, :VARIANT behind it.")
_CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir or a checkpoint of ours.")
_OUTPUT = flags.DEFINE_string("output", None, "The folder to write, which must not be there yet.")
_DEVICES = flags.DEFINE_integer("devices", 1, "How many devices `inspect` spreads the parameters over.")


def import_checkpoint(config: ml_collections.ConfigDict, output: pathlib.Path) -> None:
    """Write the parameters that config.init names as a checkpoint of ours.

    Raises:
      FileExistsError, FileNotFoundError, ValueError: the output is there, or the input is not or does not fit.
    """
    if output.exists():
        raise FileExistsError(f"{output} is there already: name a folder that is not")
    if config.init in ("", "scratch"):
        raise ValueError("nothing to import: name it with --config.init=lavis:FILE or --config.init=hf:DIR")
    task = tasks.create(config)
    trainable = tasks.starting_point(task)(jax.random.key(config.seed))
    store.save_alone(output, trainable, json.loads(config.to_json()), task.frozen_identity())
    print(f"{params.count(trainable):,} parameters in {output}", file=sys.stderr)


def export_checkpoint(checkpoint: str, output: pathlib.Path) -> None:
    """Write a checkpoint of ours as a directory that transformers loads.

    Raises:
      FileExistsError, FileNotFoundError, ValueError: the output is there, or transformers has no such model.
    """
    task, trainable = tasks.load_trained(checkpoint)
    adapters = trainable.pop("lora", {}).get("language", {})
    trainable = lora.merge(trainable)
    # In float32 whatever the accelerator: its bfloat16 would lose what LAVIS's float16 has.
    tower = frozen.load_vision(task.parts["vision"], task.encoder, np.float32, lambda path, array: array)
    trained = trainable, tower, task.encoder, task.blip2
    if isinstance(task, Stage2):
        pairs = lora.pairs(lora.attach(task.frozen_shapes()["language"], adapters, task.lora.scale))
        instructions = task.caption_tokenizer_folder if task.config.instruct else None
        activation = task.config.llm_activation
        exported = export.stage2(*trained, task.parts["llm"], task.tokenizer.end, activation, instructions, pairs)
        if task.tokenizer.begin:
            print(
                f"transformers puts nothing before the soft prompt, and this model data.begin = "
                f"{task.config.data.begin!r}: its texts will be worse there",
                file=sys.stderr,
            )
    else:
        exported = export.stage1(*trained, task.parts["bert"])
    export.write(exported, output)
    encoder = task.encoder.module.config
    if task.blip2.ln_vision_epsilon != encoder.norm_epsilon:
        print(
            f"transformers normalises image tokens with the encoder's epsilon of {encoder.norm_epsilon:g}, this model "
            f"with {task.blip2.ln_vision_epsilon:g}: outputs will differ slightly",
            file=sys.stderr,
        )
    print(output, file=sys.stderr)


def describe(config: ml_collections.ConfigDict, devices: int) -> str:
    """Every parameter of a recipe: path, shape, dtype, whether it is trained, and where the sharding table puts it."""
    task = tasks.create(config)
    tree = {"trainable": task.shapes(), "frozen": task.frozen_shapes()}
    mesh = meshes.abstract_mesh(config.mesh, devices)
    trained = params.map_paths(lambda path, leaf: "yes" if path.startswith("trainable/") else "no", tree)
    specs = {part: sharding.specs(leaves, mesh) for part, leaves in tree.items()}
    shown = params.map_paths(lambda path, spec: ",".join(str(axis or "-") for axis in spec) or "-", specs)
    sizes = dict(mesh.shape)
    return f"{params.describe(tree, {'trainable': trained, 'sharding': shown})}\nmesh {sizes}"


def _run(command: str) -> None:
    output = pathlib.Path(_OUTPUT.value).expanduser() if _OUTPUT.value else None
    if command in ("import", "export") and output is None:
        raise ValueError(f"{command} needs --output=DIR")
    if command in ("import", "inspect") and _CONFIG.value is None and not (command == "inspect" and _CHECKPOINT.value):
        raise ValueError(f"{command} needs --config=FILE" + (" or --checkpoint=DIR" if command == "inspect" else ""))
    if command == "export" and not _CHECKPOINT.value:
        raise ValueError("export needs --checkpoint=DIR")
    if command == "import":
        import_checkpoint(configuration.resolved(_CONFIG.value), output)
    elif command == "export":
        export_checkpoint(_CHECKPOINT.value, output)
    elif command == "inspect":
        if _CHECKPOINT.value:
            config = ml_collections.ConfigDict(store.read_facts(store.find_checkpoint(_CHECKPOINT.value))[0])
        else:
            config = configuration.resolved(_CONFIG.value)
        print(describe(config, _DEVICES.value))
    else:
        raise ValueError(f"expected import, export or inspect, found {command!r}")


def main(arguments: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    try:
        if len(arguments) != 2:
            raise ValueError(f"expected one of import, export and inspect, found {arguments[1:]}")
        _run(arguments[1])
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=configuration.parse_flags)
