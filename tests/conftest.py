"""Options and fixtures of all tests."""

from __future__ import annotations

import contextlib
import importlib.metadata
import math
import os
import pathlib
import re
import signal
import tempfile

# Before jax starts: eight devices, so that meshes can be tested anywhere.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of what tests do: it takes a quarter of the time without what only makes programs faster. And
# devices that share few cores must come to a program's exchanges in one order, or they wait for each other for ever.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0 --xla_cpu_enable_concurrency_optimized_scheduler=false",
        # Later versions know no other way of fusing, and refuse flags that they do not know.
        *["--xla_cpu_use_fusion_emitters=false"] * importlib.metadata.version("jaxlib").startswith("0.10."),
        os.environ.get("XLA_FLAGS", ""),
    ]
)

import jax
import numpy as np
import pytest

from blip2_jax import trainer
from blip2_jax.parallel import processes as cluster
from tests import processes, tiny

jax.config.update("jax_num_cpu_devices", int(os.environ.get("JAX_NUM_CPU_DEVICES", 8)))
cluster.join(None)  # One of several, if `--processes` has started it.
# Runs that are resumed and repeated compile the same programs.
_compiled = tempfile.TemporaryDirectory(prefix="blip2_jax_compiled_", ignore_cleanup_errors=True)
jax.config.update("jax_compilation_cache_dir", _compiled.name)
# A shell that is no terminal's lets what it starts in the background, and all its children, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parity = parser.getgroup("parity", "comparison with the originals (tests/parity)")
    parity.addoption("--golden", default=str(pathlib.Path(__file__).parent / "golden"), help="folder of golden cases")
    parity.addoption("--mesh", default="", help='mesh of fake devices, such as "data=2,fsdp=2"; default one device')
    parity.addoption("--processes", default=1, type=int, help="run every test in so many processes that share the mesh")
    with contextlib.suppress(ValueError):  # Newer versions of pytest have an option of that name, which will do.
        parity.addoption(
            "--strict", action="store_true", help="what is not built yet, or has nothing to test, is a failure"
        )


def pytest_cmdline_main(config) -> int | None:
    """With --processes the session runs in so many processes at once; the first one shows what it does."""
    count, mesh = config.getoption("--processes"), config.getoption("--mesh")
    if count == 1:
        return None
    devices = math.prod(int(size) for size in re.findall(r"=(\d+)", mesh))
    if not mesh or devices % count:
        raise pytest.UsageError(f"--processes={count} needs a --mesh whose devices they share evenly, found {mesh!r}")
    arguments = [*config.invocation_params.args, "--processes=1"]
    ended = processes.run(["pytest", *arguments], count, devices, show_first=True, timeout=7200)
    failed = [(number, end) for number, end in enumerate(ended) if end.code]
    for number, end in failed:
        print(f"process {number} of {count} ended with {end.code}:\n{end.output[-3000:]}")
    return failed[0][1].code if failed else 0


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_programs():
    """Hundreds of small programs would fill the memory."""
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Where tiny models, pictures and finished runs of this session are."""
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture
def own_cache(folder, monkeypatch):
    """The cache of tiny things; without this fixture a test uses the user's, for the real models."""
    monkeypatch.setenv("BLIP2_JAX_CACHE", str(folder / "cache"))


@pytest.fixture(scope="session")
def t5(folder):
    """The source string of an encoder-decoder."""
    return f"hf:{tiny.t5(folder / 't5')}"


def _train(folder, stage, **changes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLIP2_JAX_CACHE", str(folder / "cache"))
        trainer.train(tiny.recipe(stage, folder, **changes), folder / stage)
    return folder / stage


@pytest.fixture(scope="session")
def stage1(folder):
    """A finished stage-1 workdir."""
    return _train(folder, "stage1")


@pytest.fixture(scope="session")
def stage2(folder, stage1):
    """A finished stage-2 workdir."""
    return _train(folder, "stage2", init=str(stage1))
