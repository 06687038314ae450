"""The recipes: every variant loads, and stage 2 fits the stage 1 of the same name."""

import pathlib
import runpy

import pytest

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def recipe(stage, variant="nano"):
    return runpy.run_path(str(CONFIGS / f"{stage}.py"))["get_config"](variant)


@pytest.mark.parametrize("variant", ["nano", "nano_long"])
def test_both_stages_of_a_variant_fit(variant):
    first, second = recipe("stage1", variant), recipe("stage2", variant)
    assert (first.task, second.task) == ("stage1", "stage2")
    for shared in ("model", "vision", "bert", "image_size"):
        assert first[shared] == second[shared]
    for config in (first, second):
        assert config.to_dict().keys() == recipe(config.task).to_dict().keys()


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_an_unknown_variant_names_the_known(stage):
    with pytest.raises(ValueError, match=rf"configs/{stage}\.py has no variant 'big'; there are nano, nano_long"):
        recipe(stage, "big")
