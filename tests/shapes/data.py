"""From pictures and texts to batches: blip2_jax/data."""

from __future__ import annotations

import functools
import io
import pathlib
from functools import partial

import numpy as np
from PIL import Image

from blip2_jax.data import features, images, pipeline, sources, text
from blip2_jax.data.features import FeaturePlan, FeatureTable, View
from blip2_jax.data.pipeline import Part, Pictures
from tests.shapes.lengths import B, K, N, P, S, T, V, W
from tests.shapes.promises import Late, bfloat16, bool_, float16, float32, int32, ran, uint8, uint32
from tests.shapes.tasks import STAGE1, prepare

WIDTH, HEIGHT = 40, 30


def encoded() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (WIDTH, HEIGHT)).save(stream, "PNG")
    return stream.getvalue()


def record(index: int) -> dict:
    return {"key": str(index), "image": encoded(), "captions": ["a", "b"]}


class Source(list):
    """N pictures."""

    identity = "shapes"


SOURCE = Source(map(record, range(N)))
CROPS = View(S, min_scale=0.5, flip=True, count=K)
PLAN, PLAN_OF_8_BITS = (
    FeaturePlan(SOURCE.identity, N, "zeros", CROPS, dtype, (P, W)) for dtype in ("float16", "float8")
)


def encode(images: np.ndarray) -> np.ndarray:
    return np.zeros((len(images), P, W), np.float32)


@functools.cache
def table(folder: pathlib.Path) -> FeatureTable:
    features.compute(SOURCE, PLAN, encode, folder / "features", "test", batch_size=3)
    return FeatureTable(PLAN, folder / "features")


TABLE = Late(table)
PIXELS, TOKENS = Pictures("pixels", SOURCE, View(S)), TABLE.then(partial(Pictures, "tokens", SOURCE, View(S)))
PICTURE = Late(lambda _: images.Picture(encoded()))
RNG = Late(lambda _: np.random.default_rng(0))
EXAMPLE, CAPTIONS = {"key": str, "caption": str, "image_id": uint32[2]}, {"captions": [str] * 2}


def batch(rows: int) -> dict:
    return {"image_embeds": float16[rows, P, W], "image_id": uint32[rows, 2], "example_mask": bool_[rows]}


PROMISES = [
    ran(images.decode, encoded(), then=np.asarray, gives=uint8[HEIGHT, WIDTH, 3]),
    ran(images.Picture.load, PICTURE, gives=uint8[HEIGHT, WIDTH, 3]),
    ran(images.Picture.square, PICTURE, (2, 3, 20, 25), S, gives=uint8[S, S, 3]),
    ran(images.resize, PICTURE, S, gives=uint8[S, S, 3]),
    ran(images.resize, PICTURE, S, "centre", gives=uint8[S, S, 3]),
    ran(images.random_resized_crop, PICTURE, S, RNG, 0.5, True, gives=uint8[S, S, 3]),
    ran(images.random_box, WIDTH, HEIGHT, RNG, 0.5, gives=(int, int, int, int)),
    ran(images.resample, uint8[HEIGHT, WIDTH, 3], (2, 3, 20, 25), S, gives=uint8[S, S, 3]),
    ran(text.pad, [[1, 2], [3], []], T, 0, gives=(int32[3, T], bool_[3, T])),
    ran(
        text.CaptionTokenizer.__call__,
        *(STAGE1.then(lambda task: task.caption_tokenizer), ["a red square", "a", "a"], T),
        gives=(int32[3, T], bool_[3, T]),
    ),
    ran(text.log_frequencies, int32[B, T], bool_[B, T], V, gives=float32[V]),
    ran(View.render, View(S), record(0), 0, 0, gives=uint8[S, S, 3]),
    ran(View.render, CROPS, record(0), 0, 1, gives=uint8[S, S, 3]),
    ran(FeatureTable.__getitem__, TABLE, (1, 2), gives=float16[P, W]),
    ran(FeaturePlan.pack, PLAN, float32[P, W], gives=bytes),
    ran(FeaturePlan.unpack, PLAN, bytes(2 * P * W), gives=float16[P, W]),
    ran(FeaturePlan.unpack, PLAN_OF_8_BITS, bytes(4 + P * W), gives=bfloat16[P, W]),
    ran(features.compute, SOURCE, PLAN, encode, Late(lambda folder: folder / "features"), "test", gives=None),
    ran(Pictures.image, PIXELS, record(0), 0, RNG, gives={"image": uint8[S, S, 3]}),
    ran(Pictures.image, TOKENS, record(0), 0, RNG, gives={"image_embeds": float16[P, W]}),
    ran(Pictures.example, PIXELS, 1, gives=EXAMPLE | CAPTIONS | {"image": uint8[S, S, 3]}),
    ran(Pictures.example, TOKENS, 1, RNG, gives=EXAMPLE | {"image_embeds": float16[P, W]}),
    ran(
        pipeline.collate_images,
        [{"image_embeds": float16[P, W], "image_id": uint32[2]}] * 3,
        gives=batch(3),
    ),
    ran(
        pipeline.training_batches,
        *(TOKENS.then(lambda pictures: [Part(pictures, prepare)]), pipeline.collate_images, 3, 0),
        then=lambda batches: next(batches).batch,
        gives=batch(3),
    ),
    # What is behind the last example is None; the batch is filled up.
    ran(
        pipeline.evaluation_batches,
        *(TOKENS, pipeline.collate_images, 7),
        then=next,
        gives=([EXAMPLE | CAPTIONS | {"image_embeds": float16[P, W]}] * N + [None] * (7 - N), batch(7)),
    ),
    ran(pipeline.check_batch, batch(3), batch(3), gives=None),
    ran(sources.identify, "text", "a", gives=uint32[2]),
]
