"""Options and fixtures of all tests."""

from __future__ import annotations

import os
import tempfile

# Before jax starts: eight devices, so that meshes can be tested anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Runs that are resumed and repeated compile the same programs.
jax.config.update("jax_compilation_cache_dir", tempfile.mkdtemp(prefix="blip2_jax_compiled_"))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
