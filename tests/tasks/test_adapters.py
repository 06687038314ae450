"""Adapters in a run: what learns, what a checkpoint holds, what starts from it, and what it is exported as."""

import json
import re
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax import convert, params, tasks, trainer
from blip2_jax.checkpoints import store
from blip2_jax.decoding import GenerationConfig
from blip2_jax.models import lora
from blip2_jax.monitoring.metrics import read_metrics
from tests import tiny

pytestmark = pytest.mark.usefixtures("own_cache")
BOTH = {"lora.rank": 2, "lora.alpha": 6.0, "lora.language": ".*/(query|down)", "lora.qformer": ".*attention/value"}
LANGUAGE = BOTH | {"lora.qformer": ""}


def noisy(tree):
    noise = lambda path, x: x + 0.1 * jax.random.normal(jax.random.key(len(path)), x.shape)
    return params.map_paths(noise, tree)


def saved(task, trainable, folder):
    store.save_alone(folder, trainable, json.loads(task.config.to_json()), task.frozen_identity())
    return folder


@pytest.fixture(scope="module")
def first(folder, tmp_path_factory):
    """A checkpoint of stage 1 to adapt, as if it had been trained."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP2_JAX_CACHE", str(folder / "cache"))
        task = tasks.create(tiny.recipe("stage1", folder))
        return saved(task, noisy(task.initialize(jax.random.key(0))), tmp_path_factory.mktemp("first") / "1")


@pytest.fixture(scope="module")
def second(folder, first, tmp_path_factory):
    """Stage 2 on adapters: its task, its parameters at the start, and the same, moved, as a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP2_JAX_CACHE", str(folder / "cache"))
        task = tasks.create(tiny.recipe("stage2", folder, init=str(first), **BOTH))
        start = tasks.starting_point(task)(jax.random.key(0))
        moved = start | {"lora": noisy(start["lora"])}
        return task, start, moved, saved(task, moved, tmp_path_factory.mktemp("second") / "1")


def test_what_learns_beside_adapters(second, first):
    task, start, _, _ = second
    assert set(start) == {"ln_vision", "language_projection", "lora"}
    modules = {part: {path.rpartition("/")[0] for path in params.flatten(start["lora"][part])} for part in lora.PARTS}
    assert modules["language"] == {"layers/query", "layers/down"}
    assert all(re.fullmatch(".*attention/value", path) for path in modules["qformer"])
    assert any("cross_attention" not in path for path in modules["qformer"])
    base = params.flatten(store.load_trainable(first)["qformer"])
    for path, leaf in params.flatten(task.frozen["qformer"]).items():
        np.testing.assert_array_equal(leaf, base[path])
    rates = params.flatten(params.resolve(task.rate_table(start), start, "learning rate"))
    assert {rate for path, rate in rates.items() if path.startswith("lora/")} == {1.0}


def test_at_the_start_everything_is_as_it_was(folder, second, first):
    task, start, moved, _ = second
    plain = tasks.create(tiny.recipe("stage2", folder, init=str(first)))
    without = tasks.starting_point(plain)(jax.random.key(0))
    embeds = jax.random.normal(jax.random.key(1), (2, task.encoder.tokens, task.encoder.width))
    expected = plain.soft_prompt(without | {"language_projection": start["language_projection"]}, embeds)
    np.testing.assert_array_equal(task.soft_prompt(task.assembled(start), embeds), expected)
    assert not np.allclose(task.soft_prompt(task.assembled(moved), embeds), expected, atol=1e-3)


def test_a_checkpoint_comes_back_with_what_it_stands_on(second, first, monkeypatch, tmp_path):
    task, _, moved, checkpoint = second
    facts = store.read_facts(checkpoint)[1]["qformer"]
    assert facts == {"source": str(first), "sha256": task.parts["qformer"].sha256, "dtype": "float32"}
    _, trainable = tasks.load_trained(checkpoint)
    chex.assert_trees_all_equal(trainable, task.assembled(moved))
    # Elsewhere, if that is said; but not another one.
    monkeypatch.setenv("BLIP2_JAX_FROZEN", f"qformer={shutil.copytree(first, tmp_path / 'copy')}")
    chex.assert_trees_all_equal(tasks.load_trained(checkpoint)[1], trainable)
    monkeypatch.setenv("BLIP2_JAX_FROZEN", f"qformer={checkpoint}")
    with pytest.raises(ValueError, match=rf"was trained with the qformer '{first}' of SHA-256"):
        tasks.load_trained(checkpoint)


def test_texts_need_the_adapters_they_were_learnt_with(second):
    task, _, _, checkpoint = second
    _, trainable = tasks.load_trained(checkpoint)
    soft_prompt = np.random.default_rng(0).normal(size=(2, 2, 20)).astype(np.float32)
    with pytest.raises(ValueError, match=r"has a LoRA of rank 2, alpha 6, on '.*', which is not among what is given"):
        task.language({})
    prompts, merged = ["a red", ""], lora.merge(task.language(trainable))
    write = lambda language: task.writing.write(language, soft_prompt, prompts, GenerationConfig(6))
    assert write(task.language(trainable)) == write(merged)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": 3}, r"LoRA of the language of rank 2, .* this run's is: rank 3, alpha 6, on"),
        ({"lora.language": ".*/down"}, r"on '\.\*/\(query\|down\)'; this run's is: rank 2, alpha 6, on '\.\*/down'"),
        ({"lora.rank": 0, "lora.language": "", "lora.qformer": ""}, r"this run's is: none. Set config\.lora as there"),
        (
            {"lora.qformer": ""},
            r"LoRA of the qformer of rank 2, alpha 6, on '\.\*attention/value'; this run's is: none",
        ),
    ],
)
def test_other_adapters_than_those_of_a_checkpoint_are_refused(folder, second, changes, message):
    task = tasks.create(tiny.recipe("stage2", folder, init=str(second[-1]), **(BOTH | changes)))
    with pytest.raises(ValueError, match=message):
        tasks.starting_point(task)


def test_the_same_adapters_go_on(folder, second, first):
    task = tasks.create(tiny.recipe("stage2", folder, init=str(second[-1]), **BOTH))
    assert task.parts["qformer"].source == str(first)
    chex.assert_trees_all_equal(tasks.starting_point(task)(jax.random.key(3)), second[2])


def test_adapters_of_a_qformer_need_one_that_was_trained(folder):
    task = tasks.create(tiny.recipe("stage2", folder, init="scratch", **BOTH))
    with pytest.raises(ValueError, match=r"config\.lora\.qformer adapts a Q-Former that has been trained: name one"):
        task.frozen  # noqa: B018


def test_a_run_learns_adapters_alone_and_goes_on_where_it_stopped(folder, first, tmp_path, monkeypatch):
    """Over every axis of the mesh; a run that stops after the first of two steps ends as one that does not."""
    settings = {"total_steps": 2, "optimizer.warmup": 0, "mesh": "data=2,fsdp=2,tensor=2", "init": str(first)}
    start = lambda name, **more: trainer.Run(tiny.recipe("stage2", folder, **settings, **BOTH, **more), tmp_path / name)
    whole = start("whole", **{"data.eval": ""})
    before = jax.tree.map(np.array, whole.frozen)
    assert set(before) == {"language", "qformer"}
    whole.train()
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, whole.frozen), before)
    assert params.count(whole.state.optimizer) <= 2 * params.count(whole.state.trainable) + 8
    with monkeypatch.context() as patch, pytest.raises(trainer.Interrupted):
        patch.setattr(trainer.Stopping, "asked", lambda stopping, step: True)
        start("resumed").train()
    resumed = start("resumed")
    assert int(resumed.state.step) == 1
    resumed.train()
    chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, run.state.trainable) for run in (resumed, whole)))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(resumed.state.trainable["lora"]))
    assert np.isfinite(read_metrics(tmp_path / "resumed" / "metrics.jsonl")[-1]["loss"])


def test_an_export_has_the_adapters_in_its_weights(folder, tmp_path):
    config = tiny.recipe("stage2", folder, init="scratch", vision=f"hf:{folder / 'vit'}", **LANGUAGE)
    config.model.image_positions = False
    task = tasks.create(config)
    start = task.initialize(jax.random.key(0))
    trainable = start | {"lora": noisy(start["lora"])}
    convert.export_checkpoint(str(saved(task, trainable, tmp_path / "1")), tmp_path / "out")
    merged = lora.merge(task.language(trainable))
    config.update_from_flattened_dict({"llm": f"hf:{tmp_path / 'out'}", "lora.rank": 0, "lora.language": ""})
    found = tasks.create(config).frozen["language"]
    assert not np.allclose(found["layers"]["query"]["kernel"], task.frozen["language"]["layers"]["query"]["kernel"])
    rows = len(merged["embeddings"]["embedding"])  # One more has been added, for the image token.
    found["embeddings"]["embedding"] = found["embeddings"]["embedding"][:rows]
    chex.assert_trees_all_close(found, jax.tree.map(jnp.asarray, merged), atol=1e-6)
