"""Image tokens computed before: once, exactly, restartably, and never those of another encoder."""

import io
import json

import ml_dtypes
import numpy as np
import pytest
from PIL import Image

from blip2_jax import files
from blip2_jax.data import features
from blip2_jax.data.features import FeaturePlan, FeatureTable, View
from blip2_jax.data.records import BadRecord

SHAPE = (2, 3)


class Noise:
    """Ten pictures, of which number 4 ends early."""

    identity = "noise"

    def __len__(self):
        return 10

    def __getitem__(self, index):
        if index == 4:
            raise BadRecord("truncated", "4", "it ends early")
        stream = io.BytesIO()
        pixels = np.random.default_rng(index).integers(0, 255, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(stream, "PNG")
        return {"key": str(index), "image": stream.getvalue(), "captions": [""]}


def encode(pictures):
    return pictures.astype(np.float32).mean((1, 2))[:, None, :] + np.arange(6, dtype=np.float32).reshape(1, 2, 3)


def plan(view=None, encoder="encoder", dtype="float32"):
    return FeaturePlan("noise", 10, encoder, view or View(4), dtype, SHAPE)


def table(root, which=None, encode=encode, **more):
    which = which or plan()
    features.compute(Noise(), which, encode, root, "test", batch_size=4, **more)
    return FeatureTable(which, root)


def never(_pictures):
    pytest.fail("encoded twice")


def test_tokens_are_computed_once(tmp_path):
    found = table(tmp_path)
    picture = View(4).render(Noise()[3], 3, 0)
    np.testing.assert_array_equal(found[0, 3], encode(picture[None])[0])
    np.testing.assert_array_equal(table(tmp_path, encode=never)[0, 9], found[0, 9])
    assert json.loads((plan().folder(tmp_path) / "features.json").read_text()) == plan().facts


def test_views_differ_and_are_the_same_every_time(tmp_path):
    view = View(4, min_scale=0.5, count=3)
    first, second = (table(tmp_path / name, plan(view)) for name in ("one", "two"))
    assert first.views == 3
    for index in (0, 5, 9):
        np.testing.assert_array_equal(first[2, index], second[2, index])
        assert (first[0, index] != first[1, index]).any()
        np.testing.assert_array_equal(first[1, index], encode(view.render(Noise()[index], index, 1)[None])[0])


def test_a_picture_that_could_not_be_used_stays_so(tmp_path):
    found = table(tmp_path, plan(View(4, count=2)))
    with pytest.raises(BadRecord, match=r"4: it ends early \(truncated\)"):
        found[1, 4]


@pytest.mark.parametrize(
    ("dtype", "read", "error"),
    [("float32", np.float32, 0), ("float16", np.float16, 2**-11), ("bfloat16", ml_dtypes.bfloat16, 2**-8)],
)
def test_tokens_are_exact_within_their_dtype(dtype, read, error, tmp_path):
    exact, stored = table(tmp_path), table(tmp_path, plan(dtype=dtype))
    assert stored[0, 2].dtype == features.batch_dtype(dtype) == read
    np.testing.assert_allclose(stored[0, 2].astype(np.float32), exact[0, 2], rtol=error)


@pytest.mark.parametrize("size", [1e-20, 1.0, 3e4])
def test_float8_errs_by_a_sixteenth(size, rng):
    tokens = rng.normal(size=SHAPE).astype(np.float32) * size
    eight = plan(dtype="float8")
    stored = eight.pack(tokens)
    assert len(stored) == eight.record_bytes == 6 + 4
    found = eight.unpack(stored)
    assert found.dtype == features.batch_dtype("float8") == ml_dtypes.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), tokens, rtol=2**-4 + 2**-8, atol=np.abs(tokens).max() * 2**-9)
    assert not eight.unpack(eight.pack(np.zeros(SHAPE, np.float32))).any()


def test_another_encoder_is_an_error(tmp_path):
    table(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="of other ones than this run's:\n  encoder: 'encoder' there, 'other' in"
    ):
        FeatureTable(plan(encoder="other"), tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no image tokens of this source: run cache_features"):
        FeatureTable(plan(), tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"feature_dtype = 'int4': expected one of float32, float16, bfloat16"):
        plan(dtype="int4")


def test_files_that_are_there_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "_SHARD_BYTES", 100)
    which = plan(View(4, count=2))
    shards = which.shards(tmp_path)
    assert len(shards) == 5
    calls = []

    def fails_later(pictures):
        calls.append(len(pictures))
        if len(calls) == 3:
            raise RuntimeError("no more power")
        return encode(pictures)

    with pytest.raises(RuntimeError):
        table(tmp_path, which, fails_later)
    assert [file.exists() for file in shards] == [True, True, False, False, False]
    assert not list(which.folder(tmp_path).glob("*partial*"))
    with pytest.raises(FileNotFoundError, match="lacks 3 of its files, the first 00002-of-00005"):
        FeatureTable(which, tmp_path)
    # Two processes share the rest.
    features.compute(Noise(), which, encode, tmp_path, "test", batch_size=4, own=slice(1, None, 2))
    assert [file.exists() for file in shards] == [True, True, False, True, False]
    whole = table(tmp_path, which, own=slice(0, None, 2))
    monkeypatch.undo()
    expected = table(tmp_path / "at once", which)
    for view, index in ((0, 0), (0, 9), (1, 3), (1, 9)):
        np.testing.assert_array_equal(whole[view, index], expected[view, index])


def test_a_full_disk_is_known_before(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match=r"no room for the image features.*BLIP2_JAX_CACHE"):
        table(tmp_path)
    assert not list(tmp_path.iterdir())
