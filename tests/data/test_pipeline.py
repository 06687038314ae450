"""Batches: deterministic, resumable, mixed as asked, and what the schema says."""

import io
import os
import pathlib
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from blip2_jax.data import pipeline
from blip2_jax.data.features import View
from blip2_jax.data.pipeline import Pictures
from blip2_jax.data.records import BadRecord


class Squares:
    """Ten pictures of one colour each."""

    identity = "squares"

    def __init__(self, first=0):
        self.first = first

    def __len__(self):
        return 10

    def __getitem__(self, index):
        stream = io.BytesIO()
        Image.new("RGB", (12, 8), (self.first + index, 0, 0)).save(stream, "PNG")
        return {"key": f"{self.first + index}", "image": stream.getvalue(), "captions": [f"caption {index}", "other"]}


def lucky(example, rng):
    return example | {"luck": rng.random()}


PARTS = [
    pipeline.Part(Pictures(name, Squares(first), View(4, count=1)), lucky, share)
    for name, first, share in (("a", 0, 0.7), ("b", 100, 0.3))
]


def collate(examples):
    numbers = {name: np.array([float(example[name]) for example in examples]) for name in ("key", "luck")}
    return pipeline.collate_images(examples) | numbers


def batches(seed, threads=0, parts=PARTS, **more):
    return pipeline.training_batches(parts, collate, 5, seed, threads=threads, **more)


def draw(iterator, count):
    return [next(iterator).batch for _ in range(count)]


@pytest.mark.parametrize(("threads", "workers"), [(0, 0), (2, 0), (1, 2), (1, 3)])
def test_the_exact_next_batch_however_batches_are_made(threads, workers):
    whole = draw(batches(1), 12)
    chex.assert_trees_all_equal(draw(batches(1, threads, start=5, workers=workers), 7), whole[5:])


def test_processes_share_the_rows_of_the_same_batches():
    whole = draw(batches(1), 6)
    for rows in ([0, 1], [2, 3, 4], [1, 3]):
        expected = [{name: array[rows] for name, array in batch.items()} for batch in whole]
        chex.assert_trees_all_equal(draw(batches(1, threads=2, rows=rows), 2), expected[:2])
        chex.assert_trees_all_equal(draw(batches(1, rows=rows, start=2), 4), expected[2:])


def test_a_process_reads_only_its_own_rows():
    read = []

    class Watched(Squares):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    parts = [pipeline.Part(Pictures("a", Watched(), View(4, count=1)), lambda e, rng: e | {"luck": 0.0})]
    keys = [key for batch in draw(batches(0, parts=parts, rows=[1, 4]), 3) for key in batch["key"]]
    assert read == keys


def test_the_seed_decides_the_order():
    one, same, other = (draw(batches(seed), 4) for seed in (1, 1, 2))
    chex.assert_trees_all_equal(one, same)
    assert any((a["key"] != b["key"]).any() for a, b in zip(one, other, strict=True))


def test_every_epoch_shows_each_record_once_in_another_order():
    keys = np.concatenate([batch["key"] for batch in draw(batches(0, parts=PARTS[:1]), 4)])
    assert sorted(keys[:10]) == sorted(keys[10:]) == list(range(10))
    assert keys[:10].tolist() != keys[10:].tolist()


def test_shares_of_rows():
    keys = np.concatenate([batch["key"] for batch in draw(batches(0), 80)])
    assert (keys >= 100).mean() == pytest.approx(0.3, abs=0.02)


def test_evaluation_shows_everything_once_in_order_and_masks_the_rest():
    pictures = Pictures("a", Squares(), View(4))
    found, batches = zip(*pipeline.evaluation_batches(pictures, pipeline.collate_images, 4), strict=True)
    assert [batch["example_mask"].tolist() for batch in batches] == [[True] * 4, [True] * 4, [True, True, False, False]]
    assert [example["key"] for examples in found for example in examples if example] == [str(i) for i in range(10)]
    assert found[-1][2:] == [None, None]
    assert (batches[-1]["image"][2:] == batches[0]["image"][0]).all()


@pytest.mark.parametrize("rows", [[0, 1], [2, 3], [1]])
def test_evaluation_of_some_rows_is_those_of_all(rows):
    """Also where the last batch, or one that holds nothing usable, has none of them."""
    pictures = Pictures("a", Faulty(), View(4))
    whole = list(pipeline.evaluation_batches(pictures, pipeline.collate_images, 4))
    some = list(pipeline.evaluation_batches(pictures, pipeline.collate_images, 4, rows))
    assert len(some) == len(whole) == 3
    for (own, batch), (everything, expected) in zip(some, whole, strict=True):
        assert list(map(str, own)) == [str(everything[row]) for row in rows]
        for name in expected:
            np.testing.assert_array_equal(batch[name], expected[name][rows])
    assert [isinstance(one, BadRecord) for one in whole[0][0]] == [True, False, False, True]
    assert whole[0][1]["example_mask"].tolist() == [False, True, True, False]


def test_a_batch_off_the_schema_is_an_error():
    schema = {"image": jax.ShapeDtypeStruct((2, 3), np.uint8), "mask": jax.ShapeDtypeStruct((2,), np.bool_)}
    pipeline.check_batch({"image": np.zeros((2, 3), np.uint8), "mask": np.ones(2, bool)}, schema)
    with pytest.raises(
        ValueError,
        match=r"extra: not in the schema; image: expected uint8\[2, 3\], found float32\[2, 3\]; mask: missing",
    ):
        pipeline.check_batch({"image": np.zeros((2, 3), np.float32), "extra": np.zeros(1)}, schema)


class Faulty(Squares):
    """Every third picture cannot be used."""

    def __getitem__(self, index):
        if index % 3 == 0:
            raise BadRecord("truncated", f"{self.first + index}", "it ends early")
        return super().__getitem__(index)


def test_what_cannot_be_used_leaves_its_place_to_another():
    parts = [pipeline.Part(Pictures("faulty", Faulty(), View(4, count=1)), lucky)]
    made = [next(iterator) for iterator in [batches(0, parts=parts)] for _ in range(40)]
    keys = np.concatenate([delivery.batch["key"] for delivery in made])
    assert len(keys) == 200
    assert not (keys % 3 == 0).any()
    rejects = [reject for delivery in made for reject in delivery.rejects]
    assert {"source": "faulty", "key": "3", "reason": "truncated", "detail": "it ends early"} in rejects
    # Four of ten are met in every one of the 20 epochs, and now and then by those that take a place.
    assert len(rejects) >= 80
    assert len(rejects) == pytest.approx(80 / 0.6, rel=0.2)
    # However batches are made, and from wherever.
    later = batches(0, threads=1, parts=parts, workers=2, start=35)
    assert [next(later).rejects for _ in range(5)] == [delivery.rejects for delivery in made[35:]]
    halves = [batches(0, parts=parts, rows=rows) for rows in ([0, 1, 2], [3, 4])]
    for delivery in made[:10]:
        assert [reject for half in halves for reject in next(half).rejects] == delivery.rejects


def test_a_source_of_which_nothing_can_be_used_is_an_error():
    class Useless(Squares):
        def __getitem__(self, index):
            raise BadRecord("missing", str(index), "no such file")

    parts = [pipeline.Part(Pictures("useless", Useless(), View(4, count=1)), lucky)]
    with pytest.raises(ValueError, match=r"useless: 100 records in a row cannot be used, the last one: .*no such file"):
        next(batches(0, parts=parts))


def test_other_data_than_a_run_began_with():
    known = pipeline.order_identity(PARTS)
    pipeline.check_order(known, pipeline.order_identity(PARTS))
    grown = Squares()
    grown.identity = "more squares"
    others = [PARTS[0], pipeline.Part(Pictures("b", grown, View(4, count=1)), lucky, 0.3)]
    with pytest.raises(ValueError, match="not those it began with:\n  b: 10 records then, 10 now\n"):
        pipeline.check_order(known, pipeline.order_identity(others))


STARTED = """
import time
from tests.data import test_pipeline

if __name__ == "__main__":
    made = test_pipeline.batches(0, 1, workers=2)
    next(made)
    print("made", flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="processes are looked up in /proc")
def test_workers_end_with_a_killed_run(tmp_path):
    """They would keep its memory for ever."""
    script = tmp_path / "run.py"
    script.write_text(STARTED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, env=environment, text=True)
    assert process.stdout.readline() == "made\n"
    of_threads = pathlib.Path(f"/proc/{process.pid}/task").glob("*/children")
    children = [child for file in of_threads for child in file.read_text().split()]
    process.kill()
    process.wait()
    assert len(children) >= 2
    for _ in range(300):
        if not any(pathlib.Path("/proc", child).exists() for child in children):
            return
        time.sleep(0.1)
    raise AssertionError("a worker is still there half a minute after its run was killed")
