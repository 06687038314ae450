"""The loss of stage 2 is one number: of every mesh, of any number of pieces, and of the ranks that are imitated."""

import dataclasses
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax.compat import Compat
from blip2_jax.models.blip2 import Blip2Config, SoftPromptModel
from blip2_jax.models.language.opt import OPT, OPTConfig
from blip2_jax.models.language.t5 import T5, T5Config
from blip2_jax.models.qformer import QFormerConfig
from blip2_jax.parallel import mesh as meshes
from blip2_jax.parallel import sharding
from blip2_jax.tasks.stage2_loss import Stage2Loss

BATCH, VOCABULARY, WIDTH = 16, 30, 16
QFORMER = QFormerConfig(width=16, layers=2, heads=2, mlp_width=24, vocab_size=20, max_positions=8, queries=3)
MODELS = {
    "opt": OPT(OPTConfig(VOCABULARY, WIDTH, 2, 2, 2, 8, 24, max_positions=32, dropout=0.1)),
    "t5": T5(T5Config(VOCABULARY, WIDTH, 2, 2, 2, 8, 24, dropout=0.1)),
}
BOTH = pytest.mark.parametrize("kind", MODELS)


def build(kind: str, **changes) -> Stage2Loss:
    model = SoftPromptModel(Blip2Config(QFORMER), WIDTH)
    settings = {"compat": Compat(llm_dropout=True), "begin": (3,)} | changes
    return Stage2Loss(model, MODELS[kind], lambda parameters, image: image, **settings)


@functools.cache
def problem(kind: str):
    """Trees and a batch: prompts and targets of many lengths, a row that is not there, a row without a target."""
    loss, rng = build(kind), np.random.default_rng(0)
    image = jnp.zeros((2, 5, 12))
    trainable = jax.jit(loss.model.init)(jax.random.key(0), image)["params"]
    ids = jnp.zeros((1, 2), jnp.int32)
    init = lambda key: MODELS[kind].init(key, ids, method="initialize")["params"]
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)
    frozen = {"language": jax.tree.map(noise, jax.jit(init)(jax.random.key(1)))}
    batch = {"image_embeds": rng.normal(size=(BATCH, 5, 12)).astype(np.float32), "example_mask": np.ones(BATCH, bool)}
    for name, length in (("prompt", 4), ("target", 6)):
        batch[f"{name}_ids"] = rng.integers(0, VOCABULARY, (BATCH, length)).astype(np.int32)
        batch[f"{name}_mask"] = np.arange(length) < rng.integers(0, length + 1, (BATCH, 1))
    batch["example_mask"][5] = False
    batch["target_mask"][6] = False
    return trainable, frozen, batch


@functools.cache
def expected(kind: str):
    """On one device, in one piece."""
    return jax.jit(build(kind).value_and_gradients)(*problem(kind), jax.random.key(7))


def assert_same(found, wanted):
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for ours, theirs in zip(jax.tree.leaves(found[1]), jax.tree.leaves(wanted[1]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@BOTH
def test_pieces_add_up_dropout_and_all(kind):
    found = jax.jit(build(kind, pieces=4).value_and_gradients)(*problem(kind), jax.random.key(7))
    chex.assert_shape(found[0], ())
    chex.assert_trees_all_equal_shapes_and_dtypes(found[1], problem(kind)[0])
    assert_same(found, expected(kind))


@BOTH
@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=2,tensor=2"])
def test_every_mesh_has_the_same_loss_and_gradient(kind, mesh):
    trainable, frozen, batch = problem(kind)
    mesh = meshes.make_mesh(mesh, jax.devices()[:8])
    trees = [jax.device_put(tree, sharding.shardings(tree, mesh)) for tree in (trainable, frozen)]
    batch = jax.device_put(batch, meshes.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        found = jax.jit(build(kind, pieces=2).value_and_gradients)(*trees, batch, jax.random.key(7))
    assert_same(found, expected(kind))


@BOTH
def test_dropout_of_the_language_model_is_off_but_for_the_switch(kind):
    with_it, _ = expected(kind)
    run = lambda **changes: jax.jit(build(kind, **changes).loss)(*problem(kind), jax.random.key(7))
    without = run(compat=Compat())
    assert abs(with_it - without) > 1e-4
    np.testing.assert_allclose(run(), with_it, rtol=1e-6)


def test_ranks_each_take_their_own_mean():
    """As many ranks as asked for, or as the batch has shards; the mean of the means, and not that of all tokens."""
    trainable, frozen, batch = problem("opt")
    silent = SoftPromptModel(Blip2Config(dataclasses.replace(QFORMER, dropout=0.0, attention_dropout=0.0)), WIDTH)
    make = lambda **switches: dataclasses.replace(build("opt", compat=Compat(**switches)), model=silent)
    run = lambda loss, batch: jax.jit(loss.loss)(trainable, frozen, batch, jax.random.key(0))
    parts = [{name: x[start : start + 4] for name, x in batch.items()} for start in range(0, BATCH, 4)]
    plain = make()
    by_rank = np.mean([run(plain, part) for part in parts])
    assert abs(by_rank - run(plain, batch)) > 1e-4
    np.testing.assert_allclose(run(make(rank_token_mean=True, world_size=4), batch), by_rank, rtol=1e-5)
    with jax.set_mesh(meshes.make_mesh("data=4", jax.devices()[:4])):
        np.testing.assert_allclose(run(make(rank_token_mean=True), batch), by_rank, rtol=1e-5)
    with pytest.raises(ValueError, match=r"16 rows do not divide into 5 ranks"):
        run(make(rank_token_mean=True, world_size=5), batch)


def test_rows_that_are_not_there_change_nothing():
    trainable, frozen, batch = problem("t5")
    other = {name: np.array(x) for name, x in batch.items()}
    other["image_embeds"][5] = 3.0
    other["target_ids"][5] = 1
    run = jax.jit(build("t5").loss)
    assert run(trainable, frozen, batch, jax.random.key(0)) == run(trainable, frozen, other, jax.random.key(0))


def test_a_batch_that_does_not_divide_into_pieces_is_refused():
    with pytest.raises(ValueError, match="16 rows on 1 devices do not divide into 3 pieces"):
        build("opt", pieces=3).value_and_gradients(*problem("opt"), jax.random.key(0))


def test_the_rows_stay_where_they_are():
    """Over fsdp weights travel, and of what belongs to rows at most the scalars of the loss."""
    trainable, frozen, batch = problem("opt")
    mesh = meshes.make_mesh("fsdp=4", jax.devices()[:4])
    trees = [jax.device_put(tree, sharding.shardings(tree, mesh)) for tree in (trainable, frozen)]
    batch = jax.device_put(batch, meshes.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        text = jax.jit(build("opt").value_and_gradients).lower(*trees, batch, jax.random.key(7)).compile().as_text()
    moved = re.findall(r"= (\S+) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", text)
    assert moved
    # 14 = begin, queries, prompt and target; a device's 4 rows of them, or all 16.
    assert not [shape for shape in moved if re.search(r"\[(4|16),(14|6|3|5)[],]", shape)], moved
