"""Losses are where a silent broadcast does the most harm."""

import jax
import pytest


@pytest.fixture(autouse=True)
def no_silent_broadcast():
    with jax.numpy_rank_promotion("raise"):
        yield
