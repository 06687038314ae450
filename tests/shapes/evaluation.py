"""Metrics: blip2_jax/evaluation; what looks at a whole task is with the tasks."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from blip2_jax.evaluation import baselines, batches, classification, retrieval, search, visdial
from blip2_jax.evaluation.retrieval import Found
from blip2_jax.parallel import mesh
from tests.shapes.lengths import B, E, P, Q, T, U, W
from tests.shapes.promises import Late, bool_, float16, float32, int32, int64, ran

RECALLS = dict.fromkeys(("r1", "r5", "r10"), float)
DIRECTIONS = dict.fromkeys(("text_to_image", "image_to_text"), RECALLS)
LOGITS = float32[B, 2], float32[B], 0.07
FOUND = Found(float32[T, 3], int32[T, 3])
GALLERY = retrieval.Gallery(["a"] * U, [0] * U, np.arange(T), T)

RETRIEVAL = [
    ran(retrieval.best, float32[T, U], 3, gives=FOUND),
    ran(retrieval.recalls, bool_[T, 3], gives=RECALLS),
    ran(retrieval.both_directions, GALLERY, FOUND, Found(float32[U, 3], int32[U, 3]), gives=DIRECTIONS),
    ran(retrieval.chance, GALLERY, gives=DIRECTIONS),
    *[ran(rule, *LOGITS, gives=float32[B]) for rule in retrieval.RULES.values()],
    ran(retrieval.rerank, FOUND, float32[T, 2], gives=FOUND),
    ran(
        retrieval.gallery,
        [["a", "b"], ["b"], ["a"]],
        gives=retrieval.Gallery([str] * 2, [int] * 2, int64[4], int),
    ),
    ran(retrieval.Gallery.right, GALLERY, int32[T, 3], int64[T, 1], gives=bool_[T, 3]),
    ran(retrieval.Gallery.counts, GALLERY, gives=(int64[T], int64[U])),
    ran(classification.class_features, float32[3 * T, W], 3, gives=float32[T, W]),
    ran(classification.accuracies, int32[B, 6], int64[B], gives={"top1": float, "top5": float}),
]

# Of eight rows on one device.
LAYOUT = Late(lambda _: batches.Layout(mesh.one_device(), 8))


def read(layout: batches.Layout) -> batches.Reading:
    """A pass over a source, every second of whose records could be used."""
    reading = batches.Reading(layout, None, None)
    reading.numbers = np.arange(0, B, 2)
    return reading


READING = LAYOUT.then(read)


def on_disk(_) -> search.RowsOnDisk:
    """Features of three batches."""
    rows = search.RowsOnDisk()
    for _ in range(3):
        rows.append(np.zeros((8, Q, E), np.float32))
    return rows


ON_DISK = Late(on_disk)

BATCHES = [
    ran(batches.Layout.rows.fget, LAYOUT, gives=int64[8]),
    ran(batches.Layout.place, LAYOUT, {"x": float32[8, T]}, gives={"x": float32[8, T]}),
    ran(batches.Layout.call, LAYOUT, lambda x: {"sum": jnp.sum(x, 0)}, float32[8, T], gives={"sum": float32[T]}),
    ran(
        batches.Layout.batches,
        *(LAYOUT, {"x": float32[B, T]}, ""),
        then=list,
        gives=[{"x": float32[8, T], "example_mask": bool_[8]}] * 3,
    ),
    ran(batches.Layout.run, LAYOUT, lambda x: jnp.sum(x, 0), float32[8, T], gives=float32[T]),
    ran(batches.Layout.own, LAYOUT, float32[8, T], gives=float32[8, T]),
    ran(batches.Layout.replicate, LAYOUT, float32[U, T], gives=float32[U, T]),
    ran(search.RowsOnDisk.append, ON_DISK, float32[8, Q, E], gives=None),
    ran(search.RowsOnDisk.__iter__, ON_DISK, then=list, gives=[float32[8, Q, E]] * 3),
    ran(
        search.search,
        *(LAYOUT, ON_DISK, np.arange(B), float32[U, E], 4),
        gives=(Found(float32[B, 4], int32[B, 4]), Found(float32[U, 4], int32[U, 4])),
    ),
    ran(batches.Reading.of_examples, READING, [float32[8, T]] * 3, gives=float32[B // 2, T]),
    ran(
        batches.in_batches,
        *(LAYOUT, lambda x, y: x[:, :, 0] + y[:, None], (float32[B, T, U], float32[B]), ""),
        gives=float32[B, T],
    ),
]


def known(rows: int, caption: str | type, category: str | type) -> baselines.Known:
    features = {"pooled": float32[rows, W], "by_token": float32[rows, P * W]}
    return baselines.Known(features, [caption] * rows, float32[rows, T], [category] * rows)


TEST, TRAIN = known(3, "a", "b"), known(5, "a", "b")
ACCURACY, RANDOM = {"question": {"accuracy": float}}, {"retrieval": DIRECTIONS}
BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
CAPTION = dict.fromkeys((*BLEU, "rouge_l", "cider", "exact_match", "token_f1"), float)
NEIGHBOUR = {"caption": CAPTION} | ACCURACY | RANDOM

BASELINES = [
    ran(baselines.pooled, float16[B, P, W], gives=float32[B, W]),
    ran(baselines.flattened, float16[B, P, W], gives=float32[B, P * W]),
    ran(baselines.unit, float32[B, P, W], gives=float32[B, P, W]),
    ran(baselines.join, [TEST, TRAIN], gives=known(8, str, str)),
    ran(baselines.nearest_neighbour, TEST, TRAIN, "pooled", gives=NEIGHBOUR),
    ran(baselines.majority, ["a", "b"], ["a"], gives=ACCURACY),
    ran(baselines.chance, ["a", "b", "a"], gives=RANDOM),
    ran(
        baselines.measure,
        *(TEST, TRAIN),
        gives={
            "nearest_neighbour_pooled": NEIGHBOUR,
            "nearest_neighbour_by_token": NEIGHBOUR,
            "chance": RANDOM,
            "majority": ACCURACY,
        },
    ),
]

RANKED = {"mrr": float, **RECALLS, "mean_rank": float}

DIALOGUES = [
    ran(visdial.ranks, float32[T, U], gives=int64[T, U]),
    ran(visdial.sparse, float32[T, U], np.zeros(T, int), gives=RANKED),
    ran(visdial.ndcg, float32[T, U], np.ones((T, U)), gives=float),
]

PROMISES = RETRIEVAL + BATCHES + BASELINES + DIALOGUES
