"""The real training step compiled ahead of time: without weights, data or tokenizers, for devices that are not here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from blip2_jax import compat, optimizer, params, tasks
from blip2_jax.checkpoints import frozen, hub
from blip2_jax.checkpoints.store import TrainState
from blip2_jax.data.text import pad
from blip2_jax.parallel import mesh as meshes
from blip2_jax.parallel import sharding
from blip2_jax.step import Step, make_step
from blip2_jax.tasks.common import Task
from blip2_jax.tasks.stage2 import Stage2

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class StaticTokenizer:
    """In place of a language model's tokenizer that is not here: what the shapes of a step need of it.

    Which token is which makes no difference to a compiled step; a prompt counts one token a word.
    """

    space = ""
    end = padding = 0

    def __init__(self, data: ml_collections.ConfigDict):
        self.begin, self.bos = [0] * bool(data.begin), [0] * bool(data.bos)

    def encode_prompt(self, text: str) -> list[int]:
        return self.bos + [0] * len(text.split())


class StaticCaptionTokenizer:
    """In place of a BERT's tokenizer that is not here: [DEC] is the last row of the Q-Former's vocabulary."""

    def __init__(self, vocab_size: int):
        self.decoder_start = vocab_size - 1

    def __call__(self, texts: Sequence[str], length: int) -> tuple[np.ndarray, np.ndarray]:
        """One token a word, between [CLS] and [SEP]."""
        return pad([[0] * min(len(text.split()) + 2, length) for text in texts], length, 0)


def _is_here(part: frozen.Frozen) -> bool:
    """Whether a part can be opened without asking the hub for it."""
    name = part.source.partition(":")[2]
    return part.kind != "hf" or not hub.is_name(name) or hub.config_file(name, cached=True) is not None


def create_task(config: ml_collections.ConfigDict, dtype: Any) -> Task:
    """A task whose step can be compiled: what is missing of its tokenizers is replaced by stand-ins."""
    task = tasks.create(config, dtype)
    # The properties remember what they found, and so take what stands in for it.
    if not _is_here(task.parts["bert"]):
        task.caption_tokenizer = StaticCaptionTokenizer(task.blip2.qformer.vocab_size)
    if isinstance(task, Stage2) and not _is_here(task.parts["llm"]):
        task.tokenizer = StaticTokenizer(config.data)
    return task


def _abstract(tree: Any, places: Any) -> Any:
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, places)


def abstract_step(task: Task, mesh: Mesh) -> tuple[Step, tuple[TrainState, params.Tree, dict]]:
    """The jitted training step of a task and its arguments, without their values but with their places on the mesh.

    Raises:
      ValueError: the batch does not fit the mesh, or settings contradict each other.
    """
    config, shapes, switches = task.config, task.shapes(), compat.resolve(task.config.compat)
    meshes.check_batch_size(config.batch_size, mesh, task.rows_in_step())
    decays = params.resolve(optimizer.decay_table(switches.decay_all_matrices), shapes, "weight decay")
    rates = params.resolve(task.rate_table(shapes), shapes, "learning rate")
    transformation = optimizer.create(config.optimizer, config.total_steps, decays, rates, switches.epoch_schedule)

    def start(trainable: params.Tree) -> TrainState:
        return TrainState(jnp.int32(0), jax.random.key(config.seed), trainable, transformation.init(trainable))

    state = jax.eval_shape(start, shapes)
    places = sharding.state_shardings(state, mesh, config.shard_trainable)
    needed = {name: tree for name, tree in task.frozen_shapes().items() if not _is_cached(task, name)}
    rows = meshes.batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for name, x in task.schema().items()}
    arguments = _abstract(state, places), _abstract(needed, sharding.shardings(needed, mesh)), batch
    return make_step(task, transformation, places), arguments


def _is_cached(task: Task, part: str) -> bool:
    """Whether the step does without a frozen part, since its outputs are in the batch."""
    return part == "vision" and bool(task.config.data.feature_views)


def _required_bytes(message: str) -> int | None:
    """What the compiler says that a program needs which is too large, in bytes; None if it says something else."""
    match = re.search(r"Ran out of memory.*?(?:temporaries \(|Used )([\d.]+)([KMGT]?)", message, re.DOTALL)
    return int(float(match[1]) * _UNITS[match[2]]) if match else None


class Compiled(NamedTuple):
    """What the compiler made of a step; all bytes are of one device.

    Attributes:
      text: the compiled program; None if it needs more memory than there is.
      peak_bytes: of memory that must be free for it: all of the below together.
      argument_bytes: of what a step is given: parameters, optimizer, batch.
      temporary_bytes: of what exists within the step; None if it was not compiled.
      output_bytes: of what a step returns and has no place in the arguments' memory; None if it was not compiled.
      program_bytes: of the program itself; None if it was not compiled.
    """

    text: str | None
    peak_bytes: int
    argument_bytes: int
    temporary_bytes: int | None = None
    output_bytes: int | None = None
    program_bytes: int | None = None


def _argument_bytes(arguments: tuple) -> int:
    shards = [
        jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
        for x in jax.tree.leaves(arguments)
        if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    return params.size(shards)


def compile_step(step: Step, arguments: tuple, mesh: Mesh) -> Compiled:
    """A jitted step, compiled for the devices of the mesh.

    Args:
      step, arguments: of `abstract_step`.
      mesh: that they were made for.
    """
    with jax.set_mesh(mesh):
        lowered = step.lower(*arguments)
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            required = _required_bytes(str(error))
            if required is None:
                raise
            return Compiled(None, required, _argument_bytes(arguments))
    memory = compiled.memory_analysis()
    # Not its peak_memory_in_bytes, which is less where arguments end early: these memories are set aside for the step.
    sizes = (
        memory.argument_size_in_bytes,
        memory.temp_size_in_bytes,
        memory.output_size_in_bytes - memory.alias_size_in_bytes,
        memory.generated_code_size_in_bytes,
    )
    return Compiled(compiled.as_text(), sum(sizes), *sizes)
