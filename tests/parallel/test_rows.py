"""Where the rows of a batch lie, and what devices tell each other about them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from blip2_jax.parallel.rows import rows_of
from tests.meshes import MESHES, surrounding


@pytest.mark.parametrize(
    ("mesh", "batch", "axes"),
    [
        ("", 8, ()),
        ("data=2,fsdp=2,tensor=2", 8, ("data", "fsdp")),
        ("data=2,fsdp=2,tensor=2", 6, ("data",)),
        ("data=2,fsdp=2", 3, ()),
        ("data=1,tensor=2", 3, ("data", "fsdp")),
    ],
)
def test_rows_lie_over_the_axes_that_divide_them(mesh, batch, axes):
    with surrounding(mesh):
        assert rows_of(batch).axes == axes


@pytest.mark.parametrize("mesh", MESHES)
def test_what_devices_tell_each_other(mesh):
    x = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)
    with surrounding(mesh):
        rows = rows_of(16)
        own = 16 // rows.shards

        def device(x):
            assert x.shape == (own, 3)
            at = rows.index() * own + jnp.arange(own)
            back = rows.scatter_sum(rows.gather(x))
            return at, rows.gather(x), rows.sum(x.sum()), rows.max(x.max()), rows.min(x.min()), back

        whole = PartitionSpec()
        mapped = rows.map(device, (rows.spec,), (rows.spec, whole, whole, whole, whole, rows.spec))
        at, gathered, total, largest, smallest, back = jax.jit(mapped)(x)
    np.testing.assert_array_equal(at, np.arange(16))
    np.testing.assert_array_equal(gathered, x)
    assert (total, largest, smallest) == (x.sum(), x.max(), x.min())
    np.testing.assert_array_equal(back, x * rows.shards)


@pytest.mark.parametrize("mesh", MESHES)
def test_pieces_keep_rows_on_their_devices_and_come_together_again(mesh):
    x = np.arange(16 * 3).reshape(16, 3)
    with surrounding(mesh):
        rows = rows_of(16)
        pieces = jax.jit(lambda x: rows.pieces(x, 2))(x)
        np.testing.assert_array_equal(jax.jit(rows.whole)(pieces), x)
    assert pieces.shape == (2, 8, 3)
    # Piece 0 has the first half of each device's rows.
    own = 16 // rows.shards
    first = np.concatenate([x[start : start + own // 2] for start in range(0, 16, own)])
    np.testing.assert_array_equal(pieces[0], first)


def test_pieces_that_do_not_divide_are_an_error():
    with surrounding("data=4"), pytest.raises(ValueError, match="8 rows on 4 devices do not divide into 4 pieces"):
        rows_of(8).pieces(jnp.zeros((8, 2)), 4)
