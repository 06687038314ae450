"""Where the time goes, and how fast training is beside what is no training."""

import pytest

from blip2_jax.monitoring import clock


@pytest.fixture
def now(monkeypatch):
    """A time that stands still until it is moved: now[0] seconds."""
    time = [100.0]
    monkeypatch.setattr("blip2_jax.monitoring.clock.time.perf_counter", lambda: time[0])
    return time


def steps(watch, now, numbers, seconds, waited):
    for number in numbers:
        with watch.measure("data"):
            now[0] += waited
        now[0] += seconds - waited
        watch.done(number)
        watch.done(number - 1)  # Which is nothing new.


def test_the_pace_leaves_out_what_is_not_training(now):
    watch = clock.Clock(clock.Work(images=8, chips=2, flops=4e12, peak=10e12), step=40)
    with watch.measure("compile"):
        now[0] += 50
    watch.done(41, timed=False)
    steps(watch, now, range(42, 46), seconds=2, waited=0.5)
    for seconds in (90, 110):
        with watch.measure("evaluate"):
            now[0] += seconds
    with watch.measure("evaluate", times=0):
        now[0] += 10
    with watch.measure("checkpoint"):
        now[0] += 7
    row = watch.reading({"train": 10, "evaluate": 2, "checkpoint": 3})
    expected = {
        "train_seconds": 6,
        "data_seconds": 2,
        "compile_seconds": 50,
        "evaluate_seconds": 210,
        "checkpoint_seconds": 7,
        "profile_seconds": 0,
        "step_seconds": 2,
        "images_per_second": 4,
        "images_per_second_per_chip": 2,
        "flops_per_second_per_chip": 1e12,
        "mfu": 0.1,
        "data_share": 0.25,
        "seconds_left": 10 * 2 + 2 * 105 + 3 * 7,
    }
    assert row == pytest.approx({f"timing/{name}": value for name, value in expected.items()})


def test_each_reading_is_of_the_steps_since_the_last(now):
    watch = clock.Clock(clock.Work(images=8, chips=1, flops=1.0, peak=None))
    steps(watch, now, (1, 2), seconds=1, waited=0)
    first = watch.reading({})
    steps(watch, now, (3, 4), seconds=3, waited=3)
    second = watch.reading({"train": 2, "evaluate": 5})
    assert (first["timing/step_seconds"], second["timing/step_seconds"]) == pytest.approx((1, 3))
    assert (first["timing/data_share"], second["timing/data_share"]) == pytest.approx((0, 1))
    assert second["timing/seconds_left"] == pytest.approx(6)  # Of an evaluation nothing is known yet.
    assert "timing/mfu" not in second  # Nor is the peak.
    assert watch.reading({})["timing/step_seconds"] == second["timing/step_seconds"]  # Of no new step: the last one's.


@pytest.mark.parametrize(
    ("step", "every", "total", "times"),
    [(0, 0, 10, 1), (3, 2, 10, 4), (4, 2, 10, 3), (4, 3, 10, 3), (9, 3, 10, 1), (10, 3, 10, 0), (10, 0, 10, 0)],
)
def test_what_is_due_is_counted_as_the_loop_does_it(step, every, total, times):
    assert clock.due(step, every, total) == times
    assert times == sum(n == total or bool(every and n % every == 0) for n in range(step + 1, total + 1))


def test_totals_of_a_run_that_was_started_twice():
    names = ("train", "data", "compile", "evaluate", "checkpoint", "profile")
    row = lambda *seconds: {f"timing/{name}_seconds": s for name, s in zip(names, seconds, strict=True)}
    rows = [row(1, 0, 9, 0, 0, 0), row(5, 1, 9, 2, 3, 0), row(6, 0, 8, 0, 0, 0), row(8, 2, 8, 0, 1, 4)]
    assert clock.totals(rows) == dict(zip(names, (13, 3, 17, 2, 4, 4), strict=True))
    assert clock.totals([{"step": 1, "loss": 2.0}]) == dict.fromkeys(names, 0.0)


def test_a_summary_and_durations_are_for_people():
    text = clock.summary({"train": 90.0, "data": 0.0, "compile": 30.0})
    assert text == "2:00 in all: train 1:30 (75%), compile 30.0 s (25%)"
    durations = {8.44: "8.4 s", 205: "3:25", 7405: "2:03:25", 4 * 86400 + 7405: "4 d 2:03:25"}
    assert {seconds: clock.duration(seconds) for seconds in durations} == durations
