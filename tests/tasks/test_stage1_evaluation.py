"""Validation losses of stage 1: those of the objective, on every row of a source, whatever training leaves out."""

import jax
import numpy as np
import pytest

from blip2_jax import tasks
from blip2_jax.tasks.stage1_loss import Stage1Loss
from tests import tiny

pytestmark = pytest.mark.usefixtures("own_cache")
TRAINING = {"model.dropout": 0.3, "objective.itm_share": 0.25, "objective.itg_share": 0.5, "seed": 7}


def losses(folder, **changes):
    """Of the same parameters, with the task and the pictures."""
    task = tasks.create(tiny.recipe("stage1", folder, **changes))
    trainable = tasks.create(tiny.recipe("stage1", folder)).initialize(jax.random.key(0))
    pictures = task.pictures(task.config.data.eval, training=False)
    metrics, _ = task.evaluate(trainable, pictures)
    return {name: value for name, value in metrics.items() if name.startswith("loss_")}, task, trainable, pictures


def test_they_are_the_means_over_batches_by_their_rows(folder):
    """Of 18 pictures in batches of 8 the last two are a batch of their own, as if there were nothing else in it."""
    found, task, trainable, pictures = losses(folder, **TRAINING)
    assert found.keys() == {"loss_itc", "loss_itm", "loss_itg"}
    plain = tasks.create(tiny.recipe("stage1", folder))
    objective = Stage1Loss(plain.model, plain.encoder.encode, plain.caption_tokenizer.decoder_start)
    compute = jax.jit(lambda batch, key: objective.loss(trainable, {}, batch, key)[1])
    examples = [task.batches.prepare_caption(pictures.example(index)) for index in range(18)]
    expected = dict.fromkeys(found, 0.0)
    for number, rows in enumerate((examples[:8], examples[8:16], examples[16:])):
        key = jax.random.fold_in(jax.random.key(7), number)
        for name, value in compute(task.batches.collate(rows), key).items():
            if name in expected:
                expected[name] += float(value) * len(rows) / 18
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_what_is_not_trained_has_no_loss(folder):
    found, *_ = losses(folder, **{"objective.itm": 0.0, "evaluation.rerank": 0})
    assert found.keys() == {"loss_itc", "loss_itg"}
