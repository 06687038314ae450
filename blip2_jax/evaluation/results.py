"""Result files: what the benchmarks' own servers accept, and beside each a file of all that led to it."""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import blip2_jax
from blip2_jax import files
from blip2_jax.evaluation import captioning, java_captioning, ptb, visdial, vqa


class Format(NamedTuple):
    """Attributes:
    ids: names of what says which picture, question or round it is, and their type.
    output: the name of what is predicted, and its type.
    """

    ids: tuple[tuple[str, type], ...]
    output: tuple[str, type]


_CAPTION = Format((("image_id", int),), ("caption", str))
_ANSWER = Format((("question_id", int),), ("answer", str))
# By benchmark; of NoCaps the ids are its own, not those of Open Images.
FORMATS = {
    "coco": _CAPTION,
    "nocaps": _CAPTION,
    "vqav2": _ANSWER,
    "okvqa": _ANSWER,
    "gqa": Format((("questionId", str),), ("prediction", str)),
    "visdial": Format((("image_id", int), ("round_id", int)), ("ranks", list)),
}


class Files(NamedTuple):
    """Attributes:
    submission: what the server takes.
    details: everything.
    """

    submission: pathlib.Path
    details: pathlib.Path


def _id(benchmark: str, name: str, kind: type, value: Any) -> int | str:
    try:
        return kind(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{benchmark}: {name} {value!r} is no {kind.__name__}, which its server expects") from error


def _output(benchmark: str, ids: tuple, name: str, kind: type, value: Any) -> str | list[int]:
    if kind is list:
        ranks = [int(rank) for rank in value]
        if sorted(ranks) != list(range(1, len(ranks) + 1)):
            raise ValueError(f"{benchmark}: the ranks of {ids} are {ranks[:5]}...: expected each number from 1 on once")
        return ranks
    if not isinstance(value, str):
        raise ValueError(f"{benchmark}: {name} of {ids} is {value!r}: expected a text")
    return value


def rows(benchmark: str, ids: Sequence[Any], outputs: Sequence[Any]) -> list[dict[str, Any]]:
    """Predictions as the server of a benchmark accepts them.

    Args:
      benchmark: a key of `FORMATS`.
      ids: of each picture or question, perhaps as text, as sources have keys; for visdial pairs of image and round,
        which it counts from 1.
      outputs: captions or answers, or for visdial the ranks of all candidates, as `visdial.ranks` gives them.

    Raises:
      ValueError: there is no such benchmark, there is not one output for each id, one is of another type, or an id
        comes twice.
    """
    if benchmark not in FORMATS:
        raise ValueError(f"there is no benchmark {benchmark!r}; there are {', '.join(FORMATS)}")
    if len(ids) != len(outputs):
        raise ValueError(f"{benchmark}: {len(ids)} ids and {len(outputs)} predictions: expected one for each")
    named, output = FORMATS[benchmark]
    found: dict[tuple, dict[str, Any]] = {}
    for values, predicted in zip(ids, outputs, strict=True):
        values = (values,) if len(named) == 1 else tuple(values)
        key = tuple(_id(benchmark, *name, value) for name, value in zip(named, values, strict=True))
        if key in found:
            raise ValueError(f"{benchmark}: {', '.join(name for name, _ in named)} {key} has two predictions")
        row = {name: value for (name, _), value in zip(named, key, strict=True)}
        found[key] = row | {output[0]: _output(benchmark, key, *output, predicted)}
    return list(found.values())


def versions() -> dict[str, str]:
    """Of this package and of every metric, so that figures can be told apart that a change of them has moved."""
    found = {
        "blip2_jax": blip2_jax.__version__,
        "captioning": captioning.VERSION,
        "tokens": ptb.VERSION,
        "visdial": visdial.VERSION,
        "vqa": vqa.VERSION,
    }
    for name, package in (("meteor and spice", "pycocoevalcap"), ("lemmas", "lemminflect")):
        try:
            found[name] = f"{package} {importlib.metadata.version(package)}"
        except importlib.metadata.PackageNotFoundError:
            found[name] = f"{package} is not installed"
    return found


def write(
    folder: pathlib.Path,
    name: str,
    benchmark: str,
    predictions: Sequence[Mapping[str, Any]],
    *,
    metrics: Mapping[str, Any],
    settings: Mapping[str, Any],
    prompts: Mapping[str, str],
    checkpoint: Mapping[str, str],
    absent: Mapping[str, str] | None = None,
) -> Files:
    """Write folder/NAME.json for the server and folder/NAME.details.json, each whole or not at all.

    Args:
      folder: made if need be.
      name: of the set that was evaluated, such as "coco_karpathy_test".
      benchmark: a key of `FORMATS`.
      predictions: from `rows`.
      metrics: what was found, which may be nested; empty where the server alone has the answers.
      settings: how it was generated: the decoder, its lengths, the resolution, the source.
      prompts: by what each is for, such as {"caption": "a photo of"}.
      checkpoint: its path and the hashes of what was trained and of the frozen parts.
      absent: metrics that were not computed, with why not; those of `java_captioning`, if not given, where captions
        are predicted and `metrics` has not got them.

    Raises:
      ValueError: a number is not finite, which JSON cannot hold.
      OSError: a file cannot be written.
    """
    if absent is None and FORMATS[benchmark] == _CAPTION:
        absent = {name: "it was not asked for" for name in java_captioning.NAMES if name not in metrics}
    details = {
        "benchmark": benchmark,
        "name": name,
        "metrics": dict(metrics),
        "absent": dict(absent or {}),
        "settings": dict(settings),
        "prompts": dict(prompts),
        "checkpoint": dict(checkpoint),
        "versions": versions(),
        "predictions": list(predictions),
    }
    written = Files(folder / f"{name}.json", folder / f"{name}.details.json")
    texts = [json.dumps(content, indent=1, allow_nan=False) + "\n" for content in (details["predictions"], details)]
    for file, text in zip(written, texts, strict=True):
        files.write_text(file, text)
    return written
