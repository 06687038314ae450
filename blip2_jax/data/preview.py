"""The first batches of a recipe as its model sees them, on an HTML page.

They come from the pipeline that trains. No weights are read: where a run takes image tokens that were computed before,
the page shows the pixels that these are computed from.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import ml_collections
import numpy as np

from blip2_jax import tasks
from blip2_jax.data.features import View
from blip2_jax.data.pipeline import Batch, Part, training_batches
from blip2_jax.data.records import Record, Source
from blip2_jax.monitoring import batches_page
from blip2_jax.monitoring.batches_page import Line, Row, Shown, Token
from blip2_jax.objectives.language_modeling import next_token_targets
from blip2_jax.tasks.common import Task
from blip2_jax.tasks.stage1 import Stage1
from blip2_jax.tasks.stage2 import Stage2


@dataclasses.dataclass(frozen=True)
class _Views:
    """Stands in for the table of image tokens: the pixels that they are computed from."""

    source: Source
    view: View

    @property
    def views(self) -> int:
        return self.view.count

    def __getitem__(self, key: tuple[int, int]) -> np.ndarray:
        number, index = key
        return self.view.render(self.source[index], index, number)


@dataclasses.dataclass(frozen=True)
class _Named:
    """Prepares as a part does, and keeps the name of its source."""

    part: Part

    def __call__(self, example: Record, rng: np.random.Generator) -> Record:
        return self.part.prepare(example, rng) | {"source": self.part.pictures.name}


@dataclasses.dataclass(frozen=True)
class _WithExamples:
    """A batch beside the examples it is made of."""

    collate: Callable[[Sequence[Record]], Batch]

    def __call__(self, examples: Sequence[Record]) -> tuple[Batch, Sequence[Record]]:
        return self.collate(examples), examples


def _parts(config: ml_collections.ConfigDict) -> tuple[Task, list[Part]]:
    """The task and its parts, of pixels whatever the recipe says."""
    views = config.data.feature_views
    pixels = ml_collections.ConfigDict(copy.deepcopy(config.to_dict()))
    pixels.data.feature_views = 0
    task = tasks.create(pixels)
    parts = []
    for part in task.training_parts():
        pictures = part.pictures
        if views:
            view = pictures.view._replace(count=views)
            pictures = dataclasses.replace(pictures, view=view, features=_Views(pictures.source, view))
        parts.append(dataclasses.replace(part, pictures=pictures, prepare=_Named(part)))
    return task, parts


def _line(label: str, name: Callable[[int], str], ids: np.ndarray, kinds: Sequence[str]) -> Line:
    tokens = [Token(name(int(token)), str(token), kind) for token, kind in zip(ids, kinds, strict=True)]
    return Line(label, tokens)


def _kinds(mask: np.ndarray, predicted: np.ndarray | None = None) -> list[str]:
    """By position: "padding" where bool[T] `mask` is False, and of the others "predicted" or "read"."""
    wanted = np.zeros_like(mask) if predicted is None else predicted
    return ["predicted" if want else "read" if there else "padding" for there, want in zip(mask, wanted, strict=True)]


def _stage1_lines(task: Stage1, batch: Batch) -> Iterator[list[Line]]:
    """What each row's caption is to the terms of the loss."""
    objective, name = task.objective, task.caption_tokenizer.token_text
    started = batch["text_ids"].copy()
    started[:, 0] = objective.decoder_start
    targets, wanted = map(np.asarray, next_token_targets(started, batch["text_mask"]))
    for number, (ids, mask) in enumerate(zip(batch["text_ids"], batch["text_mask"], strict=True)):
        readers = ["ITC"] * bool(objective.itc) + ["ITM"] * bool(objective.itm and number % objective.itm_every == 0)
        lines = [_line(f"{' and '.join(readers)} read", name, ids, _kinds(mask))] if readers else []
        if objective.itg and number % objective.itg_every == 0:
            label = f"ITG writes, behind {name(objective.decoder_start)}"
            lines.append(_line(label, name, targets[number], _kinds(wanted[number], wanted[number])))
        yield lines


def _stage2_lines(task: Stage2, batch: Batch) -> Iterator[list[Line]]:
    """What the language model reads and writes in each row."""
    texts, name = task.objective.texts(batch), task.tokenizer.token_text
    ids, mask, targets, counts = map(np.asarray, texts)
    begin = [Token(name(token), str(token), "soft") for token in task.objective.begin]
    prompt = [*begin, Token(f"{task.blip2.qformer.queries} queries", "soft prompt", "soft")]
    for row in range(len(ids)):
        lines = []
        if "instruction_ids" in batch:
            own = batch["instruction_ids"][row], _kinds(batch["instruction_mask"][row])
            lines.append(_line("Q-Former reads", task.caption_tokenizer.token_text, *own))
        if task.reads_apart:
            label, tokens = _line("encoder reads", name, ids[row], _kinds(mask[row]))
            lines += [
                Line(label, prompt + tokens),
                _line("decoder writes", name, targets[row], _kinds(counts[row], counts[row])),
            ]
        else:
            label, tokens = _line("language model reads and writes", name, ids[row], _kinds(mask[row], counts[row]))
            lines.append(Line(label, prompt + tokens))
        yield lines


def _alike(values: Sequence[str]) -> list[list[int]]:
    """For each row the numbers of the others with the same value."""
    rows = defaultdict(list)
    for number, value in enumerate(values):
        rows[value].append(number)
    return [[other for other in rows[value] if other != number] for number, value in enumerate(values)]


def _shown(task: Task, batch: Batch, examples: Sequence[Record], rejects: list[dict[str, str]]) -> Shown:
    """A batch as the page takes it."""
    pixels = batch["image"] if "image" in batch else batch["image_embeds"]
    lines = (_stage1_lines if isinstance(task, Stage1) else _stage2_lines)(task, batch)
    names = [name for name in ("image_id", "text_id") if name in batch]
    ids = {name: [f"{first:08x}{second:08x}" for first, second in batch[name]] for name in names}
    alike = {name: _alike(values) for name, values in ids.items()}
    so = ", so not a negative" if isinstance(task, Stage1) else ""
    rows = [
        Row(
            pixels[number],
            example.get("caption") or example["question"],
            example["source"],
            example["key"],
            own,
            {name: values[number] for name, values in ids.items()},
            {f"same {name.removesuffix('_id')}{so}": values[number] for name, values in alike.items()},
        )
        for number, (example, own) in enumerate(zip(examples, lines, strict=True))
    ]
    different = [f"{len(set(values)):,} different {name.removesuffix('_id')}s" for name, values in ids.items()]
    summary = [f"{len(rows):,} of {task.config.batch_size:,} rows", *different, f"{len(rejects):,} records rejected"]
    return Shown(rows, rejects, ", ".join(summary))


def _facts(task: Task, parts: Sequence[Part]) -> dict[str, str]:
    """The recipe, as far as it makes batches."""
    config, data = task.config, task.config.data
    view = parts[0].pictures.view
    pictures = [
        f"{view.image_size} x {view.image_size} pixels",
        f"random crops of at least {100 * view.min_scale:.3g} % of the area",
        "mirrored at random" if view.flip else "never mirrored",
    ]
    if parts[0].pictures.features is not None:
        pictures.append(f"{view.count} views of each, whose image tokens are computed before")
    facts = {"batch": f"{config.batch_size:,} rows, seed {config.seed}", "images": ", ".join(pictures)}
    for number, part in enumerate(parts, start=1):
        share = f"{100 * part.share:.3g} % of the rows, {len(part.pictures.source):,} records"
        facts[f"source {number}" if len(parts) > 1 else "source"] = f"{part.pictures.name}: {share}"
    facts["text"] = f"at most {data.max_text_tokens} tokens, {'lower case' if data.lower_case else 'case kept'}"
    kept = {**data.filters, "scripts": data.filters.scripts or "any"}
    facts["filters"] = ", ".join(f"{name} {value}" for name, value in kept.items())
    if isinstance(task, Stage2):
        facts["prompts"] = ", ".join(map(repr, task.batches.prompts))
    names = {"vision": "image encoder", "bert": "BERT", "llm": "language model"}
    return facts | {names[name]: part.source for name, part in task.parts.items()}


def look(config: ml_collections.ConfigDict, count: int, rows: int) -> tuple[dict[str, str], list[Shown]]:
    """Facts of a recipe, and its first batches.

    Args:
      config: the recipe.
      count: of batches.
      rows: of each batch, at most.

    Raises:
      OSError, ValueError: a source or a tokenizer is not there, or does not fit.
    """
    task, parts = _parts(config)
    batches = training_batches(
        parts,
        _WithExamples(task.batches.collate),
        config.batch_size,
        config.seed,
        rows=range(min(rows, config.batch_size)),
        threads=config.data.threads,
    )
    shown = [_shown(task, *delivery.batch, delivery.rejects) for delivery in itertools.islice(batches, count)]
    return _facts(task, parts), shown


def write(config: ml_collections.ConfigDict, file: pathlib.Path, count: int, rows: int) -> None:
    """Write the page of the first `count` batches, of each the first `rows` rows; raises as `look` does."""
    facts, batches = look(config, count, rows)
    title = f"The first {count} batches of {config.task}" if count > 1 else f"The first batch of {config.task}"
    batches_page.write(file, title, "As the model sees them, from the pipeline that trains.", facts, batches)
