"""The optimizer, the training step and path tables."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from blip2_jax import optimizer, params, step
from blip2_jax.checkpoints.store import TrainState
from tests import test_step
from tests.shapes.lengths import D, E, F, L
from tests.shapes.parallel import DEVICES, PARAMETERS, everywhere
from tests.shapes.promises import KEY, Late, float32, int32, ran, traced
from tests.test_optimizer import settings

FLAT = {"vision_proj/kernel": float32[D, E], "vision_proj/bias": float32[E]}
VIT = {"class_token": float32[D], "blocks": {"up": {"kernel": float32[L, D, F], "bias": float32[L, F]}}}
RATES = {"class_token": float, "blocks": {"up": {"kernel": float32[L, 1, 1], "bias": float32[L, 1]}}}

PATHS = [
    traced(params.flatten, PARAMETERS, gives=FLAT),
    traced(params.unflatten, FLAT, gives=PARAMETERS),
    traced(params.resolve, [(".*", True)], PARAMETERS, "test", gives=everywhere(bool, PARAMETERS)),
    traced(params.relevant, [(".*", True)], PARAMETERS, gives=[(str, bool)]),
    traced(
        params.map_paths,
        lambda path, leaf: leaf.T,
        PARAMETERS,
        gives={"vision_proj": {"kernel": float32[E, D], "bias": float32[E]}},
    ),
    traced(params.count, PARAMETERS, gives=int),
    traced(params.size, PARAMETERS, gives=int),
    traced(params.describe, PARAMETERS, {}, gives=str),
    ran(params.sha256, PARAMETERS, gives=str),
]

OPTIMIZER = [
    traced(optimizer.schedule, settings(), 10, then=lambda factor: factor(jnp.int32(3)), gives=float32[()]),
    traced(
        optimizer.schedule,
        *(settings(steps_per_epoch=4), 10, True),
        then=lambda factor: factor(jnp.int32(3)),
        gives=float32[()],
    ),
    ran(optimizer.layer_rates, VIT, L, 0.9, gives=RATES),
    ran(optimizer.readable, {"a": 1.0, "b": float32[L, 1, 1]}, gives={"a": float, "b": str}),
]

TREE = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), test_step.TRAINABLE)


def updates(transformation):
    """What it makes of gradients that are the parameters."""
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), TREE)
    return transformation.update(zeros, transformation.init(zeros), zeros)[0]


TRANSFORMATION = test_step.transformation()
STATE = TrainState(int32[()], KEY, TREE, jax.eval_shape(TRANSFORMATION.init, TREE), int32[2])
METRICS = dict.fromkeys(("loss", "error", "gradient_norm"), float32[()])
COUNTS = dict.fromkeys(("skipped_steps", "skipped_in_a_row"), int32[()])

STEP = [
    traced(
        optimizer.create,
        *(settings(), 10, everywhere(True, TREE), everywhere(1.0, TREE)),
        then=updates,
        gives=TREE,
    ),
    traced(step.all_finite, PARAMETERS, gives=jax.ShapeDtypeStruct((), bool)),
    traced(
        step.make_step,
        *(test_step.Regression(), TRANSFORMATION),
        then=lambda step: jax.eval_shape(step, STATE, test_step.FROZEN, test_step.batch(0)),
        gives=(STATE, METRICS | COUNTS),
    ),
    ran(
        step.initial_state,
        *(TREE, TRANSFORMATION, Late(lambda _: jax.random.key(0)), DEVICES),
        gives=(STATE, everywhere(NamedSharding, STATE)),
    ),
]

PROMISES = PATHS + OPTIMIZER + STEP
