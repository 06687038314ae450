"""What a recipe may say: its settings and their types are those of the recipe of its task, and make sense together."""

from __future__ import annotations

import difflib
import math
import pathlib
import re
import runpy
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import ml_collections
from absl import flags

from blip2_jax import compat, durations, optimizer, tasks
from blip2_jax.data.features import DTYPES
from blip2_jax.data.filters import filters
from blip2_jax.data.mixture import parse_mixture
from blip2_jax.models import lora

RECIPES = pathlib.Path(__file__).parent.parent / "configs"


class Range(NamedTuple):
    """What a number or a name may be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


_POSITIVE = Range("at least 1", lambda x: x >= 1)
_NOT_NEGATIVE = Range("at least 0", lambda x: 0 <= x < math.inf)
_ABOVE_0 = Range("a number above 0", lambda x: 0 < x < math.inf)
_SHARE = Range("a share from 0 to 1", lambda x: 0 <= x <= 1)
_BELOW_1 = Range("at least 0 and below 1", lambda x: 0 <= x < 1)
_DRAWN = Range("above 0 and at most 1", lambda x: 0 < x <= 1)
_SEED = Range("from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32)


def _one_of(*names: str) -> Range:
    return Range(f"one of {', '.join(names)}", lambda x: x in names)


# By setting; what is not here is checked by `optimizer.check`, `compat.resolve`, `filters`, the tasks, or what watches.
RANGES: dict[str, Range] = {
    **dict.fromkeys(("total_steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"), _POSITIVE),
    **dict.fromkeys(("pieces", "max_skipped_in_a_row", "image_size"), _POSITIVE),
    **{"seed": _SEED, "eval_every": _NOT_NEGATIVE, "keep_every": _NOT_NEGATIVE, "watchdog_minutes": _NOT_NEGATIVE},
    **{"data.feature_views": _NOT_NEGATIVE, "data.feature_dtype": _one_of(*DTYPES), "data.view_seed": _SEED},
    **{"data.min_crop_scale": _DRAWN, "data.threads": _POSITIVE, "data.workers": _NOT_NEGATIVE},
    **{"data.max_rejected": _SHARE, "data.question_share": _BELOW_1},
    **dict.fromkeys(("data.max_text_tokens", "data.max_answer_tokens"), Range("at least 2", lambda x: x >= 2)),
    **dict.fromkeys(("model.layers", "model.queries", "model.cross_attention_every"), _POSITIVE),
    **{"model.dropout": _BELOW_1, "model.embed_width": _POSITIVE, "model.text_pooling": _one_of("cls", "mean")},
    **{"model.ln_vision_epsilon": _ABOVE_0, "model.unroll": _POSITIVE},
    **dict.fromkeys(("objective.itc", "objective.itm", "objective.itg", "objective.diversity"), _NOT_NEGATIVE),
    **{"objective.itm_share": _DRAWN, "objective.itg_share": _DRAWN, "objective.block": _POSITIVE},
    **{"objective.label_smoothing": _BELOW_1, "objective.itg_prior": _NOT_NEGATIVE},
    **{"optimizer.fresh_multiplier": _NOT_NEGATIVE, "optimizer.text_multiplier": _NOT_NEGATIVE},
    **{"evaluation.batch_size": _POSITIVE, "evaluation.rerank": _NOT_NEGATIVE, "evaluation.max_new_tokens": _POSITIVE},
}


def resolved(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy of a recipe that can be trained, its durations in steps; for all that reads settings.

    Raises:
      ValueError: a setting is unknown, missing, of another type or out of its range, or two contradict each other; all
        that is found is named at once.
      OSError: a duration is in epochs, and the sources that one consists of cannot be opened.
    """
    if config.get("task") not in tasks.TASKS:
        raise ValueError(f"config.task = {config.get('task')!r}: expected one of {', '.join(tasks.TASKS)}")
    _refuse(_off_the_schema(config, schema(config.task)))
    _refuse(_out_of_range(config))
    in_steps = durations.in_steps(config)
    _refuse(_out_of_range(in_steps))
    _refuse(_contradictions(in_steps))
    # They raise what is wrong themselves.
    switches = compat.resolve(in_steps.compat)
    optimizer.check(in_steps.optimizer, in_steps.total_steps, switches.epoch_schedule)
    filters(in_steps.data.filters)
    lora.resolve(in_steps.lora, tasks.TASKS[in_steps.task].adapted_parts)
    return in_steps


def schema(task: str) -> ml_collections.ConfigDict:
    """The recipe of nano, which has every setting of its task."""
    return recipe(task, "nano")


def recipe(task: str, variant: str) -> ml_collections.ConfigDict:
    """A recipe by its names.

    Raises:
      FileNotFoundError: the recipes are not beside the package.
    """
    file = RECIPES / f"{task}.py"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such recipe; install this package from its repository: pip install -e DIR")
    return runpy.run_path(str(file))["get_config"](variant)


def leaves(config: ml_collections.ConfigDict, path: str = "") -> dict[str, Any]:
    """Every setting with its value, by its path such as "data.train"."""
    found = {}
    for name, value in config.items():
        nested = isinstance(value, ml_collections.ConfigDict)
        found |= leaves(value, f"{path}{name}.") if nested else {f"{path}{name}": value}
    return found


def nearest(name: str, settings: Collection[str]) -> str:
    """What to say of the setting, or of the block of settings, that is most like an unknown one; "" if none is."""
    parts = [path.split(".") for path in settings]
    known = sorted({".".join(names[:depth]) for names in parts for depth in range(1, len(names) + 1)})
    by_last = {path.rpartition(".")[2]: path for path in known}
    found = difflib.get_close_matches(name, known, 1, 0.7)
    found += [by_last[match] for match in difflib.get_close_matches(name.rpartition(".")[2], by_last, 1, 0.7)]
    return f", did you mean {found[0]}?" if found else ""


def parse_flags(arguments: Sequence[str]) -> list[str]:
    """The `flags_parser` of `absl.app.run` for commands with a --config: what is wrong there ends it with one line."""
    try:
        return flags.FLAGS(arguments)
    except flags.Error as error:
        sys.exit(f"error: {error}")
    except (AttributeError, KeyError):  # So ml_collections says that there is no such setting, among other things.
        problems = list(_unknown_flags(arguments))
        if not problems:
            raise
        sys.exit("error: " + "\n".join(problems))


def _unknown_flags(arguments: Sequence[str]) -> Iterator[str]:
    """What arguments set that the config they name does not have."""
    values = [re.fullmatch(r"--?config(?:=(.*))?", argument) for argument in arguments]
    place = next((number for number, match in enumerate(values) if match), None)
    if place is None:
        return
    named = values[place][1] if values[place][1] is not None else "".join(arguments[place + 1 : place + 2])
    file, _, variant = named.partition(":")
    known = leaves(runpy.run_path(file)["get_config"](*[variant] if variant else []))
    for argument in arguments:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match and match[1] not in known:
            yield f"--config.{match[1]}: {named} has no such setting{nearest(match[1], known)}"


def _refuse(problems: Iterator[str]) -> None:
    found = list(problems)
    if found:
        raise ValueError(found[0] if len(found) == 1 else "\n  ".join(("the configuration cannot work:", *found)))


def _off_the_schema(config: ml_collections.ConfigDict, known: ml_collections.ConfigDict) -> Iterator[str]:
    """Settings that are unknown, missing, or of another type than in the recipe of the task."""
    found, expected = leaves(config), leaves(known)
    recipe = f"configs/{config.task}.py"
    for path in sorted(found.keys() - expected.keys()):
        yield f"config.{path} = {found[path]!r}: no such setting in {recipe}{nearest(path, expected)}"
    for path in sorted(expected.keys() - found.keys()):
        yield f"config.{path} is missing: {recipe} has {expected[path]!r}"
    for path in sorted(found.keys() & expected.keys()):
        types, value = _types(known, path, expected[path]), found[path]
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            names = " or ".join(kind.__name__ for kind in types)
            yield f"config.{path} = {value!r}: expected {names}, found {type(value).__name__}"


def _types(known: ml_collections.ConfigDict, path: str, value: Any) -> tuple[type, ...]:
    """What a setting may be: a number without a fraction may stand for one with it."""
    if path in durations.DURATIONS:
        return durations.TYPES
    return (float, int) if isinstance(value, float) else (type(value),)


def _out_of_range(config: ml_collections.ConfigDict) -> Iterator[str]:
    for path, value in leaves(config).items():
        unresolved = path in durations.DURATIONS and isinstance(value, str)
        if path in RANGES and not unresolved and not RANGES[path].holds(value):
            yield f"{path} = {value!r}: expected {RANGES[path].expected}"


def _contradictions(config: ml_collections.ConfigDict) -> Iterator[str]:
    """Settings that make sense one by one, but not together, with what to do about it."""
    data = config.data
    for name in ("train", "eval", "questions"):
        if data.get(name) or name == "train":
            parse_mixture(data[name])  # Raises what is wrong.
    if config.eval_every and not data.eval:
        yield f"eval_every = {config.eval_every} without data.eval: name sources, or set eval_every=0"
    if config.keep_best and not data.eval:
        yield f"keep_best = {config.keep_best!r} without data.eval: name sources, or set keep_best=''"
    if config.keep_every % config.checkpoint_every:
        yield (
            f"keep_every = {config.keep_every} with checkpoint_every = {config.checkpoint_every}: no checkpoints are "
            "written at those steps; make it a multiple"
        )
    evaluated = [name for name, _ in parse_mixture(data.eval)] if data.eval else []
    for name in sorted({name for name in evaluated if evaluated.count(name) > 1}):
        yield f"data.eval names {name} twice: each source is evaluated once, by itself"
    if data.features and not data.feature_views:
        yield (
            f"data.features = {data.features!r} with data.feature_views = 0, which runs the encoder in every step: set "
            "feature_views to the number of views that cache_features computed, or data.features=''"
        )
    switches = config.compat
    if switches.world_size and not (switches.rank_token_mean or switches.preset):
        yield (
            f"compat.world_size = {switches.world_size}, but nothing imitates ranks: set compat.rank_token_mean=True "
            "or compat.preset=lavis, or world_size=0"
        )
    if switches.world_size and config.batch_size % switches.world_size:
        yield (
            f"batch_size = {config.batch_size} does not divide over the {switches.world_size} ranks of "
            "compat.world_size"
        )
    yield from {"stage1": _stage1, "stage2": _stage2}[config.task](config)


def _stage1(config: ml_collections.ConfigDict) -> Iterator[str]:
    objective, evaluation = config.objective, config.evaluation
    if not (objective.itc or objective.itm or objective.itg):
        yield "objective.itc, itm and itg are all 0: nothing would be learnt; give one of them a weight"
    if config.data.max_text_tokens < 3:
        yield f"data.max_text_tokens = {config.data.max_text_tokens}: expected at least 3, since [CLS] and [SEP] count"
    if (objective.itc or objective.itm) and config.batch_size < 2:
        yield f"batch_size = {config.batch_size}: ITC and ITM compare with the rest of the batch; expected at least 2"
    if objective.itm and config.data.eval and evaluation.batch_size < 2:
        yield f"evaluation.batch_size = {evaluation.batch_size}: ITM finds no wrong pair there; expected at least 2"
    if evaluation.rerank and not objective.itm:
        yield (
            f"evaluation.rerank = {evaluation.rerank} with objective.itm = 0: what is not trained cannot judge; set "
            "evaluation.rerank=0"
        )


def _stage2(config: ml_collections.ConfigDict) -> Iterator[str]:
    data = config.data
    if data.questions and not data.question_share:
        yield (
            f"data.questions = {data.questions!r} with data.question_share = 0: no row would ask them; set "
            "data.questions='', or give them a share"
        )
