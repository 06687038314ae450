"""Recipes are checked before anything is read: names, types, ranges, and what contradicts what."""

import json
import os
import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from blip2_jax import configuration, trainer
from tests import tiny
from tests.test_configs import CONFIGS, recipe

VARIANTS = {
    "stage1": ("nano", "nano_long", "eva_g", "clip_l"),
    "stage2": ("nano", "nano_long", "opt_2_7b", "opt_6_7b", "instruct_vicuna_7b", "instruct_flan_t5_xl", "flan_t5_xl"),
}


def refused(config) -> str:
    """What is said of it."""
    with pytest.raises(ValueError) as caught:
        configuration.resolved(config)
    return str(caught.value)


@pytest.mark.parametrize(("stage", "variant"), [(stage, name) for stage, names in VARIANTS.items() for name in names])
def test_the_recipes_pass_as_they_are(stage, variant):
    assert configuration.resolved(recipe(stage, variant)).to_dict() == recipe(stage, variant).to_dict()


def test_every_number_and_choice_has_a_range():
    """Or is checked where it is used, which these tests and those of that part see to."""
    elsewhere = ("optimizer.", "compat.", "lora.", "data.filters.", "alarms.", "profile.", "wandb.")
    texts = (
        *("task", "mesh", "vision", "bert", "llm", "llm_activation", "init", "data.train", "data.eval"),
        *("data.questions", "data.features", "data.begin", "data.bos", "data.prompt", "data.end", "data.question"),
        *("objective.exchange", "evaluation.rerank_rule", "evaluation.templates", "keep_best"),
    )
    found = {}
    for stage in VARIANTS:
        found |= configuration.leaves(recipe(stage))
    free = {path for path, value in found.items() if isinstance(value, bool) or path.startswith(elsewhere)}
    silent = found.keys() - configuration.RANGES.keys() - free - set(texts)
    assert not silent
    assert configuration.RANGES.keys() <= found.keys()


def test_all_that_is_misnamed_or_of_another_type_is_named_at_once():
    config = recipe("stage1")
    config.modle = ConfigDict({"layers": 3})
    config.data.trian = "nano:train"
    config.batch_sise = 64
    del config.pieces
    with config.ignore_type():
        config.batch_size, config.data.flip, config.model.layers, config.optimizer.beta1 = "many", 1, 6.0, "0.9"
    assert refused(config).splitlines() == [
        "the configuration cannot work:",
        "  config.batch_sise = 64: no such setting in configs/stage1.py, did you mean batch_size?",
        "  config.data.trian = 'nano:train': no such setting in configs/stage1.py, did you mean data.train?",
        "  config.modle.layers = 3: no such setting in configs/stage1.py, did you mean model.layers?",
        "  config.pieces is missing: configs/stage1.py has 1",
        "  config.batch_size = 'many': expected int, found str",
        "  config.data.flip = 1: expected bool, found int",
        "  config.model.layers = 6.0: expected int, found float",
        "  config.optimizer.beta1 = '0.9': expected float or int, found str",
    ]


def test_what_is_right_in_another_form_is_no_error():
    settings = json.loads(recipe("stage2").to_json())
    settings["optimizer"] |= {"weight_decay": 0, "warmup": "10%"}
    found = configuration.resolved(ConfigDict(settings))
    assert found.optimizer.weight_decay == 0
    assert found.optimizer.warmup == 17


@pytest.mark.parametrize(
    ("stage", "changes", "message"),
    [
        ("stage1", {"total_steps": 0}, "total_steps = 0: expected at least 1"),
        ("stage1", {"total_steps": "0 epochs"}, "total_steps = 0: expected at least 1"),
        ("stage1", {"batch_size": 0}, "batch_size = 0: expected at least 1"),
        ("stage1", {"log_every": 0}, "log_every = 0: expected at least 1"),
        ("stage1", {"checkpoint_every": -5}, "checkpoint_every = -5: expected at least 1"),
        ("stage1", {"keep_checkpoints": 0}, "keep_checkpoints = 0: expected at least 1"),
        ("stage1", {"seed": -1}, "seed = -1: expected from 0 to"),
        ("stage1", {"data.workers": -1}, "data.workers = -1: expected at least 0"),
        ("stage1", {"data.max_rejected": 1.5}, "data.max_rejected = 1.5: expected a share from 0 to 1"),
        ("stage1", {"data.min_crop_scale": 0.0}, "data.min_crop_scale = 0.0: expected above 0 and at most 1"),
        ("stage1", {"data.feature_dtype": "int8"}, "expected one of float32, float16, bfloat16, float8"),
        ("stage1", {"model.dropout": float("nan")}, "model.dropout = nan: expected at least 0 and below 1"),
        ("stage1", {"model.text_pooling": "max"}, "model.text_pooling = 'max': expected one of cls, mean"),
        ("stage1", {"objective.itc": float("inf")}, "objective.itc = inf: expected at least 0"),
        ("stage1", {"objective.label_smoothing": 1.0}, "label_smoothing = 1.0: expected at least 0 and below 1"),
        ("stage1", {"optimizer.beta2": 1.0}, "optimizer.beta2 = 1.0: expected at least 0 and below 1"),
        ("stage1", {"optimizer.clip_norm": -1.0}, "optimizer.clip_norm = -1.0: expected a norm above 0, or 0"),
        ("stage1", {"optimizer.warmup": 150}, "optimizer.warmup is 150 steps, but the run has 150"),
        ("stage1", {"optimizer.warmup": "100%"}, "optimizer.warmup is 150 steps, but the run has 150"),
        ("stage1", {"data.filters.min_side": 0}, "data.filters.min_side: expected at least 1"),
        ("stage1", {"compat.negatives": "easy"}, "compat.negatives = 'easy'"),
        ("stage1", {"data.train": ""}, "data mixture ''"),
        ("stage1", {"data.eval": "nano:a@x"}, "'x' is not a weight"),
        ("stage1", {"data.eval": "nano:a + nano:a"}, "data.eval names nano:a twice"),
        ("stage1", {"data.eval": "", "eval_every": 5}, "eval_every = 5 without data.eval: name sources, or set"),
        (
            "stage1",
            {"data.feature_views": 0, "data.features": "DIR"},
            "which runs the encoder in every step: set feature_views to",
        ),
        ("stage1", {"compat.world_size": 8}, "compat.world_size = 8, but nothing imitates ranks"),
        ("stage1", {"compat.world_size": 3, "compat.rank_token_mean": True}, "128 does not divide over the 3 ranks"),
        ("stage1", {"objective.itm": 0.0}, "evaluation.rerank = 4 with objective.itm = 0: .* set evaluation.rerank=0"),
        ("stage1", {"data.max_text_tokens": 2}, r"max_text_tokens = 2: expected at least 3, since \[CLS\]"),
        ("stage1", {"batch_size": 1}, "batch_size = 1: ITC and ITM compare with the rest"),
        ("stage1", {"evaluation.batch_size": 1}, "evaluation.batch_size = 1: ITM finds no wrong pair there"),
        ("stage2", {"data.question_share": 1.0}, "data.question_share = 1.0: expected at least 0 and below 1"),
        ("stage2", {"data.question_share": 0.0}, "question_share = 0: no row would ask them; set data.questions=''"),
        ("stage2", {"evaluation.max_new_tokens": 0}, "evaluation.max_new_tokens = 0: expected at least 1"),
    ],
)
def test_what_makes_no_sense_is_an_error_that_says_what_would(stage, changes, message):
    config = recipe(stage)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        configuration.resolved(config)


def test_nothing_to_learn():
    config = recipe("stage1")
    config.update_from_flattened_dict(dict.fromkeys(("objective.itc", "objective.itm", "objective.itg"), 0.0))
    assert "itc, itm and itg are all 0" in refused(config)
    assert "config.task = 'stage3': expected one of stage1, stage2" in refused(ConfigDict({"task": "stage3"}))


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "--config.batch_sise=64",
            f"--config.batch_sise: {CONFIGS}/stage1.py:nano has no such setting, did you mean bat",
        ),
        ("--noconfig.data.flop", "--config.data.flop: .* has no such setting, did you mean data.flip?"),
        ("--config.batch_size=many", "flag --config.batch_size=many: invalid literal"),
        ("--config.log_every=3 weeks", "flag --config.log_every=3 weeks: '3 weeks' is no duration"),
    ],
)
def test_what_is_wrong_on_the_command_line_is_one_line(argument, message, tmp_path):
    command = [sys.executable, "-m", "blip2_jax.main", f"--config={CONFIGS}/stage1.py:nano", f"--workdir={tmp_path}/w"]
    ended = subprocess.run([*command, argument], capture_output=True, text=True, env=os.environ)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert re.match(f"error: {message}", line), line


class Recorded(ConfigDict):
    """Notes which settings are read, one by one; what takes all of them as a whole does not count."""

    def __init__(self, plain: ConfigDict, read: set[str], path: str = ""):
        super().__init__(plain)
        for name, value in (("_plain", plain), ("_read", read), ("_path", path)):
            object.__setattr__(self, name, value)

    def __getitem__(self, key):
        value, path = super().__getitem__(key), f"{self._path}{key}"
        if isinstance(value, ConfigDict):
            return Recorded(value, self._read, f"{path}.")
        self._read.add(path)
        return value

    def to_json(self, *arguments, **options):
        return self._plain.to_json(*arguments, **options)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_every_setting_is_read_by_something(stage, folder, own_cache, tmp_path, monkeypatch):
    """By a run of three steps, with evaluation, questions and views; a check of its range is no use of a setting."""
    tiny.recipe(stage, folder)  # Makes the pictures.
    records = [json.loads(line) for line in (folder / "pictures" / "pictures.jsonl").read_text().splitlines()]
    records = [record | {"image": str(folder / "pictures" / record["image"])} for record in records]
    with_categories = tmp_path / "with_categories.jsonl"
    with_categories.write_text("\n".join(json.dumps(record | {"category": "shapes"}) for record in records))
    changes = {"total_steps": 3, "init": "scratch", "data.eval": f"jsonl:{with_categories}"}
    if stage == "stage2":
        changes |= {"data.questions": f"jsonl:{with_categories}", "data.question_share": 0.5}
    read: set[str] = set()
    resolved = configuration.resolved
    monkeypatch.setattr(configuration, "resolved", lambda config: Recorded(resolved(config), read))
    trainer.train(tiny.recipe(stage, folder, **changes), tmp_path / "w")
    assert not configuration.leaves(tiny.recipe(stage, folder)).keys() - read


def test_a_recorded_setting_is_one_that_was_read():
    read: set[str] = set()
    config = Recorded(recipe("stage1"), read)
    config.to_json()
    assert not read
    assert config.data.threads + config["batch_size"] == 130
    assert read == {"data.threads", "batch_size"}
