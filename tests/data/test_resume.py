"""Every kind of source and a mixture: the exact next batch after any interruption, each example once an epoch."""

import chex
import numpy as np
import pytest

from blip2_jax.data import pipeline
from blip2_jax.data.features import View
from blip2_jax.data.pipeline import Part, Pictures
from blip2_jax.data.sources import open_source
from tests import sources as tiny

BATCH = 4


def unchanged(example, rng):
    return example


def collate(examples):
    texts = [example.get("caption", example.get("question")) for example in examples]
    return pipeline.collate_images(examples) | {"text": np.array(texts, "U40")}


def part(name, share=1.0):
    view = View(8, min_scale=0.5, flip=True, count=1)
    return Part(Pictures(name, open_source(name), view), unchanged, share)


def batches(parts, **more):
    return pipeline.training_batches(parts, collate, BATCH, 7, **more)


def draw(iterator, count):
    return [next(iterator).batch for _ in range(count)]


@pytest.fixture(params=[*tiny.MAKERS, "mixture"])
def parts(request, tmp_path, own_cache):
    if request.param == "mixture":
        kinds = ("webdataset", "jsonl", "hf")
        return [part(tiny.MAKERS[kind](tmp_path / kind), share) for kind, share in zip(kinds, (5, 3, 2), strict=True)]
    return [part(tiny.MAKERS[request.param](tmp_path))]


def test_the_exact_next_hundred_batches(parts):
    whole = draw(batches(parts), 117)
    for stopped_after in (1, 16, 17):
        chex.assert_trees_all_equal(draw(batches(parts, start=stopped_after), 100), whole[stopped_after:][:100])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_epoch_is_exact_on_any_number_of_processes(parts, processes):
    """Also where that number changes in the midst of the epoch."""
    single = parts[:1]
    count = tiny.COUNT  # As many batches are as many epochs as a batch has rows.
    alone = np.concatenate([batch["image_id"] for batch in draw(batches(single), 3)])
    shares = [range(number * BATCH // processes, (number + 1) * BATCH // processes) for number in range(processes)]
    others = [draw(batches(single, rows=rows, start=3), count - 3) for rows in shares]
    together = [np.concatenate([batch["image_id"] for batch in several]) for several in zip(*others, strict=True)]
    seen = np.concatenate([alone, *together]).reshape(BATCH, count, 2)
    for epoch in seen:
        assert len({tuple(identity) for identity in epoch.tolist()}) == count
