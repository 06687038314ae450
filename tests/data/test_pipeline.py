"""Batches: deterministic, resumable, mixed as asked, and what the schema says."""

import io

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from blip2_jax import files
from blip2_jax.data import features, images, pipeline
from blip2_jax.data.features import View
from blip2_jax.data.pipeline import Pictures


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


PARTS = [
    pipeline.Part(Pictures(name, Squares(first), View(4, count=1)), lambda e, rng: e | {"luck": rng.random()}, share)
    for name, first, share in (("a", 0, 0.7), ("b", 100, 0.3))
]


def batches(seed, threads=0, parts=PARTS, rows=None):
    def collate(examples):
        numbers = {name: np.array([float(example[name]) for example in examples]) for name in ("key", "luck")}
        return pipeline.collate_images(examples) | numbers

    return iter(pipeline.training_batches(parts, collate, 5, seed, threads, rows))


def draw(iterator, count):
    return [next(iterator) for _ in range(count)]


@pytest.mark.parametrize("threads", [0, 2])
def test_a_restored_iterator_goes_on_with_the_exact_next_batch(threads):
    whole = draw(batches(1, threads), 12)
    first, second = batches(1, threads), batches(1, threads)
    draw(first, 5)
    second.set_state(first.get_state())
    chex.assert_trees_all_equal(draw(second, 7), whole[5:])


def test_processes_share_the_rows_of_the_same_batches():
    whole = draw(batches(1), 6)
    for rows in ([0, 1], [2, 3, 4], [1, 3]):
        expected = [{name: array[rows] for name, array in batch.items()} for batch in whole]
        own = batches(1, threads=2, rows=rows)
        chex.assert_trees_all_equal(draw(own, 2), expected[:2])
        again = batches(1, rows=rows)
        again.set_state(own.get_state())
        chex.assert_trees_all_equal(draw(again, 4), expected[2:])


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
    batches = list(pipeline.evaluation_batches(pictures, pipeline.collate_images, 4))
    assert [len(examples) for examples, _ in batches] == [4, 4, 2]
    assert batches[-1][1]["example_mask"].tolist() == [True, True, False, False]
    assert [e["key"] for examples, _ in batches for e in examples] == [str(i) for i in range(10)]
    assert all(e["caption"].startswith("caption") for examples, _ in batches for e in examples)


def test_a_batch_off_the_schema_is_an_error():
    schema = {"image": jax.ShapeDtypeStruct((2, 3), np.uint8), "mask": jax.ShapeDtypeStruct((2,), np.bool_)}
    pipeline.check_batch({"image": np.zeros((2, 3), np.uint8), "mask": np.ones(2, bool)}, schema)
    with pytest.raises(
        ValueError,
        match=r"extra: not in the schema; image: expected uint8\[2, 3\], found float32\[2, 3\]; mask: missing",
    ):
        pipeline.check_batch({"image": np.zeros((2, 3), np.float32), "extra": np.zeros(1)}, schema)


# Pictures.


def test_transparency_becomes_white_and_all_modes_become_rgb():
    for mode, colour in (
        ("RGBA", (255, 0, 0, 0)),
        ("LA", (0, 0)),
        ("P", 0),
        ("L", 255),
        ("CMYK", (0, 0, 0, 0)),
        ("1", 1),
    ):
        stream = io.BytesIO()
        image = Image.new(mode, (3, 3), colour)
        options = {"transparency": 0} if mode == "P" else {}
        image.save(stream, "TIFF" if mode == "CMYK" else "PNG", **options)
        assert np.asarray(images.decode(stream.getvalue())).tolist() == np.full((3, 3, 3), 255).tolist(), mode


def test_what_is_not_a_picture_is_an_error():
    with pytest.raises(ValueError, match=r"holiday\.jpg is not a picture"):
        images.decode(b"hello", "holiday.jpg")


def test_crops_stay_inside_and_vary():
    gradient = np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (60, 1, 3))
    image = Image.fromarray(gradient)
    crops = [images.random_resized_crop(image, 16, np.random.default_rng(i), 0.5, False) for i in range(30)]
    spans = [int(crop[0, -1, 0]) - int(crop[0, 0, 0]) for crop in crops]
    assert all(crop.shape == (16, 16, 3) for crop in crops)
    assert min(spans) < 60 < max(spans)
    flips = [images.random_resized_crop(image, 16, np.random.default_rng(i), 1.0, True)[0] for i in range(30)]
    assert {bool(f[0, 0] > f[-1, 0]) for f in flips} == {True, False}


# Image tokens computed before.


def encode(pictures):
    return pictures.astype(np.float32).mean((1, 2))[:, None, :] + np.arange(6, dtype=np.float32).reshape(1, 2, 3)


def compute(tmp_path, view=None, identity="encoder", encode=encode, shape=(2, 3)):
    return features.compute(Squares(), view or View(4), encode, shape, identity, tmp_path, "test")


def test_features_are_computed_once(tmp_path):
    table = compute(tmp_path)
    assert table.array.shape == (1, 10, 2, 3)
    np.testing.assert_allclose(table[0, 3], [[3, 1, 2], [6, 4, 5]])
    again = compute(tmp_path, encode=lambda pictures: pytest.fail("computed twice"))
    np.testing.assert_array_equal(again.array, table.array)
    other = compute(tmp_path, identity="other encoder", encode=lambda pictures: encode(pictures) + 1)
    assert (other.array != table.array).any()


def test_views_differ_and_are_the_same_every_time(tmp_path):
    view = View(4, min_scale=0.5, count=3)

    class Noise(Squares):
        def __getitem__(self, index):
            stream = io.BytesIO()
            pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(stream, "PNG")
            return {"key": str(index), "image": stream.getvalue(), "captions": [""]}

    first = features.compute(Noise(), view, encode, (2, 3), "e", tmp_path / "one", "test").array
    second = features.compute(Noise(), view, encode, (2, 3), "e", tmp_path / "two", "test").array
    np.testing.assert_array_equal(first, second)
    assert (first[0] != first[1]).any()


def test_a_failure_leaves_nothing_half_written(tmp_path):
    def fail(pictures):
        raise RuntimeError("no more power")

    with pytest.raises(RuntimeError):
        compute(tmp_path, encode=fail)
    assert not list((tmp_path / "features").iterdir())


def test_a_full_disk_is_known_before(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"no room for the image features.*BLIP2_JAX_CACHE"):
        compute(tmp_path)
