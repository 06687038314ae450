"""A cache of its own for every test of a source."""

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("BLIP2_JAX_CACHE", str(folder))
    return folder
