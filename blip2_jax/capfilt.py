"""Bootstrap captions (CapFilt): write new ones for images, and keep those that fit of old and new.

    python -m blip2_jax.capfilt --source folder:web --output bootstrapped --captioner STAGE2 --filter STAGE1

For every image a captioner draws some captions, by a stage-1 checkpoint the Q-Former itself, by a stage-2 one the
language model. A stage-1 checkpoint scores them and the captions that the image came with. The best are written, with
where each comes from and its scores, as a corpus that `arrayrecord:bootstrapped/*.arrayrecord` reads; an image left
without any is dropped. corpus.json says what was done and counts it. Stopped, the same command goes on with the next
shard.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import math
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import msgpack
from jax.sharding import Mesh

from blip2_jax import files
from blip2_jax.bootstrapping import RULES, CapFilt, Settings, Trained, open_trained
from blip2_jax.data.records import Record, Source
from blip2_jax.data.shards import shard_file, shard_range, write_shard
from blip2_jax.data.sources import open_source
from blip2_jax.decoding import GenerationConfig
from blip2_jax.monitoring.progress import progress
from blip2_jax.parallel import mesh as meshes

RECORDS_IN_SHARD = 4096


def refuse_other_corpus(file: pathlib.Path, facts: dict[str, Any]) -> None:
    """Raise ValueError if a corpus.json tells of another corpus than `facts`."""
    if not file.exists():
        return
    # Where the same things are to be found may change.
    same = lambda content: {name: value for name, value in content.items() if name not in ("where", "counts")}
    lines = files.differences(same(json.loads(file.read_text())), same(facts))
    if lines:
        raise ValueError(
            f"{file.parent} holds another corpus:\n" + "\n".join(lines) + "\nChoose another --output, or give the "
            "command the settings it was started with."
        )


def build(
    source_name: str, output: pathlib.Path, checkpoints: dict[str, str], settings: Settings, batch_size: int, mesh: Mesh
) -> dict[str, Any]:
    """Write the corpus, or the shards of it that are not there yet; returns what corpus.json says.

    Args:
      source_name: of the images.
      output: folder of the corpus.
      checkpoints: paths of "filter" and, where captions are written, "captioner".
      settings: what decides.
      batch_size: images at once.
      mesh: that they are spread over.

    Raises:
      OSError, ValueError: something cannot be opened, does not fit, or the folder holds another corpus.
    """
    source = open_source(source_name)
    opened = {path: open_trained(path, mesh) for path in set(checkpoints.values())}
    by_role = {role: opened[path] for role, path in checkpoints.items()}
    capfilt = CapFilt(by_role.get("captioner"), by_role["filter"], settings, batch_size, mesh)
    shards = max(1, math.ceil(len(source) / RECORDS_IN_SHARD))
    facts = {
        "where": {"source": source_name, **checkpoints},
        "source": source.identity,
        **{role: _identity(trained) for role, trained in by_role.items()},
        "settings": dataclasses.asdict(settings),
        "shards": shards,
    }
    refuse_other_corpus(output / "corpus.json", facts)
    files.write_json(output / "corpus.json", facts)
    counts: collections.Counter = collections.Counter()
    with progress(total=len(source), desc="CapFilt", unit="image") as bar:
        for number in range(shards):
            file, indices = shard_file(output, number, shards), shard_range(len(source), number, shards)
            if not file.exists():
                write_shard(file, map(msgpack.packb, _counted(capfilt, source, indices, file, bar)))
            else:
                bar.update(len(indices))
            counts.update(json.loads(file.with_suffix(".json").read_text()))
    facts["counts"] = dict(sorted(counts.items()))
    files.write_json(output / "corpus.json", facts)
    return facts


def _counted(capfilt: CapFilt, source: Source, indices: range, file: pathlib.Path, bar: Any) -> Iterator[Record]:
    """The records of a shard; its counts are written before the shard appears."""
    counts: collections.Counter = collections.Counter()
    start = bar.n
    for record in capfilt.records(source, indices, counts):
        bar.update(start + counts["images_read"] - bar.n)
        yield record
    bar.update(start + len(indices) - bar.n)
    files.write_json(file.with_suffix(".json"), counts)


def _identity(trained: Trained) -> dict[str, Any]:
    return {"stage": trained.task.name, "sha256": trained.sha256, "frozen": trained.task.frozen_identity()}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", required=True, help="of images, such as folder:DIR")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="folder of the new corpus")
    parser.add_argument("--captioner", help="workdir or checkpoint of stage 1 or 2 that writes captions")
    parser.add_argument("--filter", required=True, help="workdir or checkpoint of stage 1 that scores captions")
    parser.add_argument("--captions", type=int, default=10, help="drawn for an image; 0 filters only (default 10)")
    parser.add_argument("--top_p", type=float, default=0.9, help="share of the probability drawn from (default 0.9)")
    parser.add_argument("--top_k", type=int, default=0, help="likeliest tokens drawn from (default 0: all)")
    parser.add_argument("--temperature", type=float, default=1.0, help="divisor of the logits (default 1)")
    parser.add_argument("--min_new_tokens", type=int, default=1, help="of a caption (default 1)")
    parser.add_argument("--max_new_tokens", type=int, default=30, help="of a caption (default 30)")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default 0)")
    parser.add_argument(
        "--rule",
        choices=RULES,
        default="itm",
        help="what captions are compared by: probability of a match (itm, the default), cosine / temperature (itc), "
        "log-odds of a match + cosine / temperature (sum)",
    )
    parser.add_argument("--threshold", type=float, help="least value of a caption that is kept (itm: default 0.5)")
    parser.add_argument("--keep", type=int, default=2, help="captions of an image, the best (default 2; 0: all)")
    parser.add_argument("--batch_size", type=int, default=64, help="images at once (default 64)")
    parser.add_argument("--mesh", default="data=-1,fsdp=1,tensor=1", help="that they are spread over")
    return parser.parse_args(arguments)


def settings(options: argparse.Namespace) -> Settings:
    """What the options say, checked.

    Raises:
      ValueError: one of them means nothing.
    """
    threshold = 0.5 if options.threshold is None and options.rule == "itm" else options.threshold
    if threshold is None or not math.isfinite(threshold):
        raise ValueError(f"--rule {options.rule} needs a finite --threshold: there is none that fits every checkpoint")
    for name in ("captions", "keep"):
        if getattr(options, name) < 0:
            raise ValueError(f"--{name} = {getattr(options, name)}: expected at least 0")
    if options.captions and not options.temperature:
        raise ValueError("--temperature 0 would draw the same caption again and again: expected above 0")
    generation = GenerationConfig(
        options.max_new_tokens,
        options.min_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
    )
    return Settings(options.captions, generation, options.seed, options.rule, threshold, options.keep)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    checkpoints = {"filter": options.filter} | ({"captioner": options.captioner} if options.captioner else {})
    try:
        with files.clear_about_full_disk(options.output, "make room, and the same command goes on"):
            mesh = meshes.make_mesh(options.mesh)
            facts = build(options.source, options.output, checkpoints, settings(options), options.batch_size, mesh)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    for name, count in facts["counts"].items():
        print(f"{name.replace('_', ' ')}: {count:,}")


if __name__ == "__main__":
    main()
