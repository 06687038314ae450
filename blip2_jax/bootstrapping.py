"""Captions written for images, and the captions that fit of old and new (CapFilt, arXiv 2201.12086)."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from blip2_jax import params, tasks
from blip2_jax.data.features import View
from blip2_jax.data.records import BadRecord, Record, Source
from blip2_jax.data.text import clean_caption
from blip2_jax.decoding import Draws, GenerationConfig
from blip2_jax.evaluation import retrieval
from blip2_jax.parallel import mesh as meshes
from blip2_jax.parallel import sharding
from blip2_jax.tasks.common import Task
from blip2_jax.tasks.stage1 import Stage1

# --rule: ITM's logits float[B, 2], cosines float[B] and the temperature -> by what captions are compared, float[B].
RULES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "itm": lambda logits, cosines, temperature: np.asarray(jax.nn.softmax(logits))[:, 1],
    "itc": lambda logits, cosines, temperature: cosines / temperature,
    "sum": retrieval.posterior,
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides about captions, beside the checkpoints.

    Attributes:
      captions: K, drawn for an image.
      generation: how.
      seed: of the drawing.
      rule: by what captions are compared, one of RULES.
      threshold: the least value by that rule of a caption that is kept.
      keep: at most so many captions of an image, the best; 0: all.
    """

    captions: int
    generation: GenerationConfig
    seed: int
    rule: str
    threshold: float
    keep: int


class Trained(NamedTuple):
    """A checkpoint on the mesh."""

    task: Task
    trainable: params.Tree
    sha256: str


class Candidate(NamedTuple):
    """A caption that an image might get: as it would be written, as it is scored, and where it comes from."""

    text: str
    clean: str
    origin: dict[str, Any]


def open_trained(path: str, mesh: Mesh) -> Trained:
    """A checkpoint, its parameters spread over the mesh."""
    task, trainable = tasks.load_trained(path)
    task.mesh = mesh
    digest = params.sha256(trainable)
    return Trained(task, jax.tree.map(sharding.put, trainable, sharding.shardings(trainable, mesh)), digest)


class CapFilt:
    """Captions images and filters captions, batch by batch."""

    def __init__(self, captioner: Trained | None, judge: Trained, settings: Settings, batch_size: int, mesh: Mesh):
        """Args:
          captioner: writes captions; None where settings.captions is 0.
          judge: of stage 1, scores them.
          settings: what decides.
          batch_size: B, images at once; a multiple of the devices that share a batch.
          mesh: of the checkpoints.

        Raises:
          ValueError: a checkpoint cannot do what it is asked for.
        """
        meshes.check_batch_size(batch_size, mesh)
        if settings.captions and captioner is None:
            raise ValueError(f"{settings.captions} captions an image: name what writes them (--captioner)")
        if settings.captions and not captioner.task.writes:
            raise ValueError(f"the captioner, a checkpoint of {captioner.task.name}, cannot write captions")
        if not isinstance(judge.task, Stage1):
            raise ValueError(f"the filter is a checkpoint of {judge.task.name}; only stage 1 can score captions")
        needed = {"itm": ("itm",), "itc": ("itc",), "sum": ("itm", "itc")}[settings.rule]
        untrained = [name for name in needed if not judge.task.config.objective[name]]
        if untrained:
            raise ValueError(f"rule {settings.rule!r}: the filter was trained with objective.{untrained[0]} = 0")
        self.captioner, self.judge, self.settings = captioner, judge, settings
        self.batch_size, self.mesh = batch_size, mesh

    def records(self, source: Source, indices: range, counts: collections.Counter) -> Iterator[Record]:
        """The records that remain, with their captions and the `provenance` of each; `counts` grows with them."""
        sizes = {trained.task.config.image_size for trained in (self.judge, self.captioner) if trained}
        for looked in _read_ahead(source, indices, sizes, self.batch_size):
            bad = [found for found in looked if isinstance(found, BadRecord)]
            counts.update(f"rejected_{found.reason}" for found in bad)
            good = [found for found in looked if not isinstance(found, BadRecord)]
            counts["images_read"] += len(looked)
            if good:
                with jax.set_mesh(self.mesh):
                    kept = self._batch(*zip(*good, strict=True), counts)
                yield from kept

    def _batch(self, indices, records, pixels, counts) -> list[Record]:
        images = {size: _filled([each[size] for each in pixels], self.batch_size) for size in pixels[0]}
        embeds = self.judge.task.encode(images[self.judge.task.config.image_size])
        written = self._write(indices, images, embeds)
        lower_case = self.judge.task.config.data.lower_case
        candidates = [_candidates(record, texts, lower_case) for record, texts in zip(records, written, strict=True)]
        result = []
        for record, found, scores in zip(records, candidates, self._score(embeds, candidates), strict=True):
            kept = self._select([score[self.settings.rule] for score in scores])
            for number, candidate in enumerate(found):
                counts[f"{candidate.origin['from']}_{'kept' if number in kept else 'dropped'}"] += 1
            counts["images_kept" if kept else "images_dropped"] += 1
            if kept:
                captions = [found[number].text for number in kept]
                provenance = [found[number].origin | {"scores": scores[number]} for number in kept]
                result.append(record | {"captions": captions, "provenance": provenance})
        return result

    def _write(self, indices, images, embeds) -> list[list[tuple[str, dict]]]:
        """For each image the captions drawn for it, and their origins."""
        count = self.settings.captions
        if not count:
            return [[] for _ in indices]
        captioner = self.captioner
        if _sight(captioner.task) != _sight(self.judge.task):
            embeds = captioner.task.encode(images[captioner.task.config.image_size])
        rows = np.resize(np.asarray(indices, np.uint32), self.batch_size)
        # A caption is a function of the seed, its number and its image's place in the source.
        draws = Draws(jax.random.key(self.settings.seed), rows)
        generation = dataclasses.replace(self.settings.generation, num_return_sequences=count)
        texts = captioner.task.captions(captioner.trainable, embeds, generation, draws)
        origin = {"from": "synthetic", "checkpoint": captioner.sha256, "seed": self.settings.seed}
        return [
            [(text.strip(), origin | {"number": number}) for number, text in enumerate(row)]
            for row in texts[: len(indices)]
        ]

    def _score(self, embeds, candidates: Sequence[Sequence[Candidate]]) -> list[list[dict[str, float]]]:
        """By every rule: each image with its first caption, then each with its second, so that none has to move."""
        judge, temperature = self.judge, float(self.judge.trainable["temperature"])
        features = judge.task.image_features(judge.trainable, embeds)
        scores: list[list[dict[str, float]]] = [[] for _ in candidates]
        for number in range(max(map(len, candidates))):
            texts = [found[number].clean if number < len(found) else "" for found in candidates]
            texts += [""] * (self.batch_size - len(texts))
            cosines, logits = judge.task.pair_scores(judge.trainable, embeds, features, texts)
            values = {name: rule(logits, cosines, temperature) for name, rule in RULES.items()}
            for row, found in enumerate(candidates):
                if number < len(found):
                    scores[row].append({name: float(value[row]) for name, value in values.items()})
        return scores

    def _select(self, values: Sequence[float]) -> list[int]:
        """Numbers of the captions that are kept, best first."""
        order = sorted(range(len(values)), key=lambda number: -values[number])
        kept = [number for number in order if values[number] >= self.settings.threshold]
        return kept[: self.settings.keep or None]


def _sight(task: Task) -> tuple:
    """What the image tokens of a task depend on: those with the same can share them."""
    return task.config.image_size, task.parts["vision"].sha256, task.dtype


def _filled(rows: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Some rows, stacked and filled up with zeros to a batch."""
    stacked = np.stack(rows)
    return np.pad(stacked, [(0, size - len(stacked)), *[(0, 0)] * (stacked.ndim - 1)])


def _candidates(record: Record, written: Sequence[tuple[str, dict]], lower_case: bool) -> list[Candidate]:
    """The captions of a record and those written for it, each once, without the empty ones."""
    captions = record.get("captions", [])
    # Captions that have been through here before keep their origin.
    origins = record.get("provenance", [{"from": "original"}] * len(captions))
    if len(origins) != len(captions):
        raise ValueError(f"{record['key']} has {len(captions)} captions, but a provenance of {len(origins)}")
    found: dict[str, Candidate] = {}
    for text, origin in [*zip(captions, origins, strict=True), *written]:
        clean = clean_caption(text, lower_case)
        if clean:
            found.setdefault(clean, Candidate(text, clean, origin))
    return list(found.values())


def _read_ahead(source: Source, indices: range, sizes: set[int], size: int) -> Iterator[list]:
    """Batches of (index, record, {image_size: uint8[S, S, 3]}) or BadRecord; the next one is read meanwhile."""

    def read(index: int) -> tuple | BadRecord:
        try:
            record = source[index]
            return index, record, {size: View(size).render(record, index, 0) for size in sizes}
        except BadRecord as bad:
            return bad

    with ThreadPoolExecutor() as pool:
        ahead: collections.deque = collections.deque()
        for start in range(0, len(indices), size):
            ahead.append(pool.map(read, indices[start : start + size]))
            if len(ahead) > 1:
                yield list(ahead.popleft())
        while ahead:
            yield list(ahead.popleft())
