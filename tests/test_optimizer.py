"""The learning rate's way up and down."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from blip2_jax import optimizer


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.3, 3), (3, 3)])
def test_linear_up_then_a_cosine_down(warmup, steps):
    total, final_share = 10, 0.05
    factor = optimizer.schedule(ConfigDict({"warmup": warmup, "final_share": final_share}), total)
    count = np.arange(total)
    cosine = 0.5 * (1 + np.cos(np.pi * (count - steps) / (total - steps)))
    down = final_share + (1 - final_share) * cosine
    expected = np.where(count < steps, count / max(steps, 1), down)
    np.testing.assert_allclose([factor(number) for number in count], expected, atol=1e-6)


def test_a_run_of_one_step_learns():
    assert optimizer.schedule(ConfigDict({"warmup": 0.15, "final_share": 0.05}), 1)(0) == 1.0


def test_a_warmup_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match="warmup is 10 steps, but the run has 10"):
        optimizer.schedule(ConfigDict({"warmup": 10, "final_share": 0.05}), 10)
