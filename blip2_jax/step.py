"""The compiled training step. One whose loss or gradient is not finite changes nothing and is counted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from blip2_jax import params
from blip2_jax.checkpoints.store import TrainState
from blip2_jax.data.pipeline import Batch
from blip2_jax.parallel import sharding
from blip2_jax.tasks.common import Metrics, Task

Step = Callable[[TrainState, params.Tree, Batch], tuple[TrainState, Metrics]]


def all_finite(tree: Any) -> jax.Array:
    """bool[]: no leaf holds an infinity or a NaN."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def make_step(task: Task, transformation: optax.GradientTransformation, shardings: TrainState | None = None) -> Step:
    """The jitted step(state, frozen, batch) -> (state, metrics); the state it is given is used up.

    Where the loss or a gradient is not finite, parameters and optimizer stay bit for bit as they were, so that neither
    moments nor the schedule's count know of the step; only `step` and `skipped` go on, and with them random numbers and
    data. Beside the task's own metrics there are `loss`, `gradient_norm` (of the trainable parameters, which are all
    that have gradients; before clipping), `skipped_steps` and `skipped_in_a_row`, int32[].

    Args:
      task: says loss and gradients.
      transformation: from gradients to updates.
      shardings: of the state that a step returns, which are those that it should be given; None: as the compiler finds.
    """

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=None if shardings is None else (shardings, None))
    def step(state: TrainState, frozen: params.Tree, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.rng, state.step)
        (loss, metrics), gradients = task.value_and_gradients(state.trainable, frozen, batch, key)
        updates, optimizer = transformation.update(gradients, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        finite = all_finite((loss, gradients))
        trainable, optimizer = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (trainable, optimizer), (state.trainable, state.optimizer)
        )
        total, in_a_row = state.skipped
        skipped = jnp.stack([total + ~finite, jnp.where(finite, 0, in_a_row + 1)])
        counts = {"skipped_steps": skipped[0], "skipped_in_a_row": skipped[1]}
        metrics = {"loss": loss, **metrics, "gradient_norm": optax.tree.norm(gradients), **counts}
        return TrainState(state.step + 1, state.rng, trainable, optimizer, skipped), metrics

    return step


def initial_state(
    trainable: params.Tree,
    transformation: optax.GradientTransformation,
    rng: jax.Array,
    mesh: Mesh,
    sharded: bool = True,
) -> tuple[TrainState, TrainState]:
    """The state before the first step, spread over the mesh, and its shardings.

    Args:
      trainable: the parameters, the same in every process.
      transformation: whose state begins with them.
      rng: key of the run.
      mesh: that the steps run on.
      sharded: whether parameters and moments are divided over it, or whole on every device.
    """
    # As words, since a key cannot be sent to devices of other processes.
    words, kind = np.asarray(jax.random.key_data(rng)), jax.random.key_impl(rng)

    def start(trainable: params.Tree) -> TrainState:
        key = jax.random.wrap_key_data(words, impl=kind)
        return TrainState(jnp.int32(0), key, trainable, transformation.init(trainable))

    places = sharding.state_shardings(jax.eval_shape(start, trainable), mesh, sharded)
    trainable = jax.tree.map(sharding.put, trainable, places.trainable)
    return jax.jit(start, out_shardings=places)(trainable), places
