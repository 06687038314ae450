"""What a run says of where it runs."""

import re
import types

import jax
import pytest

from blip2_jax import environment


def test_it_names_versions_devices_and_room(tmp_path):
    lines = dict(line.split(": ", 1) for line in environment.report(tmp_path / "not" / "there").splitlines())
    assert f"jax {jax.__version__}," in lines["versions"]
    assert "Python 3." in lines["versions"]
    assert lines["devices"] == f"{jax.device_count()} x cpu (cpu)"
    assert lines["processes"] == f"this is number 0 of 1, with {jax.device_count()} of {jax.device_count()} devices"
    assert re.fullmatch(r".*, \d+ cores, [\d,]+ GiB", lines["host"])
    assert re.fullmatch(r".*/not/there, [\d,]+ GB free", lines["workdir"])
    assert lines["compiled programs"] == jax.config.jax_compilation_cache_dir
    assert "slice" not in lines


def chip(kind, slice_index, *coords):
    stats = lambda: {"bytes_limit": 16 * 2**30}
    return types.SimpleNamespace(
        platform="tpu", device_kind=kind, slice_index=slice_index, coords=coords, memory_stats=stats
    )


def test_a_tpu_is_described_by_its_slices(monkeypatch):
    chips = [chip("TPU v5 lite", number, x, y, 0) for number in range(2) for x in range(4) for y in range(2)]
    monkeypatch.setattr(jax, "devices", lambda: chips)
    monkeypatch.setattr(jax, "local_devices", lambda: chips[:4])
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    report = environment.report()
    assert "devices: 16 x TPU v5 lite (tpu), 16.0 GiB each" in report
    assert "slice: 2 of 4x2x1 chips" in report


@pytest.mark.parametrize("broken", ["devices", "process_index", "local_device_count"])
def test_it_never_fails(broken, monkeypatch):
    def fail():
        raise RuntimeError("no such\ndevice")

    monkeypatch.setattr(jax, broken, fail)
    report = environment.report()
    assert "unknown (RuntimeError: no such device)" in report
    assert "versions: Python" in report


def test_a_device_that_does_not_know_its_memory_is_still_named(monkeypatch):
    def refuse():
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")

    device = types.SimpleNamespace(platform="gpu", device_kind="H100", memory_stats=refuse)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert "devices: 1 x H100 (cpu)\n" in environment.report()
