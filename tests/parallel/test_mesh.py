"""One mesh from one string."""

import jax
import pytest

from blip2_jax.parallel import mesh as meshes


@pytest.mark.parametrize(
    ("text", "sizes"),
    [("data=-1,fsdp=1,tensor=1", (8, 1, 1)), ("data=2,fsdp=-1", (2, 4, 1)), ("data=2,fsdp=2,tensor=2", (2, 2, 2))],
)
def test_sizes(text, sizes):
    mesh = meshes.make_mesh(text)
    assert tuple(mesh.shape.values()) == sizes
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize("text", ["data=3", "data=-1,fsdp=-1", "rows=8", "data", "data=0", "data=16"])
def test_a_mesh_that_does_not_fit_is_an_error(text):
    with pytest.raises(ValueError, match="mesh"):
        meshes.make_mesh(text)


def test_a_batch_that_does_not_divide_is_an_error():
    mesh = meshes.make_mesh("data=2,fsdp=4")
    meshes.check_batch_size(16, mesh)
    with pytest.raises(ValueError, match="batch_size 12 does not divide over data x fsdp = 8 devices"):
        meshes.check_batch_size(12, mesh)
