"""Durations in every unit become steps before anything else sees them."""

import json

import pytest
from ml_collections import ConfigDict

from blip2_jax import durations
from tests import tiny


def in_steps(folder, **changes):
    """Of a tiny recipe, whose 18 pictures are 2.25 batches of 8."""
    found = durations.in_steps(tiny.recipe("stage1", folder, **changes))
    return {name: found[name] for name in durations.DURATIONS}


def test_every_unit_becomes_steps_rounded_up(folder):
    found = in_steps(
        folder,
        total_steps="40 epochs",
        log_every="10 steps",
        checkpoint_every="1e2 examples",
        keep_every="50%",
        eval_every="10%",
        **{"optimizer.warmup": "2.5 epochs", "optimizer.steps_per_epoch": "1 epoch"},
    )
    assert found == {
        "total_steps": 90,
        "log_every": 10,
        "checkpoint_every": 13,
        "keep_every": 45,
        "eval_every": 9,
        "optimizer.warmup": 6,
        "optimizer.steps_per_epoch": 3,
    }


def test_numbers_stay_what_they_are(folder):
    plain = {"total_steps": 7, "eval_every": 0, "log_every": 2.0}
    found = in_steps(folder, **plain, **{"optimizer.warmup": 0.25})
    assert (found["total_steps"], found["eval_every"], found["log_every"], found["optimizer.warmup"]) == (7, 0, 2, 0.25)
    assert isinstance(found["log_every"], int)
    assert in_steps(folder, **plain, **{"optimizer.warmup": 3})["optimizer.warmup"] == 3
    # Ten percent is exactly a tenth.
    assert in_steps(folder, total_steps=150, eval_every="10 percent")["eval_every"] == 15


def test_an_epoch_of_a_mixture_is_all_of_its_records_whatever_their_weights(folder):
    source = tiny.recipe("stage1", folder).data.train
    found = in_steps(folder, total_steps="1 epoch", **{"data.train": f"{source}@0.9 + {source}@0.1"})
    assert found["total_steps"] == 5  # 36 records in batches of 8.


def test_sources_are_opened_for_epochs_alone(folder):
    absent = {"data.train": "jsonl:/does/not/exist"}
    assert in_steps(folder, total_steps="80 examples", **absent)["total_steps"] == 10
    with pytest.raises(OSError, match="/does/not/exist"):
        in_steps(folder, total_steps="1 epoch", **absent)


def test_a_config_that_was_never_a_recipe_takes_texts_too(folder):
    settings = json.loads(tiny.recipe("stage1", folder, total_steps="16 examples", log_every="3").to_json())
    settings["optimizer"]["warmup"] = "0.25"
    found = durations.in_steps(ConfigDict(settings))
    assert (found.total_steps, found.log_every, found.optimizer.warmup) == (2, 3, 0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"total_steps": "50%"}, "total_steps = '50%': percents are of total_steps, so it needs"),
        ({"log_every": "2 weeks"}, "log_every = '2 weeks' is no duration: expected a number of steps, or N steps"),
        ({"log_every": "-1 steps"}, "log_every = '-1 steps' is no duration"),
        ({"log_every": "epochs"}, "log_every = 'epochs' is no duration"),
        ({"log_every": "1.5 steps"}, "log_every = '1.5 steps': expected a whole number of steps"),
        ({"checkpoint_every": 2.5}, "checkpoint_every = 2.5: expected a whole number of steps, or a text"),
        ({"optimizer.warmup": 1.5}, "warmup = 1.5: expected a whole number of steps"),
        ({"total_steps": float("inf")}, "total_steps = inf: expected a whole number of steps"),
    ],
)
def test_what_is_no_duration_is_an_error(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        in_steps(folder, **changes)
