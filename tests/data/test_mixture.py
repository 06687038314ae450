"""Mixtures and what a user may do wrong in them."""

import pytest

from blip2_jax.data.mixture import parse_mixture


def test_mixtures():
    assert parse_mixture("nano:train") == [("nano:train", 1.0)]
    assert parse_mixture("nano:train@3 + folder:x@1") == [("nano:train", 0.75), ("folder:x", 0.25)]
    assert parse_mixture("nano:train + folder:x") == [("nano:train", 0.5), ("folder:x", 0.5)]
    for text in ("nano:train@-1", "nano:train@x", " + nano:train"):
        with pytest.raises(ValueError, match="mixture"):
            parse_mixture(text)
