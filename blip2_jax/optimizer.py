"""AdamW as the paper (section 4), steered by path tables: what decays, and how fast each parameter learns."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from blip2_jax import params

# Where the parameters of a ViT stand: before its blocks, in them, or behind the last.
_DEPTHS: params.Table[str] = [
    (r"patch_embedding/.*|class_token|positions|pre_norm/.*", "before"),
    (r"blocks/.*", "block"),
    (r"final_norm/.*", "behind"),
]


def check(config: ml_collections.ConfigDict, total_steps: int, by_epoch: bool = False) -> None:
    """Raise ValueError for settings of config.optimizer that make no sense."""

    def require(name: str, expected: str, right: bool) -> None:
        if not right:
            raise ValueError(f"optimizer.{name} = {config[name]}: expected {expected}")

    require("learning_rate", "a finite number above 0", 0 < config.learning_rate < math.inf)
    require("warmup", "a share of the run below 1, or a number of steps", config.warmup >= 0)
    require("final_share", "a share of the learning rate from 0 to 1", 0 <= config.final_share <= 1)
    require("beta1", "at least 0 and below 1", 0 <= config.beta1 < 1)
    require("beta2", "at least 0 and below 1", 0 <= config.beta2 < 1)
    require("epsilon", "above 0", config.epsilon > 0)
    require("weight_decay", "at least 0", 0 <= config.weight_decay < math.inf)
    require("clip_norm", "a norm above 0, or 0 for none", config.clip_norm >= 0)
    rate = f"a rate from 0 to optimizer.learning_rate = {config.learning_rate}"
    require("warmup_rate", rate, 0 <= config.warmup_rate <= config.learning_rate)
    if by_epoch:
        require("steps_per_epoch", "above 0, which compat.epoch_schedule needs", config.steps_per_epoch > 0)
    else:
        require("steps_per_epoch", "0, since only compat.epoch_schedule has epochs", config.steps_per_epoch == 0)
        warmup = warmup_steps(config, total_steps)
        if warmup >= total_steps:
            raise ValueError(f"optimizer.warmup is {warmup} steps, but the run has {total_steps}")


def warmup_steps(config: ml_collections.ConfigDict, total_steps: int) -> int:
    """Steps of the warm-up that config.optimizer names, as a share of the run or as a number."""
    return round(config.warmup * total_steps) if config.warmup < 1 else int(config.warmup)


def schedule(config: ml_collections.ConfigDict, total_steps: int, by_epoch: bool = False) -> optax.Schedule:
    """A factor on every learning rate, by steps done: linear warm-up to 1, then a cosine down to `final_share`.

    Args:
      config: as `create` takes it.
      total_steps: length of the run.
      by_epoch: as LAVIS (compat.epoch_schedule): warm-up is of epoch 0, which then keeps its rate to its end, and the
        cosine has one value an epoch. A warm-up longer than the epoch is cut off there.

    Raises:
      ValueError: settings that make no sense.
    """
    check(config, total_steps, by_epoch)
    warmup, start = warmup_steps(config, total_steps), config.warmup_rate / config.learning_rate
    if not by_epoch:
        return optax.warmup_cosine_decay_schedule(start, 1.0, warmup, total_steps, config.final_share)
    epochs = math.ceil(total_steps / config.steps_per_epoch)

    def factor(count: Any) -> jax.Array:
        epoch = count // config.steps_per_epoch
        rising = jnp.minimum(1.0, start + (1.0 - start) * count / max(warmup, 1))
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * epoch / epochs))
        return jnp.where(epoch == 0, rising, config.final_share + (1.0 - config.final_share) * cosine)

    return factor


def decay_table(all_matrices: bool = False) -> params.Table[bool]:
    """Which parameters weight decay pulls: not norms, biases and the temperature.

    Args:
      all_matrices: as LAVIS (compat.decay_all_matrices), which spares what has one dimension and what is called bias;
        its temperature has none, so it decays. Ours is by name, since our shapes are stacked and split into heads.
    """
    spared = r".*/(bias|scale)" if all_matrices else r".*/(bias|scale)|temperature"
    return [(spared, False), (r".*", True)]


def layer_rates(tree: params.Tree, layers: int, decay: float) -> params.Tree:
    """Multipliers of the learning rate for an unfrozen ViT, the smaller the further from its output.

    Block l of L has decay**(L - l), counted from 0, what stands before the blocks decay**(L + 1), a norm behind them 1
    (LAVIS, eva_vit.py; there CLIP's patch embedding and first norm slip through to 1).

    Args:
      tree: of the ViT's parameters or their shapes; those of blocks are stacked, [L, ...].
      layers: L.
      decay: above 0, at most 1.

    Returns:
      A number at every leaf, and float32[L, 1, ...] at those of the blocks.

    Raises:
      ValueError: a parameter that is no ViT's, blocks of another number, or a decay that makes no sense.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"a layer-wise decay of {decay}: expected a factor above 0 and at most 1")
    depths = params.flatten(params.resolve(params.relevant(_DEPTHS, tree), tree, "layer-wise decay"))

    def rate(path: str, leaf: Any) -> float | np.ndarray:
        if depths[path] != "block":
            return decay ** (layers + 1) if depths[path] == "before" else 1.0
        if leaf.shape[0] != layers:
            raise ValueError(f"layer-wise decay: {path} stacks {leaf.shape[0]} blocks, expected {layers}")
        rates = decay ** np.arange(layers, 0, -1, dtype=np.float32)
        return rates.reshape(-1, *(1,) * (len(leaf.shape) - 1))

    return params.map_paths(rate, tree)


def readable(rates: params.Tree) -> params.Tree:
    """The same tree with a text in the place of an array."""
    text = lambda rate: rate if np.ndim(rate) == 0 else f"{np.min(rate):.3g} to {np.max(rate):.3g}"
    return jax.tree.map(text, rates)


def create(
    config: ml_collections.ConfigDict,
    total_steps: int,
    decays: params.Tree,
    rates: params.Tree,
    by_epoch: bool = False,
) -> optax.GradientTransformation:
    """The optimizer of the trainable parameters.

    Args:
      config: learning_rate, warmup (a share of the run below 1, else steps), warmup_rate (where it starts),
        final_share, steps_per_epoch, beta1, beta2, epsilon, weight_decay, clip_norm (of all gradients; 0: none).
      total_steps: length of the run.
      decays: bool at every trainable leaf.
      rates: multiplier of the learning rate, and so of the decay, at every trainable leaf: a number, or an array that
        broadcasts to the parameter.
      by_epoch: see `schedule`.
    """
    factor = schedule(config, total_steps, by_epoch)

    def scale_by_rate(updates, state, _params=None):
        step = -config.learning_rate * factor(state.count)
        updates = jax.tree.map(lambda update, rate: step * rate * update, updates, rates)
        return updates, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    steps = [
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity(),
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask=decays),
        optax.GradientTransformation(lambda _: optax.ScaleByScheduleState(jnp.zeros([], int)), scale_by_rate),
    ]
    return optax.chain(*steps)
