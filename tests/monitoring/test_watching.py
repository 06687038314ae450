"""What a person sees of a run is said in its recipe, and checked."""

import pytest

from blip2_jax import trainer
from tests import tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile.steps": "8:5"}, r"profile.steps = '8:5': expected FIRST:END"),
        ({"alarms.window": 1}, r"alarms.window = 1"),
        ({"wandb.mode": "sometimes"}, r"wandb.mode = 'sometimes'"),
    ],
)
def test_nonsense_is_an_error_before_anything_is_read(folder, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        trainer.train(tiny.recipe("stage1", folder, **changes), tmp_path / "w")
    assert not (tmp_path / "w").exists()
