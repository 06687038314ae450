"""Topologies by name, and the roofline."""

import types

import pytest

from blip2_jax.parallel import chips, estimate
from blip2_jax.parallel.collectives import Collective


@pytest.mark.parametrize(
    ("text", "slices", "count", "shown"),
    [("v5e:16x16", 1, 256, "v5e:16x16"), ("v4:4x4x4", 1, 64, "v4:4x4x4"), ("v6e:4x4", 2, 32, "2 slices of v6e:4x4")],
)
def test_a_topology(text, slices, count, shown):
    topology = chips.parse_topology(text, slices)
    assert (topology.count, str(topology)) == (count, shown)


@pytest.mark.parametrize("text", ["v5e", "v5e:16", "v5e:4x4x4", "v4:4x4", "v9:4x4", "v5e:0x4", "v5e:4x-4", ""])
def test_what_is_no_topology(text):
    with pytest.raises(ValueError, match="expected CHIP:SIDES with CHIP one of v4, v5e, v5p, v6e"):
        chips.parse_topology(text)


def test_no_slices():
    with pytest.raises(ValueError, match="slices = 0"):
        chips.parse_topology("v5e:4x4", 0)


def grid(topology):
    """Devices in the order of their places, the last side fastest."""
    places = [()]
    for side in topology.sides:
        places = [(*place, index) for place in places for index in range(side)]
    return [types.SimpleNamespace(coords=place) for place in places]


def exchange(kind, sent, group, count=1, between=False):
    return Collective(kind, (), 0, sent, count, tuple(group), between, "")


@pytest.mark.parametrize(
    ("text", "group", "links"),
    [
        ("v5e:16x16", range(256), 4),  # Both dimensions, each a ring.
        ("v5e:16x16", range(16), 2),
        ("v5e:16x16", range(4), 1),  # A part of a ring is a line.
        ("v5e:8x8", range(8), 1),  # Sides below 16 are not closed to rings.
        ("v4:4x4x4", range(64), 6),
        ("v4:4x4x4", range(0, 64, 16), 2),
        ("v4:4x4x4", [5], 0),
    ],
)
def test_links(text, group, links):
    topology = chips.parse_topology(text)
    devices = grid(topology)
    assert estimate.links([devices[member].coords for member in group], topology) == links


def test_the_roofline():
    """197e12 operations take a second, 819e9 bytes of memory two, and exchanges what their wires need."""
    topology = chips.parse_topology("v5e:16x16", 2)
    exchanges = [
        exchange("all-reduce", 50e9, range(16)),  # Half a second on two links.
        exchange("collective-permute", 5e9, (0, 1), count=3),  # A tenth of a second each on one.
        exchange("all-reduce", 3.125e9, (), between=True),  # A second between slices.
        exchange("all-gather", 1e9, (7,)),  # With nobody.
    ]
    times = estimate.estimate(197e12, 2 * 819e9, exchanges, grid(topology), topology)
    assert times.by_name() == pytest.approx({"compute": 1.0, "memory": 2.0, "network": 0.8, "slices": 1.0})
    assert (times.seconds, times.bound) == (2.0, "memory")
    assert times.seconds_in_turn == pytest.approx(4.8)
