"""What CapFilt does for captions of which a fifth are wrong: python -m tests.benchmarks.capfilt DIR [--seeds 0 1]

A fifth of the training pictures of nano swap captions with each other. A filter finds them, and stage 1 is trained on
what is left, by the recipe of nano and for as many steps as on all captions and on the right ones. Filters, both
trained on the noisy captions that they judge:

- `trained`: nano's stage 1 itself, which has seen every pair seven times;
- `early`: ITC alone for 50 steps, two and a half times every pair.

The rule is ITC's: at this size ITM has not begun to learn (see the README). The threshold is fixed beforehand by the
share of wrong captions that is expected, a fifth: as many are dropped. `filtered` is what `early` leaves; for
`captioned` the noisy stage 1 writes ten captions a picture, and of these and its own each keeps the best two that reach
the same threshold.

Every run is a folder in DIR/seed_N; started again, the script goes on where it was, and prints its tables at the end.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterable, Sequence

import msgpack
import numpy as np

from blip2_jax.data.records import Record
from blip2_jax.data.shards import write_shard
from blip2_jax.data.sources import open_source
from tests.benchmarks.tables import markdown

SHARE = 0.2
SPLITS = ("val_drawing", "val_concept")
RUNS = {
    "clean": "the right captions",
    "noisy": "a fifth of them wrong",
    "filtered": "filtered",
    "captioned": "filtered, and captions written",
}
FILTERS = {"trained": "150 steps, all objectives", "early": "50 steps, ITC alone"}


def call(module: str, *arguments: str) -> None:
    """A command of ours, its progress to the terminal."""
    subprocess.run([sys.executable, "-m", f"blip2_jax.{module}", *arguments], check=True)


def records(source: str) -> list[Record]:
    opened = open_source(source)
    return [opened[index] for index in range(len(opened))]


def shuffle(found: Sequence[Record], seed: int) -> list[Record]:
    """A fifth of the records with another one's caption; `shuffled` says which."""
    rng, captions = np.random.default_rng(seed), [record["captions"][0] for record in found]
    while True:
        to = rng.permutation(len(found))[: round(SHARE * len(found))]
        given = np.roll(to, 1)
        if all(captions[a] != captions[b] for a, b in zip(to, given, strict=True)):
            break
    result = [record | {"shuffled": False} for record in found]
    for a, b in zip(to, given, strict=True):
        result[a] |= {"captions": [captions[b]], "shuffled": True}
    return result


def write(file: pathlib.Path, found: Iterable[Record]) -> None:
    if not file.exists():
        write_shard(file, map(msgpack.packb, found))


def train(folder: pathlib.Path, seed: int, source: str, *options: str) -> None:
    """Stage 1 of nano in a folder, or what is left of it."""
    common = [f"--workdir={folder}", f"--config.seed={seed}", f"--config.data.train={source}"]
    call("main", "--config=configs/stage1.py", *common, *options)


def judge(folder: pathlib.Path, source: str, trained: pathlib.Path, threshold: float, *options: str) -> None:
    """Filter a source; without a `--captioner` no captions are written."""
    options = options or ("--captions=0",)
    fixed = ("--rule=itc", f"--threshold={threshold}")
    call("capfilt", f"--source={source}", f"--output={folder}", f"--filter={trained}", *fixed, *options)


def lowest(judged: Sequence[Record]) -> tuple[float, np.ndarray]:
    """The threshold below which a fifth lies, and which those are."""
    scores = np.asarray([record["provenance"][0]["scores"]["itc"] for record in judged])
    threshold = float(np.sort(scores)[round(SHARE * len(scores))])
    return threshold, scores < threshold


def run(folder: pathlib.Path, seed: int) -> None:
    """Everything of a seed; what was measured goes to summary.json."""
    write(folder / "noisy.arrayrecord", shuffle(records("nano:train"), seed))
    noisy = f"arrayrecord:{folder / 'noisy.arrayrecord'}"
    alone = ("total_steps=50", "objective.itm=0", "objective.itg=0", "evaluation.rerank=0", "data.eval=")
    train(folder / "early", seed, noisy, *(f"--config.{setting}" for setting in alone))
    train(folder / "noisy", seed, noisy)
    checkpoints, summary, threshold = {"trained": folder / "noisy", "early": folder / "early"}, {}, 0.0
    for name, checkpoint in checkpoints.items():
        judge(folder / f"judged_{name}", noisy, checkpoint, -1e9)
        judged = records(f"arrayrecord:{folder / f'judged_{name}'}/*.arrayrecord")
        threshold, dropped = lowest(judged)
        wrong = np.asarray([record["shuffled"] for record in judged])
        hits = int((wrong & dropped).sum())
        summary[name] = {"precision": hits / int(dropped.sum()), "recall": hits / int(wrong.sum())}
    judge(folder / "kept_filtered", noisy, checkpoints["early"], threshold)
    written = ("--captions=10", f"--captioner={folder / 'noisy'}", "--max_new_tokens=8", f"--seed={seed}")
    judge(folder / "kept_captioned", noisy, checkpoints["early"], threshold, *written)
    for name in ("filtered", "captioned"):
        train(folder / name, seed, f"arrayrecord:{folder / f'kept_{name}'}/*.arrayrecord")
        summary[f"kept_{name}"] = json.loads((folder / f"kept_{name}" / "corpus.json").read_text())["counts"]
    train(folder / "clean", seed, "nano:train")
    for name in RUNS:
        last = json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])
        summary[name] = {key.removeprefix("eval/nano:"): last[key] for key in last if key.startswith("eval/")}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))


def tables(folders: Sequence[pathlib.Path]) -> str:
    """The README's: means over seeds, in brackets each of them."""
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in folders]

    def cell(values: Sequence[float]) -> str:
        each = f" ({', '.join(f'{value:.3f}' for value in values)})" if len(values) > 1 else ""
        return f"{np.mean(values):.3f}{each}"

    filters = [["filter", "precision", "recall"]]
    for name, title in FILTERS.items():
        values = [[summary[name][what] for summary in summaries] for what in ("precision", "recall")]
        filters.append([title, *map(cell, values)])
    columns = [(split, rank) for split in SPLITS for rank in ("r1", "r10")]
    runs = [["trained on", *(f"{split} {rank.replace('r', 'R@')}" for split, rank in columns)]]
    directions = [f"retrieval/itc/{direction}" for direction in ("text_to_image", "image_to_text")]
    mean = lambda run, split, rank: float(np.mean([run[f"{split}/{each}/{rank}"] for each in directions]))
    for name, title in RUNS.items():
        values = [[mean(summary[name], *column) for summary in summaries] for column in columns]
        runs.append([title, *map(cell, values)])
    counts = [f"{name}: {summary[name]}" for summary in summaries for name in ("kept_filtered", "kept_captioned")]
    return "\n\n".join([markdown(filters), markdown(runs), *counts])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    given = parser.parse_args()
    directories = [given.directory.absolute() / f"seed_{seed}" for seed in given.seeds]
    for directory, number in zip(directories, given.seeds, strict=True):
        run(directory, number)
    print(tables(directories))
