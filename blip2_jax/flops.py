"""Floating-point operations of a training step, from the sizes of a recipe alone: what MFU is measured against.

A product of [m, k] and [k, n] is 2 m k n operations; what is no matrix product or convolution is not counted. Attention
counts whole, be it masked or not. A frozen part whose input needs no gradient counts once; a frozen part that gradients
pass through counts twice, for its weights' gradients are never formed; what is trained counts three times. What is
computed again to save memory counts nothing: it is work, but no progress.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from blip2_jax.data.pipeline import Schema
from blip2_jax.models import lora
from blip2_jax.models.language.decoder import Decoder
from blip2_jax.models.language.llama import Llama
from blip2_jax.models.language.t5 import T5
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.models.vision import VisionEncoder
from blip2_jax.models.vision.efficientnet_lite import EfficientNetLite
from blip2_jax.models.vision.vit import ViT
from blip2_jax.tasks.common import Task
from blip2_jax.tasks.stage1 import Stage1
from blip2_jax.tasks.stage2 import Stage2

FROZEN, PASSED_THROUGH, TRAINED = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Part:
    """Some of a step.

    Attributes:
      name: of the part.
      forward: operations of its forward pass, for the whole batch.
      passes: FROZEN, PASSED_THROUGH or TRAINED.
    """

    name: str
    forward: float
    passes: int

    @property
    def total(self) -> float:
        return self.forward * self.passes


def _attention(queries: float, keys: float, width: float) -> float:
    """Scores and weighted sum: `queries` tokens that look at `keys` tokens, with heads of `width` together."""
    return 4.0 * queries * keys * width


def _dense(tokens: float, *widths: float) -> float:
    """A chain of matrix products from each width to the next."""
    return 2.0 * tokens * sum(a * b for a, b in itertools.pairwise(widths))


def vit(encoder: ViT) -> float:
    """Operations of a vision transformer, for one picture."""
    c = encoder.config
    block = _dense(c.tokens, c.width, 3 * c.width) + _attention(c.tokens, c.tokens, c.width)
    block += _dense(c.tokens, c.width, c.width) + _dense(c.tokens, c.width, c.mlp_width, c.width)
    return _dense(c.tokens - c.class_token, 3 * c.patch**2, c.width) + c.layers * block


def efficientnet(encoder: EfficientNetLite, image_size: int) -> float:
    """Operations of an EfficientNet-Lite, for one picture."""
    side = -(-image_size // 2)
    total, width = 2.0 * side**2 * 27 * encoder.stem_width, encoder.stem_width
    for stage in encoder.stages:
        for repeat in range(stage.repeats):
            inner = width * stage.expand
            total += _dense(side**2, width, inner) if stage.expand != 1 else 0.0
            side = -(-side // (stage.stride if repeat == 0 else 1))
            total += 2.0 * side**2 * stage.kernel**2 * inner + _dense(side**2, inner, stage.width)
            width = stage.width
    return total


def vision(encoder: VisionEncoder) -> float:
    """Operations of an image encoder, for one picture.

    Raises:
      ValueError: an encoder whose operations nobody has written down.
    """
    if isinstance(encoder.module, ViT):
        return vit(encoder.module)
    if isinstance(encoder.module, EfficientNetLite):
        return efficientnet(encoder.module, encoder.image_size)
    raise ValueError(f"the operations of {type(encoder.module).__name__} are not known: add them to blip2_jax/flops.py")


def image_projection(c: QFormerConfig, tokens: int, width: int) -> float:
    """Image tokens of a width to the keys and values of every cross-attention, for one picture."""
    return _dense(tokens, width, 2 * c.width * c.cross_attention_layers)


def qformer_pass(c: QFormerConfig, queries: int, text: int, image_tokens: int = 0, past: int = 0) -> float:
    """Operations of one pass of one row through the Q-Former's layers.

    Args:
      c: its sizes.
      queries, text: tokens that go through it.
      image_tokens: that the queries read.
      past: tokens of an earlier pass that are seen, too.
    """
    tokens = queries + text
    layer = _dense(tokens, *[c.width] * 5) + _attention(tokens, past + tokens, c.width)
    layer += _dense(tokens, c.width, c.mlp_width, c.width)
    cross = _dense(queries, c.width, c.width, c.width) + _attention(queries, image_tokens, c.width)
    return c.layers * layer + (c.cross_attention_layers * cross if queries else 0.0)


def decoder(model: Decoder, tokens: int, predicted: int) -> float:
    """Operations of a decoder language model for one row, the head at the `predicted` tokens alone."""
    c = model.config
    heads, kv_heads = c.heads * c.head_size, c.kv_heads * c.head_size
    layer = _dense(tokens, c.width, 2 * (heads + kv_heads)) + _attention(tokens, tokens, heads)
    layer += (3 if isinstance(model, Llama) else 2) * _dense(tokens, c.width, c.mlp_width)
    return c.layers * layer + _dense(predicted, c.width, c.vocab_size)


def t5(model: T5, read: int, written: int) -> float:
    """Operations of a T5 that reads some tokens and writes others, for one row."""
    c = model.config
    heads = c.heads * c.head_size
    own = lambda tokens: _dense(tokens, c.width, 4 * heads) + _attention(tokens, tokens, heads)
    feed_forward = lambda tokens: 3 * _dense(tokens, c.width, c.mlp_width)
    cross = 2 * _dense(written, c.width, heads) + 2 * _dense(read, c.width, heads) + _attention(written, read, heads)
    encoded = c.encoder_layers * (own(read) + feed_forward(read))
    return (
        encoded
        + c.decoder_layers * (own(written) + cross + feed_forward(written))
        + _dense(written, c.width, c.vocab_size)
    )


def _passes(task: Task) -> int:
    """How often the Q-Former counts: its own weights do not learn where it has adapters."""
    return PASSED_THROUGH if "qformer" in task.lora.targets else TRAINED


def _adapters(task: Task) -> list[Part]:
    """What adapters add, counted: the loss with them and without them."""
    if not task.lora.targets:
        return []
    shapes, key = (task.shapes(), task.frozen_shapes()), jax.eval_shape(lambda: jax.random.key(0))
    trees = jax.eval_shape(lambda *trees: lora.assemble(*trees, 1.0), *shapes)
    count = lambda trees: executed(task.objective.loss, *trees, task.schema(), key)
    return [Part("adapters", count(trees) - count([lora.bare(tree) for tree in trees]), TRAINED)]


def _stage1(task: Stage1, batch: int, length: int) -> list[Part]:
    c, objective, embed = task.blip2.qformer, task.objective, task.blip2.embed_width
    images, passes = task.encoder.tokens, _passes(task)
    parts = [
        Part("queries read the image", batch * qformer_pass(c, c.queries, 0, images), passes),
        Part("text alone", batch * qformer_pass(c, 0, length), passes),
    ]
    if objective.itc:
        heads = _dense(batch * (c.queries + 1), c.width, embed)
        parts.append(Part("ITC", heads + _dense(batch * batch * c.queries, embed, 1), TRAINED))
    if objective.itm:
        pair = qformer_pass(c, c.queries, length, images) + _dense(c.queries, c.width, 2)
        parts.append(Part("ITM", 3 * batch / objective.itm_every * pair, passes))
    if objective.itg:
        row = qformer_pass(c, 0, length, past=c.queries) + _dense(length, c.width, c.width, c.vocab_size)
        parts.append(Part("ITG", batch / objective.itg_every * row, passes))
    return parts


def _stage2(task: Stage2, batch: int, schema: Schema) -> list[Part]:
    c, model, loss = task.blip2.qformer, task.language_model, task.objective
    length = lambda name: schema[name].shape[1] if name in schema else 0
    read = qformer_pass(c, c.queries, length("instruction_ids"), task.encoder.tokens)
    read += _dense(c.queries, c.width, model.config.width)
    prefix, target = len(loss.begin) + c.queries, length("target_ids")
    if isinstance(model, T5):
        row = t5(model, prefix + length("prompt_ids"), target)
    else:
        row = decoder(model, prefix + loss.row_length, target)
    return [
        Part("queries read the image", batch * read, _passes(task)),
        Part("language model", batch * row, PASSED_THROUGH),
    ]


def parts(task: Task) -> list[Part]:
    """The parts of a task's training step.

    Raises:
      ValueError: an image encoder whose operations nobody has written down.
    """
    schema, c = task.schema(), task.blip2.qformer
    batch = task.config.batch_size
    projection = image_projection(c, task.encoder.tokens, task.encoder.width)
    shared = [Part("image projection", batch * projection, _passes(task))]
    if not task.config.data.feature_views:
        shared.insert(0, Part("image encoder", batch * vision(task.encoder), FROZEN))
    if isinstance(task, Stage2):
        return shared + _stage2(task, batch, schema) + _adapters(task)
    return shared + _stage1(task, batch, schema["text_ids"].shape[1]) + _adapters(task)


def per_step(task: Task) -> float:
    """Operations of a task's training step, for the whole batch."""
    return sum(part.total for part in parts(task))


# Counting what a traced program does.


def _inner(value: Any) -> list[Any]:
    """The programs inside a parameter of an equation."""
    values = value if isinstance(value, tuple | list) else [value]
    return [getattr(item, "jaxpr", item) for item in values if hasattr(getattr(item, "jaxpr", item), "eqns")]


def _product(equation: Any) -> float:
    """Operations of one equation without programs inside."""
    if equation.primitive.name == "dot_general":
        contracted = equation.params["dimension_numbers"][0][0]
        left = equation.invars[0].aval.shape
        return (
            2.0 * float(np.prod(equation.outvars[0].aval.shape)) * float(np.prod([left[axis] for axis in contracted]))
        )
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * float(np.prod(equation.outvars[0].aval.shape)) * float(np.prod(kernel)) / outputs
    return 0.0


def _count(program: Any, wanted: Sequence[bool]) -> float:
    """Operations behind the outputs that are wanted; what is traced and never used, the compiler drops, too."""
    total, needed = 0.0, {out for out, want in zip(program.outvars, wanted, strict=True) if want and _is_variable(out)}
    for equation in reversed(program.eqns):
        used = [out in needed for out in equation.outvars]
        if any(used) or equation.effects:
            total += _equation(equation, used)
            needed.update(filter(_is_variable, equation.invars))
    return total


def _is_variable(atom: Any) -> bool:
    return not hasattr(atom, "val")  # Which literals have.


def _equation(equation: Any, used: Sequence[bool]) -> float:
    name, settings = equation.primitive.name, equation.params
    inner = [program for value in settings.values() for program in _inner(value)]
    if not inner:
        return _product(equation)
    times = 1.0
    if name == "scan":
        # What is carried from round to round is needed in each; only the other outputs are stacked.
        carried = [out.aval.ndim == own.aval.ndim for out, own in zip(equation.outvars, inner[0].outvars, strict=True)]
        times, used = settings["length"], [any(both) for both in zip(used, carried, strict=True)]
    elif name == "shard_map":
        axes = settings.get("newly_manual_axes", settings.get("manual_axes"))  # By version of jax.
        times = float(np.prod([settings["mesh"].shape[axis] for axis in axes]))
    same = name != "while"  # Whose condition has an output of its own.
    counts = [_count(program, used if same else [True] * len(program.outvars)) for program in inner]
    return times * (max if name == "cond" else sum)(counts)


def executed(function: Callable, *arguments: Any) -> float:
    """Operations that a function asks for when called with such arguments: all of them, recomputed ones too.

    A loop whose number of rounds depends on data counts one round.
    """
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    return _count(program, [True] * len(program.outvars))
