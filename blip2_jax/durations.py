"""How long something lasts, or how often it happens: in steps, epochs, examples or percent of the run.

A setting that is a duration takes a number of steps, as ever, or a text: "300 steps", "2.5 epochs", "1e6 examples" or
"10%" (of `total_steps`). An epoch is as many examples as the sources of `data.train` have records together, whatever
their weights; what does not come out even is rounded up to the next step.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_collections
from absl import flags
from ml_collections import config_flags

from blip2_jax.data.mixture import parse_mixture
from blip2_jax.data.sources import open_source

# Settings that are durations; total_steps comes first, since percents are of it.
DURATIONS = (
    *("total_steps", "log_every", "checkpoint_every", "keep_every", "eval_every"),
    *("optimizer.warmup", "optimizer.steps_per_epoch"),
)
TYPES = (int, float, str)  # What such a setting may be; a warm-up below 1 is a share of the run.

_UNITS = {"step": "steps", "epoch": "epochs", "example": "examples", "percent": "%"}


class _Parser(flags.ArgumentParser):
    """Of a duration on the command line."""

    syntactic_help = "a number of steps, or N steps, N epochs, N examples, N%"

    def parse(self, argument: int | float | str) -> int | float | str:
        if not isinstance(argument, str):
            return argument
        amount, unit = parse(argument)
        if unit:
            return argument
        return int(amount) if amount.denominator == 1 else float(amount)


config_flags.register_flag_parser_for_type(TYPES, _Parser())


def duration(value: int | float | str) -> ml_collections.FieldReference:
    """A setting of a recipe that is a duration, in any of the units."""
    return ml_collections.FieldReference(value, field_type=TYPES)


def parse(text: str) -> tuple[Fraction, str]:
    """ "2 epochs" to (2, "epochs"); the unit is one of steps, epochs, examples and %, or "" if there is none.

    Raises:
      ValueError: it is no duration.
    """
    match = re.fullmatch(r"\s*(\d[\d_]*\.?\d*(?:[eE][+-]?\d+)?|\.\d+)\s*([a-zA-Z]*|%)\s*", text)
    unit = match and _UNITS.get(match[2].lower().removesuffix("s"), match[2])
    if match is None or unit not in ("", *_UNITS.values()):
        raise ValueError(f"{text!r} is no duration: expected a number of steps, or N steps, N epochs, N examples, N%")
    return Fraction(match[1]), unit


def in_steps(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy of a recipe whose durations are numbers of steps; a warm-up that is a share of the run stays one.

    Sources are opened only if something is given in epochs.

    Raises:
      ValueError: what is given is no duration, or comes to no whole number of steps.
      OSError: the sources that an epoch consists of cannot be opened.
    """

    @functools.cache
    def epoch() -> int:
        return sum(len(open_source(name)) for name, _ in parse_mixture(config.data.train))

    settings = config.to_dict()
    for path in DURATIONS:
        *blocks, name = path.split(".")
        block = functools.reduce(dict.__getitem__, blocks, settings)
        total = None if path == "total_steps" else settings["total_steps"]
        block[name] = _steps(path, block[name], config.batch_size, total, epoch)
    return ml_collections.ConfigDict(settings)


def _steps(name: str, value: Any, batch_size: int, total: int | None, epoch: Callable[[], int]) -> int | float:
    """One duration in steps, where `total` is the length of the run."""
    if not isinstance(value, str):
        if float(value).is_integer():
            return int(value)
        if name == "optimizer.warmup" and 0 < value < 1:
            return value
        raise ValueError(f"{name} = {value}: expected a whole number of steps, or a text such as '2 epochs' or '10%'")
    try:
        amount, unit = parse(value)
    except ValueError as error:
        raise ValueError(f"{name} = {error}") from None
    if unit == "%":
        if total is None:
            raise ValueError(f"{name} = {value!r}: percents are of {name}, so it needs steps, epochs or examples")
        return math.ceil(amount * total / 100)
    if unit in ("epochs", "examples"):
        return math.ceil(amount * (epoch() if unit == "epochs" else 1) / batch_size)
    if unit and amount.denominator != 1:
        raise ValueError(f"{name} = {value!r}: expected a whole number of steps")
    return _steps(name, float(amount), batch_size, total, epoch)
