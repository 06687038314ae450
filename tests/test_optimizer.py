"""How fast each parameter learns, and when: schedules, groups of weight decay, layer-wise decay."""

import functools
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from blip2_jax import optimizer, params
from blip2_jax.checkpoints import mapping, qformer
from blip2_jax.models.vision.vit import ViT, ViTConfig
from tests.parity import golden

STEPS = golden.Case(pathlib.Path(__file__).parent / "golden" / "lavis" / "stage1_train_steps")


def settings(**changes) -> ConfigDict:
    plain = {
        "learning_rate": 1e-3,
        "warmup": 0,
        "warmup_rate": 0.0,
        "final_share": 0.05,
        "steps_per_epoch": 0,
        "beta1": 0.9,
        "beta2": 0.98,
        "epsilon": 1e-8,
        "weight_decay": 0.05,
        "clip_norm": 0.0,
    }
    return ConfigDict(plain | changes)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.3, 3), (3, 3)])
def test_linear_up_then_a_cosine_down(warmup, steps):
    total, final_share = 10, 0.05
    factor = optimizer.schedule(settings(warmup=warmup, final_share=final_share), total)
    count = np.arange(total)
    cosine = 0.5 * (1 + np.cos(np.pi * (count - steps) / (total - steps)))
    down = final_share + (1 - final_share) * cosine
    expected = np.where(count < steps, count / max(steps, 1), down)
    np.testing.assert_allclose([factor(number) for number in count], expected, atol=1e-6)


def test_warmup_may_start_above_zero():
    factor = optimizer.schedule(settings(warmup=4, warmup_rate=2e-4), 10)
    np.testing.assert_allclose([factor(number) for number in range(5)], [0.2, 0.4, 0.6, 0.8, 1.0], atol=1e-6)


def test_a_run_of_one_step_learns():
    assert optimizer.schedule(settings(warmup=0.15), 1)(0) == 1.0


def test_by_epoch_the_rates_are_those_of_lavis():
    """Of meta.json: 3 steps from 1e-5 to 1e-3, three epochs, down to 1e-4; of later epochs two steps were recorded."""
    by_epoch = {"warmup": 3, "warmup_rate": 1e-5, "final_share": 0.1}
    config = settings(**by_epoch, steps_per_epoch=4)
    factor = jax.jit(optimizer.schedule(config, 12, by_epoch=True))
    rates = [float(1e-3 * factor(count)) for count in (0, 1, 2, 3, 4, 5, 8, 9)]
    np.testing.assert_allclose(rates, STEPS.inputs["lr"], rtol=0, atol=1e-9)
    # The last epoch may be a part of one: eleven steps are three epochs too.
    assert jax.jit(optimizer.schedule(config, 11, by_epoch=True))(8) == factor(8)
    held = optimizer.schedule(settings(**by_epoch, steps_per_epoch=6), 12, by_epoch=True)
    assert [float(held(count)) for count in (3, 4, 5)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("changes", "by_epoch", "message"),
    [
        ({"warmup": 10}, False, "warmup is 10 steps, but the run has 10"),
        ({"warmup": -1}, False, r"optimizer.warmup = -1: expected a share"),
        ({"learning_rate": 0.0}, False, r"optimizer.learning_rate = 0.0: expected a finite number above 0"),
        ({"final_share": 1.5}, False, r"optimizer.final_share = 1.5: expected a share"),
        ({"beta1": 1.0}, False, r"optimizer.beta1 = 1.0: expected at least 0 and below 1"),
        ({"beta2": -0.1}, False, r"optimizer.beta2 = -0.1: expected"),
        ({"epsilon": 0.0}, False, r"optimizer.epsilon = 0.0: expected above 0"),
        ({"weight_decay": -1.0}, False, r"optimizer.weight_decay = -1.0: expected at least 0"),
        ({"clip_norm": -1.0}, False, r"optimizer.clip_norm = -1.0: expected a norm above 0, or 0"),
        ({"warmup_rate": 1.0}, False, r"optimizer.warmup_rate = 1.0: expected a rate from 0 to"),
        ({"steps_per_epoch": 5}, False, r"steps_per_epoch = 5: expected 0, since only compat.epoch_schedule"),
        ({}, True, r"steps_per_epoch = 0: expected above 0, which compat.epoch_schedule needs"),
    ],
)
def test_nonsense_is_refused(changes, by_epoch, message):
    with pytest.raises(ValueError, match=message):
        optimizer.schedule(settings(**changes), 10, by_epoch)


def lavis_names(tree, config) -> dict[str, list[str]]:
    """Of every path of ours, what LAVIS calls it."""
    table = params.relevant(qformer.table(qformer.lavis()), tree)
    mapped = mapping.resolve(tree, table, functools.partial(qformer.layers_of, config.qformer))
    return {path: [piece.name for piece in pieces] for path, pieces in mapped.items()}


def decaying(all_matrices: bool) -> tuple[set[str], set[str]]:
    """LAVIS's names of what decays, and of what does not."""
    config, tree = golden.fresh_stage1(STEPS)
    decays = params.flatten(params.resolve(optimizer.decay_table(all_matrices), tree, "weight decay"))
    groups = {True: set(), False: set()}
    for path, names in lavis_names(tree, config).items():
        groups[decays[path]] |= set(names)
    return groups[True], groups[False]


def test_the_groups_of_weight_decay_are_those_of_lavis():
    recorded = STEPS.meta["groups"]
    assert decaying(all_matrices=True) == (set(recorded["decay"]), set(recorded["no_decay"]))


def test_ours_differ_in_the_temperature_alone():
    recorded = STEPS.meta["groups"]
    decay, spared = decaying(all_matrices=False)
    assert set(recorded["decay"]) - decay == {"temp"}
    assert spared - set(recorded["no_decay"]) == {"temp"}


def vit(**changes) -> tuple[ViTConfig, dict]:
    config = ViTConfig(28, 14, 8, layers=3, heads=2, mlp_width=12, **changes)
    image = jnp.zeros((1, config.image_size, config.image_size, 3))
    return config, ViT(config).init(jax.random.key(0), image)["params"]


def test_each_layer_of_a_vit_takes_its_own_step():
    config, tree = vit(pre_norm=True, final_norm=True)
    rates = optimizer.layer_rates(tree, config.layers, 0.5)
    decays = jax.tree.map(lambda leaf: True, tree)
    made = optimizer.create(settings(learning_rate=0.1), 10, decays, rates)
    gradients = jax.tree.map(jnp.ones_like, tree)
    updates, _ = jax.jit(made.update)(gradients, made.init(tree), tree)
    chex.assert_trees_all_equal_shapes(updates, tree)
    full = lambda leaf: -0.1 * (1.0 + 0.05 * leaf)  # Adam's first step is the sign of the gradient; then decay.
    for path, update in params.flatten(updates).items():
        leaf = params.flatten(tree)[path]
        if path.startswith("blocks/"):
            for layer, factor in enumerate((0.125, 0.25, 0.5)):
                np.testing.assert_allclose(update[layer], factor * full(leaf[layer]), rtol=1e-5, err_msg=path)
        else:
            factor = 1.0 if path.startswith("final_norm/") else 0.0625
            np.testing.assert_allclose(update, factor * full(leaf), rtol=1e-5, err_msg=path)
    shown = params.flatten(optimizer.readable(rates))
    assert shown["blocks/qkv/kernel"] == "0.125 to 0.5"
    assert shown["positions"] == 0.0625


def test_layer_rates_refuse_what_does_not_fit():
    _, tree = vit()
    with pytest.raises(ValueError, match=r"blocks/\S+ stacks 3 blocks, expected 4"):
        optimizer.layer_rates(tree, 4, 0.9)
    with pytest.raises(ValueError, match="layer-wise decay of 0"):
        optimizer.layer_rates(tree, 3, 0)
    with pytest.raises(ValueError, match="no row matches the parameter 'head/kernel'"):
        optimizer.layer_rates(tree | {"head": {"kernel": jnp.zeros((2, 2))}}, 3, 0.9)


def test_clipping_is_of_all_gradients_together():
    tree = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    flags, rates = {"a": False, "b": False}, {"a": 1.0, "b": 1.0}
    gradients = {"a": jnp.array([30.0]), "b": jnp.array([40.0])}
    made = optimizer.create(settings(clip_norm=5.0), 10, flags, rates)
    _, state = made.update(gradients, made.init(tree), tree)
    np.testing.assert_allclose([state[1].mu["a"][0], state[1].mu["b"][0]], [0.3, 0.4], rtol=1e-5)
