"""One mesh from one string, and the batch on it."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

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


def test_every_piece_of_a_batch_must_divide():
    mesh = meshes.make_mesh("data=2,fsdp=4")
    meshes.check_batch_size(32, mesh, 4)
    with pytest.raises(ValueError, match=r"batch_size 24 gives each of .* devices 3 rows: expected a multiple of 2"):
        meshes.check_batch_size(24, mesh, 2)
    with pytest.raises(ValueError, match="a multiple of 0"):
        meshes.check_batch_size(24, mesh, 0)


def test_a_batch_is_whole_on_one_process_and_divided_over_its_devices():
    mesh = meshes.make_mesh("data=2,fsdp=2,tensor=2")
    assert meshes.own_rows(8, mesh).tolist() == list(range(8))
    batch = {"ids": np.arange(24, dtype=np.int32).reshape(8, 3), "mask": np.arange(8) < 5}
    placed = meshes.global_batch(batch, 8, mesh)
    for name, array in placed.items():
        assert array.sharding == meshes.batch_sharding(mesh)
        np.testing.assert_array_equal(array, batch[name])
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, batch[name][shard.index])
    with pytest.raises(ValueError, match="ids has 4 rows, but the devices of this process need 8"):
        meshes.global_batch({"ids": batch["ids"][:4]}, 8, mesh)


class Elsewhere:
    """The devices of one process among several, as a sharding tells of them."""

    def __init__(self, sharding, devices):
        self._sharding, self._devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        everywhere = self._sharding.devices_indices_map(shape)
        return {device: everywhere[device] for device in self._devices}


@pytest.mark.parametrize(
    ("mesh", "rows"),
    [
        ("data=8", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("data=4,tensor=2", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("data=2,tensor=4", [[0, 1, 2, 3]] * 2 + [[4, 5, 6, 7]] * 2),
        ("fsdp=4,tensor=2", [[0, 1], [2, 3], [4, 5], [6, 7]]),
    ],
)
def test_a_process_needs_the_rows_of_its_devices(mesh, rows, monkeypatch):
    """Four processes of two devices; those that share rows, since tensor crosses processes, both make them."""
    mesh = meshes.make_mesh(mesh)
    sharding = meshes.batch_sharding(mesh)
    for process, expected in enumerate(rows):
        devices = list(mesh.devices.flat)[2 * process : 2 * process + 2]
        with monkeypatch.context() as patch:
            patch.setattr(meshes, "batch_sharding", lambda mesh, devices=devices: Elsewhere(sharding, devices))
            assert meshes.own_rows(8, mesh).tolist() == expected


# Several slices.


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU as a mesh asks for."""

    id: int
    slice_index: int
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v4"
    process_index: int = 0


def pod(slices: int, chips: int) -> list[Chip]:
    """Slices of `chips` in a row, their devices in an order that says nothing."""
    devices = [Chip(s * chips + x, s, (x, 0, 0)) for s in range(slices) for x in range(chips)]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]


@pytest.mark.parametrize(("text", "shape"), [("data=-1,fsdp=4", (2, 4, 1)), ("data=4,fsdp=2", (4, 2, 1))])
def test_data_goes_over_the_slower_network_first(text, shape):
    mesh = meshes.make_mesh(text, pod(slices=2, chips=4))
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.axis_types) == {AxisType.Auto}
    index = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
    half = shape[0] // 2
    assert (index[:half] == 0).all()
    assert (index[half:] == 1).all()
    assert len({chip.id for chip in mesh.devices.flat}) == 8


def test_data_must_divide_by_the_slices():
    with pytest.raises(ValueError, match=r"data = 1 does not divide by the 2 slices of 4 chips each: make it a mult"):
        meshes.make_mesh("fsdp=8", pod(slices=2, chips=4))
    with pytest.raises(ValueError, match=r"equally many chips, found \{0: 4, 1: 3\}"):
        meshes.count_slices(sorted(pod(slices=2, chips=4), key=lambda chip: chip.id)[:7])


def test_slices_count_on_tpus_alone():
    """Elsewhere a host may call itself a slice, though fsdp across hosts is nothing unusual."""
    devices = [dataclasses.replace(chip, platform="gpu") for chip in pod(slices=2, chips=4)]
    assert meshes.count_slices(devices) == 1
    assert meshes.count_slices(pod(slices=3, chips=2)) == 3
