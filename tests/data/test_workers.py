"""Processes that share work: all of it done once, and every way to end early."""

import contextlib
import functools
import os
import pathlib
import time

import pytest

from blip2_jax.data import workers


def note(folder, number, tell):
    """Leave a file that says who did this."""
    for _ in range(10):
        tell(1)
    (folder / f"{number}.{os.getpid()}").touch()


def fail_at_three(number, tell):
    if number == 3:
        raise OSError("three is too much")


def die(number, tell):
    os._exit(7)


def never_end(folder, number, tell):
    (folder / f"begun_{number}").touch()
    try:
        while True:
            time.sleep(0.01)
            tell(1)
    except BrokenPipeError:
        (folder / f"stopped_{number}").touch()
        raise


def test_each_piece_is_done_once_and_all_steps_are_told(tmp_path):
    reports = list(workers.share_out(functools.partial(note, tmp_path), range(9), 2))
    assert sorted(report.done for report in reports if report.done is not None) == list(range(9))
    assert sum(report.steps for report in reports) == 90
    done = [file.name.split(".") for file in tmp_path.iterdir()]
    assert sorted(int(number) for number, _ in done) == list(range(9))
    assert os.getpid() not in {int(process) for _, process in done}


def test_nothing_to_do_needs_nobody():
    assert list(workers.share_out(die, [], 2)) == []


def test_an_error_comes_back_with_its_place():
    with pytest.raises(OSError, match="three is too much") as caught:
        list(workers.share_out(fail_at_three, range(9), 1))
    assert "in fail_at_three" in caught.value.__notes__[0]


def test_the_death_of_a_worker_is_an_error():
    with pytest.raises(ChildProcessError, match="exit code 7"):
        list(workers.share_out(die, range(3), 1))


def test_whoever_leaves_stops_the_work(tmp_path):
    with contextlib.closing(workers.share_out(functools.partial(never_end, tmp_path), range(5), 2)) as reports:
        while len(list(tmp_path.glob("begun_*"))) < 2:
            next(reports)
    assert sorted(file.name for file in tmp_path.glob("stopped_*")) == ["stopped_0", "stopped_1"]
    assert len(list(pathlib.Path(tmp_path).glob("begun_*"))) == 2
