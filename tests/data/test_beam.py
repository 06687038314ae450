"""Beam's own runner on this machine writes what the local engine writes."""

import functools
import importlib.util
import signal

import pytest

from blip2_jax.data import __main__ as command
from blip2_jax.data import beam

installed = importlib.util.find_spec("apache_beam") is not None
needs_beam = pytest.mark.skipif(not installed, reason="apache-beam is not installed: pip install 'blip2_jax[beam]'")


@pytest.fixture(autouse=True)
def signals():
    """Keep the handlers that the command replaces."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


def write(folder, *more):
    arguments = ["--source=nano:val_drawing", f"--output={folder}", "--shards=3", "--shuffle", "--resize=48"]
    command.main(["prepare", *arguments, *more])
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "corpus.json"}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    handler = signal.getsignal(signal.SIGTERM)
    found = write(tmp_path_factory.mktemp("local") / "corpus")
    signal.signal(signal.SIGTERM, handler)
    return found


@needs_beam
@pytest.mark.parametrize("workers", [1, 2])
def test_shards_are_those_of_the_local_engine(local, tmp_path, workers):
    by_beam = write(tmp_path / "corpus", "--engine=beam", f"--workers={workers}", "--", "--job_name=shards")
    assert by_beam == local
    assert len([name for name in local if name.endswith(".arrayrecord")]) == 3


@needs_beam
def test_missing_shards_alone_are_written(local, tmp_path):
    folder = tmp_path / "corpus"
    write(folder, "--engine=beam", "--workers=1")
    (folder / "00001-of-00003.json").unlink()
    before = {file.name: file.stat().st_mtime_ns for file in folder.glob("0*")}
    assert write(folder, "--engine=beam", "--workers=1") == local
    after = {file.name: file.stat().st_mtime_ns for file in folder.glob("0*")}
    assert {name for name in after if after[name] != before.get(name)} == {
        "00001-of-00003.arrayrecord",
        "00001-of-00003.json",
    }


def fails(number, tell):
    raise OSError(f"piece {number} is too much")


def forgets(number, tell):
    pass


@needs_beam
def test_what_goes_wrong_in_a_worker_is_an_error_here():
    share_out = functools.partial(beam.share_out, is_done=lambda number: False, runner="DirectRunner", workers=1)
    with pytest.raises(ChildProcessError, match=r"DirectRunner failed: .*piece 0 is too much"):
        list(share_out(fails, [0]))
    with pytest.raises(ChildProcessError, match="2 of 2 shards are not to be seen here"):
        list(share_out(forgets, [0, 1]))
    with pytest.raises(ChildProcessError, match="NoRunner failed"):
        list(beam.share_out(forgets, [0], is_done=lambda number: True, runner="NoRunner", workers=1))


def test_without_beam_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"error: .*pip install 'blip2_jax\[beam\]'"):
        write(tmp_path / "corpus", "--engine=beam")
    assert not (tmp_path / "corpus").exists()
