"""Batches of evaluation: every row is in its place on the mesh, and comes back from there."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from blip2_jax.data.features import View
from blip2_jax.data.pipeline import Pictures, collate_images
from blip2_jax.evaluation.batches import Layout, Reading, in_batches
from blip2_jax.parallel import mesh as meshes
from tests.data.test_pipeline import Faulty, Squares


@pytest.fixture(params=["data=1", "data=2,fsdp=2", "data=2,tensor=2"])
def layout(request):
    devices = 1 if request.param == "data=1" else 4
    return Layout(meshes.make_mesh(request.param, jax.devices()[:devices]), 4)


def test_rows_come_back_in_their_order_and_what_fills_up_does_not(layout, rng):
    x, y = rng.normal(size=(10, 3)).astype(np.float32), np.arange(10)
    found = in_batches(layout, jax.jit(lambda x, y: x * y[:, None]), (x, y), "test")
    np.testing.assert_array_equal(found, x * y[:, None].astype(np.float32))
    masks = [np.asarray(batch["example_mask"]).tolist() for batch in layout.batches({"x": x}, "test")]
    assert masks == [[True] * 4, [True] * 4, [True, True, False, False]]


def test_a_batch_is_computed_where_its_rows_lie(layout):
    shards = meshes.batch_shards(layout.mesh)
    placed = layout.place({"x": np.arange(4.0)})["x"]
    assert placed.sharding.shard_shape(placed.shape) == (4 // shards,)
    total, rows = layout.call(jax.jit(lambda x: (x.sum(), x + 1)), placed)
    assert (total, rows.tolist()) == (6.0, [1.0, 2.0, 3.0, 4.0])
    assert isinstance(rows, np.ndarray)
    tensor = layout.call(lambda: jnp.float32(jax.sharding.get_abstract_mesh().shape["tensor"]))
    assert tensor == layout.mesh.shape["tensor"]


def test_the_rows_of_a_process_are_those_it_brings(layout):
    batch = layout.place({"x": np.arange(8.0).reshape(4, 2)[layout.rows]})["x"]
    np.testing.assert_array_equal(
        layout.own(layout.run(jax.jit(lambda x: x + 1), batch)), np.arange(1.0, 9).reshape(4, 2)
    )
    assert layout.replicate(np.arange(3)).sharding.is_fully_replicated


@pytest.mark.parametrize(("source", "usable"), [(Squares, range(10)), (Faulty, [1, 2, 4, 5, 7, 8])])
def test_after_reading_all_is_known_of_what_can_be_used(layout, source, usable, capsys):
    reading = Reading(layout, Pictures("squares", source(), View(4)), collate_images)
    reds = [layout.call(lambda image: image[:, 0, 0, 0], batch["image"]) for _, batch in reading]
    assert reading.numbers.tolist() == list(usable)
    assert [example["key"] for example in reading.examples] == [str(number) for number in usable]
    assert all(set(example) == {"key", "caption", "captions"} for example in reading.examples)
    np.testing.assert_array_equal(reading.of_examples(reds), [*usable])
    told = capsys.readouterr().err
    assert [f"left out of squares: {number}: it ends early" in told for number in range(10)] == [
        number not in usable for number in range(10)
    ]


def test_a_source_without_records_is_an_error(layout):
    class Empty(Squares):
        def __len__(self):
            return 0

    with pytest.raises(ValueError, match="empty holds no record that can be used"):
        list(Reading(layout, Pictures("empty", Empty(), View(4)), collate_images))


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match=r"evaluation\.batch_size 6 does not divide over data x fsdp = 4 devices"):
        Layout(meshes.make_mesh("data=4", jax.devices()[:4]), 6)
