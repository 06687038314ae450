"""AdamW as the paper (section 4), steered by path tables: what decays, and how fast each parameter learns."""

from __future__ import annotations

import jax
import ml_collections
import optax

from blip2_jax import params


def schedule(config: ml_collections.ConfigDict, total_steps: int) -> optax.Schedule:
    """Linear warm-up to 1, then cosine down to `final_share`, by step; a factor on every learning rate."""
    warmup = round(config.warmup * total_steps) if config.warmup < 1 else int(config.warmup)
    if not 0 <= warmup < total_steps:
        raise ValueError(f"optimizer.warmup is {warmup} steps, but the run has {total_steps}")
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, total_steps, config.final_share)


def create(
    config: ml_collections.ConfigDict,
    total_steps: int,
    decays: params.Tree,
    rates: params.Tree,
) -> optax.GradientTransformation:
    """The optimizer of the trainable parameters.

    Args:
      config: learning_rate, warmup (a share of the run below 1, else steps), final_share, beta1, beta2, epsilon,
        weight_decay, clip_norm (0: none).
      total_steps: length of the run.
      decays: bool at every trainable leaf.
      rates: multiplier of the learning rate at every trainable leaf.
    """
    factor = schedule(config, total_steps)

    def scale_by_rate(updates, state, _params=None):
        step = -config.learning_rate * factor(state.count)
        updates = jax.tree.map(lambda update, rate: step * rate * update, updates, rates)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    steps = [
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.GradientTransformation(lambda _: optax.ScaleByScheduleState(jax.numpy.zeros([], int)), scale_by_rate),
    ]
    return optax.chain(*steps)
