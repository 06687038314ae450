"""A corpus with every kind of bad record among the good ones: trained on to the end, and counted exactly."""

import collections
import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from blip2_jax import tasks, trainer
from blip2_jax.data.pipeline import training_batches
from blip2_jax.monitoring.metrics import read_metrics
from tests import tiny

EACH = 3  # Of every kind; of good ones as many as make them 5 % each.
STEPS, BATCH = 12, 8


def encoded(mode="RGB", size=(48, 40), kind="JPEG", **options):
    stream = io.BytesIO()
    Image.new(mode, size, options.pop("colour", None) or 0).save(stream, kind, **options)
    return stream.getvalue()


def bomb():
    """A PNG whose header promises 40,000 x 40,000 pixels."""
    chunk = lambda name, data: (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) & 0xFFFFFFFF)
    )
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def photo(seed=0):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 48, 3), np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


FRAMES = [Image.new("RGB", (48, 40), colour) for colour in ("red", "blue")]
PICTURES = {
    "unreadable": b"this is no picture",
    "truncated": photo()[:1500],
    "too_small": encoded(size=(16, 40)),
    "too_large": bomb(),
    "aspect": encoded(size=(400, 40)),
    "cmyk": encoded("CMYK"),
    "deep": encoded("I;16", kind="PNG"),
    "animated": encoded(kind="GIF", save_all=True, append_images=FRAMES),
}
CAPTIONS = {
    "caption_empty": b" \n",
    "caption_not_utf8": "une \u00e9cole".encode("latin-1"),
    "caption_length": b"so many words " * 20,
    "script": "собака на траве".encode(),
}
KINDS = [*PICTURES, *CAPTIONS, "caption_missing", "missing"]


@pytest.fixture
def corpus(tmp_path):
    """folder: with EACH of every kind; the name of a file says its kind."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(EACH):
        for kind in KINDS:
            image = folder / f"{kind}.{number}.jpg"
            if kind == "missing":
                os.symlink(folder / "nowhere", image)
            else:
                image.write_bytes(PICTURES.get(kind, photo(number)))
            if kind != "caption_missing":
                image.with_suffix(".txt").write_bytes(CAPTIONS.get(kind, b"a picture"))
    for number in range(EACH * 20 - EACH * len(KINDS)):
        (folder / f"good.{number}.jpg").write_bytes(photo(number))
        (folder / f"good.{number}.txt").write_text(f"picture {'abcdefghij'[number % 10]}")
    return f"folder:{folder}"


@pytest.fixture
def recipe(corpus, folder):
    tiny.recipe("stage1", folder)  # Makes the models.
    changes = {
        **{"vision": f"hf:{folder / 'vit'}", "image_size": 32, "data.train": corpus, "data.eval": ""},
        **{"data.feature_views": 0, "data.filters.max_words": 20, "data.filters.scripts": "latin"},
        **{"batch_size": BATCH, "total_steps": STEPS, "log_every": 1, "checkpoint_every": 5, "mesh": "data=8"},
    }
    return lambda **more: tiny.recipe("stage1", folder, **(changes | {"data.max_rejected": 0.95} | more))


def counts(row):
    return {name.rpartition("/")[2]: count for name, count in row.items() if name.startswith("data/rejected/")}


def test_training_goes_on_and_counts(recipe, own_cache, tmp_path):
    config, workdir = recipe(), tmp_path / "run"
    trainer.train(config, workdir)
    rows = read_metrics(workdir / "metrics.jsonl")
    assert rows[-1]["step"] == STEPS
    assert all(np.isfinite(row["loss"]) for row in rows)
    # What the batches of each step left out, made again by themselves.
    task = tasks.create(config)
    batches = training_batches(task.training_parts(), task.batches.collate, BATCH, config.seed)
    expected = collections.Counter()
    listed = []
    for row in rows:
        rejects = next(batches).rejects
        expected.update(reject["reason"] for reject in rejects)
        listed += [{"step": row["step"], **reject} for reject in rejects]
        assert counts(row) == expected
        assert row["data/rejected"] == expected.total()
    assert [json.loads(line) for line in (workdir / "rejects.jsonl").read_text().splitlines()] == listed
    for reject in listed:
        kind = reject["key"].partition(".")[0]
        assert reject["reason"] == kind, reject
    # An epoch and more was read, so every bad record was met at least once.
    met = {reject["key"] for reject in listed}
    assert len(met) == EACH * len(KINDS)


def test_a_resumed_run_counts_the_same(recipe, own_cache, tmp_path):
    trainer.train(recipe(), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        look = trainer.Run._look_at

        def stop(run, done, *rest, **more):
            look(run, done, *rest, **more)
            if done.number == 8:
                raise KeyboardInterrupt

        patch.setattr(trainer.Run, "_look_at", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(recipe(), tmp_path / "resumed")
    trainer.train(recipe(), tmp_path / "resumed")
    whole, resumed = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "resumed"))
    untimed = lambda row: {name: value for name, value in row.items() if not name.startswith("timing/")}
    assert [untimed(row) for row in resumed] == [untimed(row) for row in whole]
    texts = [(tmp_path / name / "rejects.jsonl").read_text() for name in ("whole", "resumed")]
    assert texts[0] == texts[1]


def test_too_many_end_the_run(recipe, own_cache, tmp_path, monkeypatch):
    monkeypatch.setattr("blip2_jax.monitoring.rejects._ENOUGH", 20)
    with pytest.raises(ValueError, match=r"records could not be used .* more than data.max_rejected = 0.3"):
        trainer.train(recipe(**{"data.max_rejected": 0.3}), tmp_path / "run")
