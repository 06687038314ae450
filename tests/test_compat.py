"""The switches that reproduce the original: their preset, and settings that make no sense."""

import dataclasses

import pytest

from blip2_jax import compat


def block(**changes):
    config = compat.block()
    config.update(changes)
    return config


def test_by_default_nothing_is_imitated():
    assert compat.resolve(compat.block()) == compat.Compat()


def test_the_preset_sets_every_switch_that_the_original_decides():
    found = compat.resolve(block(preset="lavis", world_size=16))
    assert found == dataclasses.replace(compat.LAVIS, world_size=16)
    plain = compat.Compat()
    same = {
        field.name for field in dataclasses.fields(plain) if getattr(found, field.name) == getattr(plain, field.name)
    }
    assert same == {"negatives"}  # Drawn as the original draws them since July 2023.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "blip"}, "compat.preset = 'blip': expected '' or 'lavis'"),
        ({"preset": "lavis", "gather_gradient": False}, "give no other beside it"),
        ({"positives": "caption"}, "compat.positives = 'caption': expected one of image_or_text, image, pair"),
        ({"negatives": "easy"}, "compat.negatives = 'easy': expected one of hard, before_2023_07"),
        ({"world_size": -1}, "compat.world_size = -1"),
    ],
)
def test_nonsense_is_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        compat.resolve(block(**changes))
