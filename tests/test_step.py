"""The training step: what is not finite changes nothing, and is counted; a state stays where it lies."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import optimizer
from blip2_jax.checkpoints.store import Store
from blip2_jax.parallel import mesh as meshes
from blip2_jax.step import all_finite, initial_state, make_step
from tests.test_optimizer import settings


class Regression:
    """As much of a task as a step asks for: rows of x and y, and a loss that `batch["poison"]` spoils."""

    def value_and_gradients(self, trainable, frozen, batch, key):
        return jax.value_and_grad(self.loss, has_aux=True)(trainable, frozen, batch, key)

    def loss(self, trainable, frozen, batch, key):
        found = batch["x"] @ trainable["vision_proj"]["kernel"] @ frozen["after"]
        error = jnp.mean((found - batch["y"]) ** 2) + 1e-3 * jax.random.normal(key)
        return error * jnp.mean(batch["poison"]), {"error": error}


class InfiniteSlope(Regression):
    """A finite loss with a gradient that is not."""

    def loss(self, trainable, frozen, batch, key):
        loss, metrics = super().loss(trainable, frozen, batch | {"poison": jnp.ones(8)}, key)
        bias = trainable["vision_proj"]["bias"][0]
        return loss + jnp.sqrt((bias - jax.lax.stop_gradient(bias)) + jnp.mean(batch["poison"])), metrics


# Of numpy, since processes find each other before jax computes anything.
TRAINABLE = {
    "vision_proj": {"kernel": np.arange(32, dtype=np.float32).reshape(8, 4) / 32, "bias": np.ones(4, np.float32)}
}
FROZEN = {"after": np.eye(4, 2, dtype=np.float32)}


def transformation():
    everywhere = lambda value: jax.tree.map(lambda _: value, TRAINABLE)
    config = settings(learning_rate=0.01, warmup=5, warmup_rate=0.001, clip_norm=1.0)
    return optimizer.create(config, 50, everywhere(True), everywhere(1.0))


def batch(number, poison=1.0):
    rng = np.random.default_rng(number)
    rows = {"x": rng.normal(size=(8, 8)), "y": rng.normal(size=(8, 2)), "poison": np.full(8, poison)}
    return {name: array.astype(np.float32) for name, array in rows.items()}


def start(mesh="data=2,fsdp=2,tensor=2", sharded=True, task=None):
    mesh = meshes.make_mesh(mesh)
    state, places = initial_state(TRAINABLE, transformation(), jax.random.key(3), mesh, sharded)
    return mesh, state, places, make_step(task or Regression(), transformation(), places)


def host(tree):
    """A copy that a donated state does not take along."""
    as_numbers = lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return jax.tree.map(lambda x: np.array(as_numbers(x)), tree)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_all_finite(value):
    tree = {"a": jnp.ones(3), "b": [jnp.float32(2.0)]}
    chex.assert_shape(all_finite(tree), ())
    assert all_finite(tree)
    assert not all_finite(tree | {"c": jnp.array([[1.0, value]])})


@pytest.mark.parametrize(("task", "poison"), [(Regression, np.nan), (Regression, np.inf), (InfiniteSlope, 0.0)])
def test_what_is_not_finite_changes_nothing_and_is_counted(task, poison):
    mesh, state, _, step = start(task=task())
    counted = []
    with jax.set_mesh(mesh):
        for number, factor in enumerate([1.0, poison, poison, 1.0, poison]):
            before = host((state.trainable, state.optimizer, state.rng))
            state, metrics = step(state, FROZEN, batch(number, factor))
            after = host((state.trainable, state.optimizer, state.rng))
            if factor == 1.0:
                assert int(after[1][1].count) == int(before[1][1].count) + 1
                assert (after[0]["vision_proj"]["kernel"] != before[0]["vision_proj"]["kernel"]).any()
            else:
                chex.assert_trees_all_equal(after, before)
                assert task is InfiniteSlope or not np.isfinite(metrics["loss"])
                assert not np.isfinite(metrics["gradient_norm"])
            counted.append((int(metrics["skipped_steps"]), int(metrics["skipped_in_a_row"])))
            assert int(state.step) == number + 1
    assert counted == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    assert host(state.skipped).tolist() == [3, 1]


def test_a_skipped_step_is_as_if_its_batch_had_not_been():
    """The schedule and the moments go on where they stood; only the step's number, and so its key, is another."""

    class Quiet(Regression):
        def loss(self, trainable, frozen, batch, key):
            return super().loss(trainable, frozen, batch, jax.random.key(0))

    ends = []
    for batches in ([batch(0), batch(1, np.nan), batch(2)], [batch(0), batch(2)]):
        mesh, state, _, step = start(task=Quiet())
        with jax.set_mesh(mesh):
            for one in batches:
                state, _ = step(state, FROZEN, one)
        ends.append(host((state.trainable, state.optimizer)))
    chex.assert_trees_all_equal(*ends)


@pytest.mark.parametrize("sharded", [True, False])
def test_a_state_stays_where_it_lies(sharded):
    mesh, state, places, step = start(sharded=sharded)
    divided = state.trainable["vision_proj"]["kernel"].addressable_shards[0].data.shape
    assert divided == ((4, 2) if sharded else (8, 4))
    with jax.set_mesh(mesh):
        state, _ = step(state, FROZEN, batch(0))
        compiled = step._cache_size()
        state, _ = step(state, FROZEN, batch(1))
    assert step._cache_size() == compiled
    same = jax.tree.map(lambda leaf, place: leaf.sharding == place, state, places)
    assert all(jax.tree.leaves(same))


def test_the_mesh_changes_nothing():
    ends = []
    for mesh, sharded in (("data=8", True), ("data=2,fsdp=2,tensor=2", True), ("data=2,fsdp=2,tensor=2", False)):
        mesh, state, _, step = start(mesh, sharded)
        with jax.set_mesh(mesh):
            for number in range(3):
                state, metrics = step(state, FROZEN, meshes.global_batch(batch(number), 8, mesh))
        ends.append(host((state.trainable, metrics)))
    chex.assert_trees_all_close(ends[0], ends[1], rtol=1e-5)
    chex.assert_trees_all_close(ends[0], ends[2], rtol=1e-5)


def test_the_gradient_norm_is_that_before_clipping():
    mesh, state, _, step = start()
    loss = lambda trainable: Regression().loss(trainable, FROZEN, batch(0), jax.random.key(0))[0]
    gradients = jax.grad(loss)(TRAINABLE)
    expected = np.sqrt(sum((np.asarray(leaf) ** 2).sum() for leaf in jax.tree.leaves(gradients)))
    with jax.set_mesh(mesh):
        _, metrics = step(state, FROZEN, batch(0))
    np.testing.assert_allclose(metrics["gradient_norm"], expected, rtol=1e-5)


# Checkpoints.


def test_a_checkpoint_brings_everything_back_to_its_place(tmp_path):
    mesh, state, places, step = start()
    with jax.set_mesh(mesh):
        for poison in (1.0, np.nan):
            state, _ = step(state, FROZEN, batch(0, poison))
    store, data = Store(tmp_path / "checkpoints"), {"rejected": {"missing": 3}}
    store.save(state, data=data, config={}, frozen={}, metrics=[{"step": 1, "loss": 0.5}])
    assert store.settle() is None
    _, fresh, _, _ = start()
    restored = store.restore(fresh)
    assert store.facts("data") == data
    assert store.facts("metrics") == [{"step": 1, "loss": 0.5}]
    assert store.facts("weather") is None
    store.close()
    chex.assert_trees_all_equal(host(restored), host(state))
    assert host(restored.skipped).tolist() == [1, 1]
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, place: leaf.sharding == place, restored, places)))


def test_a_checkpoint_from_before_steps_were_counted_is_read(tmp_path, monkeypatch):
    mesh, state, _, step = start()
    with jax.set_mesh(mesh):
        state, _ = step(state, FROZEN, batch(0))
    store = Store(tmp_path / "checkpoints")
    save = store._checkpointer.save_checkpointables_async

    def as_before(number, parts, **options):
        run = {name: parts["run"][name] for name in ("step", "rng")}
        return save(number, parts | {"run": run}, **options)

    monkeypatch.setattr(store._checkpointer, "save_checkpointables_async", as_before)
    store.save(state)
    assert store.settle() is None
    _, fresh, _, _ = start()
    restored = store.restore(fresh)
    store.close()
    chex.assert_trees_all_equal(host(restored), host(state))
    assert host(restored.skipped).tolist() == [0, 0]
