"""Checkpoints of a run: written while it goes on, kept by rule, held against their manifest, tried again."""

import errno
import functools
import os
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax.checkpoints import manifest
from blip2_jax.checkpoints.store import Keep, Store, TrainState, find_checkpoint, load_trainable

FACTS = {"config": {"task": "stage1"}, "frozen": {"vision": {"source": "nano:"}}, "data": {}}


def state(step: int) -> TrainState:
    trainable = {"kernel": jnp.arange(6.0).reshape(2, 3) + step}
    moments = {"mu": jax.tree.map(jnp.zeros_like, trainable)}
    return TrainState(jnp.int32(step), jax.random.key(0), trainable, moments)


def saved(folder, *steps: int, keep: Keep | None = None, evaluated=None) -> list[int]:
    """The checkpoints that are there after some were written."""
    store = Store(folder / "checkpoints", keep or Keep(9))
    for step in steps:
        store.save(state(step), (evaluated or {}).get(step), **FACTS)
        assert store.settle() is None
    store.close()
    return sorted(manifest.steps(folder / "checkpoints"))


def newest(folder) -> tuple[int, float]:
    """Step of the newest whole checkpoint, and what it says that it is."""
    store = Store(folder / "checkpoints")
    restored = store.restore(state(0))
    store.close()
    return int(restored.step), float(restored.trainable["kernel"][0, 0])


def test_what_is_written_is_the_state_that_was_given(tmp_path):
    """Though the next steps overwrite it meanwhile."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        trainable = jax.tree.map(lambda leaf: leaf + 1, state.trainable)
        return TrainState(state.step + 1, state.rng, trainable, state.optimizer, state.skipped)

    start = TrainState(jnp.int32(0), jax.random.key(0), {"kernel": jnp.zeros((2000, 1000))}, {"count": jnp.int32(0)})
    current, store = step(start), Store(tmp_path / "checkpoints", Keep(9))
    for _ in range(3):
        store.save(current, **FACTS)
        for _ in range(4):
            current = step(current)
        jax.block_until_ready(current)
        assert store.settle() is None
    store.close()
    for number in (1, 5, 9):
        kernel = load_trainable(tmp_path / "checkpoints" / str(number))["kernel"]
        chex.assert_trees_all_equal(kernel, np.full((2000, 1000), number, np.float32))


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (Keep(2), [5, 6]),
        (Keep(1, every=3), [3, 6]),
        (Keep(1, best="eval/r1"), [4, 6]),
        (Keep(1, best="-eval/loss"), [2, 6]),
        (Keep(2, every=3, best="eval/r1"), [3, 4, 5, 6]),
    ],
)
def test_which_checkpoints_are_kept(tmp_path, keep, left):
    evaluated = {2: {"eval/r1": 0.1, "eval/loss": 0.5}, 4: {"eval/r1": 0.3, "eval/loss": 0.7}}
    evaluated[6] = {"eval/r1": 0.2, "eval/loss": float("nan")}
    assert saved(tmp_path, *range(1, 7), keep=keep, evaluated=evaluated) == left


def test_the_best_so_far_is_known_after_a_restart(tmp_path):
    keep = Keep(1, best="eval/r1")
    saved(tmp_path, 1, 2, keep=keep, evaluated={1: {"eval/r1": 0.9}, 2: {"eval/r1": 0.1}})
    assert saved(tmp_path, 3, 4, keep=keep, evaluated={3: {"eval/r1": 0.8}, 4: {"eval/r1": 0.7}}) == [1, 4]


def test_the_best_may_be_judged_by_another_metric_afterwards(tmp_path):
    saved(tmp_path, 1, 2, keep=Keep(1, best="eval/r1"), evaluated={1: {"eval/r1": 0.9}, 2: {"eval/r1": 0.1}})
    keep, evaluated = Keep(1, best="-eval/loss"), {3: {"eval/loss": 0.2}, 4: {"eval/loss": 0.3}}
    assert saved(tmp_path, 3, 4, keep=keep, evaluated=evaluated) == [3, 4]


def test_a_metric_that_nobody_measures_is_named(tmp_path):
    with pytest.raises(ValueError, match="keep_best: no evaluation measures 'eval/r2'; measured are eval/r1"):
        saved(tmp_path, 1, keep=Keep(1, best="eval/r2"), evaluated={1: {"eval/r1": 0.1}})


def largest(checkpoint):
    """The file of the parameters."""
    written = (file for file in (checkpoint / "trainable").rglob("*") if file.is_file())
    return max(written, key=lambda file: file.stat().st_size)


def cut_short(checkpoint):
    os.truncate(largest(checkpoint), 10)


def delete(checkpoint):
    largest(checkpoint).unlink()


def flip_a_bit(checkpoint):
    content = bytearray(largest(checkpoint).read_bytes())
    content[len(content) // 2] ^= 1
    largest(checkpoint).write_bytes(content)


def delete_trainable(checkpoint):
    shutil.rmtree(checkpoint / "trainable")


def cut_the_manifest(checkpoint):
    os.truncate(checkpoint / "manifest.json", 30)


def lose_the_facts(checkpoint):
    (checkpoint / "manifest.json").unlink()
    (checkpoint / "frozen.json").unlink()


DAMAGE = [cut_short, delete, flip_a_bit, delete_trainable, cut_the_manifest, lose_the_facts]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda function: function.__name__)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tmp_path, capsys, damage):
    saved(tmp_path, 1, 2, 3)
    for step in (2, 3):
        damage(tmp_path / "checkpoints" / str(step))
    assert find_checkpoint(tmp_path).name == "1"
    capsys.readouterr()
    assert newest(tmp_path) == (1, 1.0)
    said = capsys.readouterr().err
    for step in (2, 3):
        assert f"the checkpoint of step {step} is damaged: " in said
        assert (tmp_path / "damaged" / str(step)).is_dir()
    assert saved(tmp_path, 2) == [1, 2]
    cut_short(tmp_path / "checkpoints" / "2")  # The same once more loses nothing of what was set aside.
    assert newest(tmp_path) == (1, 1.0)
    assert len([*(tmp_path / "damaged").iterdir()]) == 3


def test_one_without_a_manifest_is_used(tmp_path):
    """A run that was killed right after the checkpoint appeared."""
    saved(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "2" / "manifest.json").unlink()
    assert newest(tmp_path) == (2, 2.0)
    assert find_checkpoint(tmp_path).name == "2"


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    saved(tmp_path, 1)
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", half)
    assert newest(tmp_path) == (1, 1.0)
    assert not half.exists()


def test_what_could_not_be_written_is_reported_and_can_be_tried_again(tmp_path, monkeypatch):
    store = Store(tmp_path / "checkpoints", Keep(9))
    store.save(state(1), **FACTS)
    assert store.settle() is None

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)  # In the background, after Orbax is done.
        store.save(state(2), **FACTS)
        assert "No space left" in str(store.settle())
    with monkeypatch.context() as patch:
        patch.setattr(store._checkpointer, "save_checkpointables_async", lambda *_, **__: full(0))
        store.save(state(3), **FACTS)
        assert "No space left" in str(store.settle())
    assert store.settle() is None
    store.save(state(2), **FACTS)
    store.save(state(3), **FACTS)
    assert store.settle() is None
    store.close()
    assert sorted(manifest.steps(tmp_path / "checkpoints")) == [1, 2, 3]
    assert not any(manifest.damage(tmp_path / "checkpoints" / str(step)) for step in (1, 2, 3))
