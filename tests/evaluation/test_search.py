"""Search in blocks finds what all similarities at once would, on any mesh, with equal scores in order."""

import contextlib

import jax
import numpy as np
import pytest

from blip2_jax.evaluation import retrieval
from blip2_jax.evaluation.batches import Layout
from blip2_jax.evaluation.search import RowsOnDisk, search
from blip2_jax.parallel import mesh as meshes

BATCH, QUERIES, WIDTH = 8, 3, 4


def features(rng, *shape):
    """Few different values, so that many similarities are equal."""
    x = rng.integers(-1, 2, (*shape, WIDTH)).astype(np.float32)
    return x / 2  # Products of such numbers are exact.


@pytest.mark.parametrize("mesh", ["data=1", "data=2,fsdp=2,tensor=2"])
@pytest.mark.parametrize(("keep", "block"), [(10, 7), (3, 64), (200, 16)])
def test_the_best_are_those_of_all_similarities(rng, mesh, keep, block):
    devices = 1 if mesh == "data=1" else 8
    layout = Layout(meshes.make_mesh(mesh, jax.devices()[:devices]), BATCH)
    batches, texts = features(rng, 4, BATCH, QUERIES), features(rng, 37)
    numbers = np.setdiff1d(np.arange(30), [0, 9, 17])  # Records that cannot be used, and a short last batch.
    with contextlib.closing(RowsOnDisk()) as images:
        for batch in batches:
            images.append(batch[layout.rows])
        of_images, of_texts = search(layout, images, numbers, texts, keep, block)
    scores = np.einsum("iqe,te->itq", batches.reshape(-1, QUERIES, WIDTH)[numbers], texts).max(-1)
    assert len(np.unique(scores)) < 20
    for found, expected in ((of_images, retrieval.best(scores, keep)), (of_texts, retrieval.best(scores.T, keep))):
        np.testing.assert_array_equal(found.index, expected.index)
        np.testing.assert_array_equal(found.scores, expected.scores)


def test_rows_on_disk_come_back_as_often_as_they_are_asked_for(rng):
    arrays = rng.normal(size=(5, 3, 2)).astype(np.float32)
    with contextlib.closing(RowsOnDisk()) as rows:
        for array in arrays:
            rows.append(array)
        assert len(rows) == 5
        for _ in range(2):
            np.testing.assert_array_equal(np.stack(list(rows)), arrays)
        with pytest.raises(ValueError, match=r"expected an array float32\(3, 2\), found float64\(3, 2\)"):
            rows.append(arrays[0].astype(np.float64))
