"""Runs from end to end, on tiny models: resumed runs end with the same numbers, frozen weights stay frozen."""

import errno
import json
import os
import re
import shutil
import signal

import chex
import jax
import numpy as np
import pytest

from blip2_jax import params, tasks, trainer
from blip2_jax.checkpoints import store
from blip2_jax.monitoring.metrics import read_metrics
from blip2_jax.parallel import mesh as meshes
from blip2_jax.parallel import sharding
from blip2_jax.step import make_step
from tests import tiny
from tests.runs import same_parameters


@pytest.fixture(scope="module", autouse=True)
def cache(folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP2_JAX_CACHE", str(folder / "cache"))
        yield


def test_a_run_writes_what_it_promises(stage1):
    names = {file.name for file in stage1.iterdir()}
    assert names >= {"config.json", "checkpoints", "metrics.jsonl", "tensorboard", "samples", "report.html"}
    rows = read_metrics(stage1 / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    for name in ("loss", "loss_itc", "loss_itm", "loss_itg", "temperature", "gradient_norm", "learning_rate"):
        assert all(np.isfinite(row[name]) for row in rows)
    assert any("retrieval/itc/text_to_image/r1" in name for name in rows[-1])
    checkpoint = store.find_checkpoint(stage1)
    assert checkpoint.name == "6"
    frozen = json.loads((checkpoint / "frozen.json").read_text())
    assert set(frozen) == {"vision", "bert"}
    assert all(set(part) == {"source", "sha256", "dtype"} for part in frozen.values())
    assert len(list((stage1 / "checkpoints").iterdir())) == 2


def test_the_report_needs_nothing_else(stage1, stage2):
    for workdir in (stage1, stage2):
        page = (workdir / "report.html").read_text()
        assert "<svg" in page
        assert "data:image/png;base64" in page
        assert not re.findall(r'(?:src|href)="(?!data:)', page)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_interrupted_twice_it_ends_as_if_undisturbed(folder, request, stage):
    undisturbed = request.getfixturevalue(stage)
    init = "" if stage == "stage1" else str(folder / "stage1")
    workdir = folder / f"{stage}_interrupted"
    for stop in (3, 4):
        run = trainer.Run(tiny.recipe(stage, folder, init=init), workdir)
        original = run.step

        def step(state, *args, run=run, original=original, stop=stop, **kwargs):
            if int(state.step) + 1 == stop:
                os.kill(os.getpid(), signal.SIGINT)
            return original(state, *args, **kwargs)

        run.step = step
        with pytest.raises(trainer.Interrupted, match=f"SIGINT after step {stop}"):
            run.train()
    trainer.train(tiny.recipe(stage, folder, init=init), workdir)
    same_parameters(undisturbed, workdir)
    # Where it was stopped it logged a step more; the rest is the same.
    rows = {row["step"]: row for row in read_metrics(workdir / "metrics.jsonl")}
    for row in read_metrics(undisturbed / "metrics.jsonl"):
        for name, value in row.items():
            assert name.startswith("timing/") or rows[row["step"]][name] == value


def test_a_full_disk_ends_it_clearly_and_room_lets_it_go_on(folder, stage1, monkeypatch):
    workdir = folder / "stage1_full_disk"
    write = trainer.MetricsWriter.write

    def full(self, step, values):
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
        write(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.MetricsWriter, "write", full)
        with pytest.raises(OSError, match=r"a disk is full, at work in .*metrics.jsonl.*; make room, and the same"):
            trainer.train(tiny.recipe("stage1", folder), workdir)
    trainer.train(tiny.recipe("stage1", folder), workdir)
    same_parameters(stage1, workdir)


def test_each_parameter_learns_at_its_own_rate(folder, stage1):
    task, trainable = tasks.load_trained(stage1)
    with task.config.unlocked():
        task.config.optimizer.update(text_multiplier=0.1, fresh_multiplier=4.0)
    rates = params.flatten(params.resolve(task.rate_table(trainable), trainable, "rate"))
    text = {path for path, rate in rates.items() if rate == 0.1}
    fresh = {path for path, rate in rates.items() if rate == 4.0}
    assert text == {path for path in rates if "text_mlp" in path or "word_emb" in path or "position_emb" in path}
    assert {"temperature", "qformer/query_tokens", "itm_head/bias", "qformer/lm_head/bias"} < fresh
    assert rates["qformer/transformer/groups/layer_0/attention/query/kernel"] == 1.0
    assert {path for path in rates if "cross_attention" in path or "image_projection" in path} < fresh


def test_the_same_command_on_a_finished_run_changes_nothing(folder, stage1):
    before = (stage1 / "metrics.jsonl").read_text()
    trainer.train(tiny.recipe("stage1", folder), stage1)
    assert (stage1 / "metrics.jsonl").read_text() == before


def test_settings_that_came_later_are_no_other_configuration(folder, stage1, tmp_path):
    """A workdir from before these settings goes on, and its checkpoint is read."""
    shutil.copytree(stage1, tmp_path / "old")
    for file in (tmp_path / "old").rglob("config.json"):
        config = json.loads(file.read_text())
        del config["model"]["ln_vision_epsilon"], config["max_skipped_in_a_row"], config["shard_trainable"]
        del config["optimizer"]["warmup_rate"], config["optimizer"]["steps_per_epoch"]
        file.write_text(json.dumps(config))
    trainer.train(tiny.recipe("stage1", folder), tmp_path / "old")
    assert tasks.load_trained(tmp_path / "old")[0].blip2.ln_vision_epsilon == 1e-5


def test_a_workdir_of_another_configuration_is_refused(folder, stage1):
    with pytest.raises(ValueError, match=r"another configuration:\n  optimizer.learning_rate: 0.0005 there, 0.1 asked"):
        trainer.train(tiny.recipe("stage1", folder, **{"optimizer.learning_rate": 0.1}), stage1)


def test_stage_two_without_stage_one_names_the_flag(folder, tmp_path):
    with pytest.raises(ValueError, match=r"--config\.init=DIR"):
        trainer.train(tiny.recipe("stage2", folder), tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_stage_two_from_what_is_no_checkpoint(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        trainer.train(tiny.recipe("stage2", folder, init=str(tmp_path)), tmp_path / "w")


def test_stage_two_from_another_encoder_is_refused(folder, stage1, tmp_path):
    with pytest.raises(ValueError, match="was trained with the vision 'nano:'"):
        trainer.train(tiny.recipe("stage2", folder, init=str(stage1), vision="random:0"), tmp_path / "w")


def test_stage_two_of_another_width_is_refused(folder, stage1, tmp_path):
    with pytest.raises(ValueError, match=r"qformer/query_tokens has shape .* this model needs"):
        trainer.train(tiny.recipe("stage2", folder, init=str(stage1), **{"model.queries": 5}), tmp_path / "w")


def test_stage_two_takes_the_qformer_over(folder, stage1):
    task = tasks.create(tiny.recipe("stage2", folder, init=str(stage1)))
    trained = params.flatten(store.load_trainable(store.find_checkpoint(stage1)))
    start = params.flatten(tasks.starting_point(task)(jax.random.key(0)))
    assert [path for path in start if path not in trained] == ["language_projection/bias", "language_projection/kernel"]
    for path in start.keys() & trained.keys():
        chex.assert_trees_all_equal(start[path], trained[path])


@pytest.fixture(scope="module")
def stage2_run(folder, stage1, tmp_path_factory):
    """Stage 2 with the encoder inside the step, so that everything frozen takes part."""
    config = tiny.recipe("stage2", folder, init=str(stage1), **{"data.feature_views": 0})
    return trainer.Run(config, tmp_path_factory.mktemp("live") / "w")


def test_frozen_weights_are_bit_identical_after_training(stage2_run):
    assert set(stage2_run.frozen) == {"vision", "language"}
    before = jax.tree.map(np.array, stage2_run.frozen)
    start = jax.tree.map(np.array, stage2_run.state.trainable)
    stage2_run.train()
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, stage2_run.frozen), before)
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), stage2_run.state.trainable, start)
    # A softmax does not feel a shift of all its logits, so nothing moves the key biases but noise.
    still = [path for path, moved in params.flatten(changed).items() if not moved and "key/bias" not in path]
    assert not still


def test_the_optimizer_holds_the_trainable_alone(stage2_run):
    trainable = params.count(stage2_run.state.trainable)
    moments = params.count(stage2_run.state.optimizer)
    assert 2 * trainable <= moments <= 2 * trainable + 8


def matrix_products(text: str) -> set[str]:
    """Shapes of the results of all matrix products of a compiled program."""
    return set(re.findall(r"= f32\[([\d,]+)\][^ ]* dot\(", text))


def test_the_step_forms_no_gradient_of_a_frozen_weight(stage2_run, folder):
    batch = next(stage2_run.data).batch
    frozen_shapes = {"20,44", "44,20", "1,20,44", "1,44,20", "2,20,44"}
    text = stage2_run.step.lower(stage2_run.state, stage2_run.frozen, batch).compile().as_text()
    assert matrix_products(text)
    assert not matrix_products(text) & frozen_shapes

    def loss_of_everything(everything):
        return stage2_run.task.objective.loss(*everything, batch, jax.random.key(0))

    # The control: where gradients of the language model are asked for, they are seen.
    both = jax.jit(jax.grad(loss_of_everything)).lower((stage2_run.state.trainable, stage2_run.frozen))
    assert matrix_products(both.compile().as_text()) & frozen_shapes


@pytest.mark.parametrize("mesh", ["data=8", "data=2,fsdp=2,tensor=2"])
def test_losses_on_eight_devices_are_those_on_one(folder, tmp_path, mesh):
    changes = {"mesh": mesh, "data.feature_views": 0, "vision": f"hf:{folder / 'vit'}", "data.eval": ""}
    one = trainer.Run(tiny.recipe("stage1", folder, **changes), tmp_path / "all")
    batch = next(one.data).batch
    assert one.mesh.size == 8
    state, frozen = jax.device_get((one.state, one.frozen))
    for tree in (one.frozen["vision"], one.state.trainable, one.state.optimizer[1].mu):
        places = params.flatten(sharding.shardings(tree, one.mesh))
        assert {path: leaf.sharding for path, leaf in params.flatten(tree).items()} == places
    with jax.set_mesh(one.mesh):
        _, metrics = one.step(one.state, one.frozen, meshes.global_batch(batch, 8, one.mesh))
    alone = jax.device_put((state, frozen, batch), jax.devices()[0])
    _, expected = make_step(one.task, one.transformation)(*alone)
    chex.assert_trees_all_close(jax.device_get(metrics), jax.device_get(expected), rtol=2e-4, atol=1e-5)


def test_a_run_over_every_axis_of_the_mesh(folder, stage1, stage2, tmp_path):
    """Frozen and trained parameters are divided; training and evaluation find what they find on replicas."""
    changes = {"init": str(stage1), "mesh": "data=2,fsdp=2,tensor=2"}
    trainer.train(tiny.recipe("stage2", folder, **changes), tmp_path / "w")
    for found, expected in zip(*(read_metrics(w / "metrics.jsonl") for w in (tmp_path / "w", stage2)), strict=True):
        for name in ("step", "loss", "gradient_norm", "learning_rate"):
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, err_msg=name)
        for name in expected.keys() - found.keys():
            raise AssertionError(f"{name} is missing")


def test_steps_that_are_not_finite_end_the_run(folder, stage1, tmp_path):
    """From step 3 on nothing is finite; what was saved before is whole, and the run goes on from there."""
    config = tiny.recipe("stage1", folder, max_skipped_in_a_row=2)
    run = trainer.Run(config, tmp_path / "w")
    original = run.step

    def step(state, frozen, batch):
        spoilt = np.nan if int(state.step) >= 2 else 1.0
        return original(state, frozen, batch | {"image_embeds": batch["image_embeds"] * np.float16(spoilt)})

    run.step = step
    with pytest.raises(FloatingPointError, match=r"2 steps in a row .* up to step 4.*checkpoint is of step 2"):
        run.train()
    rows = read_metrics(tmp_path / "w" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 4]
    assert [row["skipped_steps"] for row in rows] == [0, 0, 2]
    assert rows[-1]["loss"] is None
    trainer.train(config, tmp_path / "w")
    same_parameters(stage1, tmp_path / "w")
    rows = read_metrics(tmp_path / "w" / "metrics.jsonl")
    assert [row["skipped_in_a_row"] for row in rows] == [0, 0, 0, 0]


def test_nonsense_settings_are_errors_before_training(folder, tmp_path):
    for changes, message in (
        ({"mesh": "data=3"}, "does not fit 8 devices"),
        ({"batch_size": 9}, "batch_size 9 does not divide"),
        ({"pieces": 2}, "8 devices 1 rows: expected a multiple of 2"),
        ({"evaluation.batch_size": 12}, "evaluation.batch_size 12 does not divide over data x fsdp = 8 devices"),
        ({"objective.itm_share": 0.3}, r"objective.itm_share = 0.3: expected 1, 1/2, 1/3"),
        ({"objective.exchange": "bus"}, "objective.exchange = 'bus': expected one of ring, ragged, gather"),
        ({"compat.preset": "blip"}, "compat.preset = 'blip'"),
        ({"total_steps": 0}, "total_steps = 0: expected at least 1"),
        ({"data.train": "nano:nothing"}, "no such split"),
        ({"vision": "nano"}, "expected nano: or hf:DIR"),
        ({"bert": "hf:/does/not/exist"}, "not a directory"),
        ({"max_skipped_in_a_row": 0}, "max_skipped_in_a_row = 0: expected at least 1"),
        ({"optimizer.warmup": 100}, "warmup is 100 steps, but the run has 6"),
        ({"optimizer.steps_per_epoch": 9}, "steps_per_epoch = 9: expected 0"),
        ({"task": "stage3"}, "expected one of stage1, stage2"),
        ({"data.max_text_tokens": 17}, "16 positions"),
        ({"evaluation.rerank_rule": "best"}, "rerank_rule = 'best': expected one of posterior, tempered, match, lavis"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            trainer.train(tiny.recipe("stage1", folder, **changes), tmp_path / "w")


def test_captions_and_questions_share_a_batch(folder, stage1, tmp_path):
    """Rows of both kinds, each with its own prompt right before its own target."""
    lines = (folder / "pictures" / "pictures.jsonl").read_text().splitlines()
    for name, category in (("plain", None), ("with", "shapes")):
        items = [json.loads(line) for line in lines]
        items = [item | {"image": str(folder / "pictures" / item["image"])} for item in items]
        items = [item | ({"category": category} if category else {}) for item in items]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, items)))
    asked = {"data.questions": f"jsonl:{tmp_path / 'with.jsonl'}", "data.question_share": 0.5}
    run = trainer.Run(tiny.recipe("stage2", folder, init=str(stage1), **asked), tmp_path / "w")
    tokenizer, found = run.task.tokenizer, []
    for _ in range(4):
        batch = next(run.data).batch
        row = run.task.objective.texts(batch)
        for ids, mask in zip(np.asarray(row.ids), np.asarray(row.mask), strict=True):
            found.append(tokenizer.decode(ids[mask]))
    assert sum(text == "Question: category? Answer: shapes" for text in found) == 16
    assert sum(text.startswith("A drawing of a ") for text in found) == 16

    bare = {"data.questions": f"jsonl:{tmp_path / 'plain.jsonl'}", "data.question_share": 0.5}
    with pytest.raises(ValueError, match=r"has no category to ask for; set data\.questions=''"):
        trainer.train(tiny.recipe("stage2", folder, init=str(stage1), **bare), tmp_path / "w2")
