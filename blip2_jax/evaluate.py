"""Measure checkpoints beside what needs no training.

    python -m blip2_jax.evaluate --checkpoint STAGE1 --checkpoint STAGE2 --data nano:test_drawing --output DIR

Writes DIR/summary.json and DIR/report.html and prints a table. Each checkpoint is measured on what its stage can do:
retrieval after stage 1; captions and questions after stage 2.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from blip2_jax import files, params, tasks
from blip2_jax.data.mixture import parse_mixture
from blip2_jax.data.pipeline import Pictures
from blip2_jax.evaluation import attention, baselines
from blip2_jax.monitoring import charts, comparison, examples, report
from blip2_jax.monitoring.metrics import read_metrics
from blip2_jax.monitoring.pictures import Thumbnails
from blip2_jax.tasks.common import Task


def known(task: Task, sources: Sequence[Pictures]) -> list[baselines.Known]:
    """Each source as the baselines see it."""
    examples = [[pictures.example(index) for index in range(len(pictures.source))] for pictures in sources]
    captions = [[example["caption"] for example in found] for found in examples]
    sentences = task.sentence_embeddings([caption for found in captions for caption in found])
    parts = np.split(sentences, np.cumsum([len(found) for found in captions])[:-1])
    result = []
    for found, texts, vectors in zip(examples, captions, parts, strict=True):
        embeds = np.stack([example["image_embeds"] for example in found])
        features = {name: describe(embeds) for name, describe in baselines.DESCRIPTIONS.items()}
        categories = [example["category"] for example in found] if "category" in found[0] else None
        result.append(baselines.Known(features, texts, vectors, categories))
    return result


def measure_baselines(task: Task, tests: Sequence[Pictures]) -> list[dict[str, dict]]:
    """Every baseline on each of `tests`, with the training pictures of the task's configuration as what is known."""
    train = [task.pictures(name, training=False) for name, _ in parse_mixture(task.config.data.train)]
    found = known(task, [*train, *tests])
    together = baselines.join(found[: len(train)])
    return [baselines.measure(test, together) for test in found[len(train) :]]


def measure(checkpoints: Sequence[str], data: Sequence[str]) -> tuple[dict[str, dict], dict[str, list]]:
    """Metrics by split and samples by source, those of attention for the first source alone.

    Raises:
      OSError, ValueError: a checkpoint or a source cannot be opened, or two sources have the same name.
    """
    if len({name.partition(":")[2] for name in data}) < len(data):
        raise ValueError(f"--data {', '.join(data)}: every source must be named once, with a name of its own")
    splits: dict[str, dict] = {}
    samples: dict[str, list] = {name: [] for name in data}
    for path in checkpoints:
        task, trainable = tasks.load_trained(path)
        pictures = [task.pictures(name, training=False) for name in data]
        if not splits:
            measured = measure_baselines(task, pictures)
            splits = {name.partition(":")[2]: {"baselines": m} for name, m in zip(data, measured, strict=True)}
        for name, split, source in zip(data, splits.values(), pictures, strict=True):
            metrics, found = task.evaluate(trainable, source)
            split |= params.unflatten(metrics)
            samples[name] += found
        samples[data[0]] += attention.samples(task, trainable, pictures[0])
        jax.clear_caches()
    for name, source in zip(data, pictures, strict=True):
        samples[name] += Thumbnails(source.source).samples(examples.keys_shown(samples[name]))
    for split in splits.values():
        if "caption" in split:
            split["shuffled_image_loss_increase"] = split["caption"].pop("shuffled_image_loss_increase")
    return splits, samples


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", action="append", required=True, help="a workdir, or one of its checkpoints/STEP"
    )
    parser.add_argument("--data", action="append", required=True, help="a source, such as nano:test_drawing")
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of summary.json and report.html")
    parser.add_argument("--title", default="blip2_jax: what was learnt")
    parser.add_argument("--started", type=float, help="when all began, in seconds since 1970, for the summary")
    parser.add_argument("--seconds_setup", type=float, help="how long installing and downloading took, for the summary")
    options = parser.parse_args(arguments)
    try:
        splits, samples = measure(options.checkpoint, options.data)
        summary: dict = {"splits": splits}
        if options.seconds_setup is not None:
            summary["seconds_setup"] = options.seconds_setup
        curves = {path: read_metrics(pathlib.Path(path) / "metrics.jsonl") for path in options.checkpoint}
        body = _body(curves, splits, samples)
        if options.started is not None:
            summary["seconds"] = time.time() - options.started
        with files.clear_about_full_disk(options.output, "make room, or choose another --output"):
            report.write(options.output / "report.html", options.title, body, examples.STYLE)
            files.write_json(options.output / "summary.json", summary)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(comparison.text(splits))
    print(f"wrote {options.output / 'summary.json'} and {options.output / 'report.html'}")


def _body(curves: Mapping[str, list], splits: dict, samples: Mapping[str, list]) -> str:
    parts = ["<h2>Measured, beside what needs no training</h2>", comparison.table(splits)]
    for path, rows in curves.items():
        if rows:
            parts += [
                f"<h2>Training of {pathlib.Path(path).name}</h2>",
                charts.curves(rows),
                charts.evaluation_curves(rows),
            ]
    parts += ["<h2>Pictures it had not seen</h2>", examples.sections(samples)]
    return "".join(parts)


if __name__ == "__main__":
    main()
