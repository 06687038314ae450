"""A lease: one holder, who has to renew it, and loses it when it does not."""

import threading
import time

import pytest

from blip2_jax import files, lease, workdir


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(lease, "PERIOD", 0.1)


def test_who_renews_it_keeps_it_and_gives_it_back(tmp_path):
    file = tmp_path / "run.lease"
    with lease.leased(file, "the first"):
        before = file.read_text()
        said = rf"{tmp_path} is in use by another run \(the first .*\): wait until it ends"
        with pytest.raises(BlockingIOError, match=said), lease.leased(file, "the second"):
            pass
        assert file.read_text() != before  # It was renewed meanwhile.
    assert not file.exists()
    with lease.leased(file, "the second"):
        assert file.read_text().startswith("the second ")


def test_who_is_gone_loses_it(tmp_path, capsys):
    """A run that was killed leaves its lease behind."""
    file = tmp_path / "run.lease"
    file.write_text("the dead 0123 17")
    began = time.monotonic()
    with lease.leased(file, "the heir"):
        assert time.monotonic() - began > lease.MISSED * lease.PERIOD
        assert file.read_text().startswith("the heir ")
    assert "waiting 0.4 s to see whether its holder is gone (the dead 0123 17)" in capsys.readouterr().err


def test_who_ends_while_another_waits_leaves_it_to_that_one(tmp_path):
    file = tmp_path / "run.lease"
    file.write_text("the first 0123 17")
    timer = threading.Timer(0.15, file.unlink)
    timer.start()
    with lease.leased(file, "the second"):
        assert file.read_text().startswith("the second ")


def test_of_two_at_once_the_last_to_write_has_it(tmp_path):
    file = tmp_path / "run.lease"
    timer = threading.Timer(0.01, lambda: file.write_text("the other 0123 0"))
    timer.start()
    with pytest.raises(BlockingIOError, match="the other"), lease.leased(file, "this one"):
        pass
    assert file.read_text() == "the other 0123 0"


def test_who_was_away_too_long_learns_that_it_has_lost_it(tmp_path, capsys):
    file, lost = tmp_path / "run.lease", threading.Event()
    with lease.leased(file, "the sleeper", lost.set):
        file.write_text("the heir 0123 0")
        assert lost.wait(5)
    assert "in use by another run (the heir 0123 0)" in capsys.readouterr().err
    assert file.read_text() == "the heir 0123 0"


def test_a_workdir_in_a_bucket_is_held_by_a_lease(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "in_object_store", lambda folder: True)
    with workdir.locked(tmp_path / "w"):
        assert (tmp_path / "w" / "run.lease").read_text().startswith("process ")
    assert not (tmp_path / "w").exists()
