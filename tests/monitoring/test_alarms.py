"""Alarms: each with rows that trip it, and with rows that just do not."""

import math

import pytest

from blip2_jax.monitoring import alarms, report
from blip2_jax.monitoring.alarms import Alarms, Thresholds
from blip2_jax.monitoring.metrics import MetricsWriter, read_metrics

BATCH, WARMUP, WINDOW = 16, 10, 4
THRESHOLDS = Thresholds(window=WINDOW)


def rows(count=WINDOW, first=12, every=2, **values):
    """Logged rows of a healthy run, with values that are numbers or functions of a row's number."""
    healthy = {"learning_rate": 1e-4, "gradient_norm": 0.7, "temperature": 0.07, "skipped_steps": 0}
    make = lambda value, number: value(number) if callable(value) else value
    return [
        {"step": first + every * n} | {name: make(value, n) for name, value in (healthy | values).items()}
        for n in range(count)
    ]


def held(logged):
    """The alarms that the last row has."""
    watch = Alarms(THRESHOLDS, BATCH, WARMUP)
    return [set(watch.add(row)) for row in logged][-1]


CONSTANT = 0.6365141682948128  # -(1/3) log(1/3) - (2/3) log(2/3).
INCREASE = "eval/jsonl:/a/b.jsonl/caption/shuffled_image_loss_increase"


@pytest.mark.parametrize(
    ("name", "trips", "just_not"),
    [
        ("itm_stuck", rows(loss_itm=CONSTANT + 0.0099), rows(loss_itm=CONSTANT + 0.0101)),
        ("itm_stuck", rows(loss_itm=CONSTANT - 0.0099), rows(loss_itm=CONSTANT - 0.0101)),
        ("itm_stuck", rows(loss_itm=lambda n: (0.61, 0.66)[n % 2]), rows(loss_itm=lambda n: 0.6 if n == 1 else 0.637)),
        ("itm_stuck", rows(loss_itm=0.637), rows(loss_itm=lambda n: 0.667 - 0.02 * n)),  # Only on its way.
        ("itm_stuck", rows(loss_itm=0.637), rows(loss_itm=0.637, count=WINDOW - 1)),
        ("itm_stuck", rows(loss_itm=0.637), rows(loss_itm=0.637, first=10)),  # The first row is of the warm-up.
        ("itm_stuck", rows(loss_itm=0.637), rows(loss_itm=lambda n: None if n == 2 else 0.637)),
        # Where half of the rows have no negatives, one pair in two is true.
        (
            "itm_stuck",
            rows(loss_itm=math.log(2), itm_rows_without_negative=BATCH // 2),
            rows(loss_itm=CONSTANT, itm_rows_without_negative=BATCH // 2),
        ),
        ("itc_at_chance", rows(loss_itc=math.log(BATCH) - 0.049), rows(loss_itc=math.log(BATCH) - 0.051)),
        ("itc_at_chance", rows(loss_itc=9.0), rows(loss_itc=lambda n: 2.0 if n == 3 else 9.0)),
        ("temperature", rows(temperature=0.001), rows(temperature=0.00101)),
        ("temperature", rows(temperature=0.5), rows(temperature=0.499)),
        ("temperature", rows(temperature=-0.1), rows(temperature=None)),
        ("ignores_image", rows(**{INCREASE: 0.049}), rows(**{INCREASE: 0.05})),
        ("ignores_image", [*rows(1, **{INCREASE: 0.0}), *rows(9, 14)], rows(**{INCREASE: None})),  # Until the next one.
        ("no_gradient", rows(gradient_norm=0.0), rows(gradient_norm=1e-9)),
        ("queries_collapsed", rows(query_cosine=0.981), rows(query_cosine=0.98)),
        ("no_learning_rate", rows(2, learning_rate=0.0), rows(1, learning_rate=0.0)),
        ("no_learning_rate", rows(9, learning_rate=0.0), rows(9, learning_rate=lambda n: 1e-9 if n == 1 else 0.0)),
        # Two steps a row, of the window's last four: one in four is skipped, none of those before.
        ("skipped_steps", rows(skipped_steps=lambda n: max(n - 2, 0)), rows(skipped_steps=5)),
        ("skipped_steps", rows(skipped_steps=lambda n: n), rows(skipped_steps=lambda n: min(2 * n, 4))),
    ],
)
def test_an_alarm_holds_where_it_should_and_just_not_elsewhere(name, trips, just_not):
    assert held(trips) == {f"alarm/{name}"}
    assert held(just_not) == set()


def test_the_alarm_that_hangs_on_time_is_under_timing():
    assert held(rows(3, **{"timing/data_share": 0.31})) == {"timing/alarm/data_wait"}
    assert held(rows(3, **{"timing/data_share": 0.3})) == set()
    assert held(rows(2, **{"timing/data_share": 0.9})) == set()
    assert held(rows(9, **{"timing/data_share": lambda n: 0.1 if n == 7 else 0.9})) == set()


def test_every_detector_is_tested():
    cases = test_an_alarm_holds_where_it_should_and_just_not_elsewhere.pytestmark[0].args[1]
    assert {f"alarm/{name}" for name, *_ in cases} | {"timing/alarm/data_wait"} == alarms.DETECTORS.keys()


def test_a_few_pairs_in_a_batch_and_none_wrong():
    assert alarms.constant_answer_loss(8, 0) == pytest.approx(0.6365, abs=1e-4)
    assert alarms.constant_answer_loss(8, 4) == pytest.approx(math.log(2))
    assert alarms.constant_answer_loss(8, 8) == 0


def test_an_alarm_is_told_when_it_begins_and_when_it_ends(capsys):
    watch = Alarms(THRESHOLDS, BATCH, WARMUP)
    logged = rows(7, temperature=lambda n: 0.6 if 2 <= n < 5 else 0.07)
    found = [watch.add(row) for row in logged]
    assert found == [{"alarm/temperature": 1} if 2 <= n < 5 else {} for n in range(7)]
    begin, end = capsys.readouterr().err.splitlines()
    assert begin.startswith("ALARM temperature at step 16: temperature is 0.6. ")
    assert "optimizer.learning_rate" in begin
    assert end == "ALARM temperature ended at step 22"


def written(workdir, logged, stops=()):
    """Rows of a metrics.jsonl, the writer and the alarms made anew where a run stopped, steps done again included."""
    workdir.mkdir()
    writer = MetricsWriter(workdir, 0)
    watch, number, stops = Alarms(THRESHOLDS, BATCH, WARMUP), 0, list(stops)
    while number < len(logged):
        row = logged[number]
        writer.write(row["step"], row | watch.add(row))
        number += 1
        if stops and number == stops[0][0]:
            _, number = stops.pop(0)
            writer.close()
            writer = MetricsWriter(workdir, logged[number - 1]["step"] if number else 0)
            watch = Alarms(THRESHOLDS, BATCH, WARMUP, writer.rows)
    writer.close()
    return read_metrics(workdir / "metrics.jsonl")


def test_resumed_alarms_are_those_of_a_run_that_never_stopped(tmp_path, capsys):
    """Stopped in the middle of windows, behind steps that are done again, and while alarms hold."""
    logged = rows(
        16,
        first=2,
        loss_itm=lambda n: float("nan") if n == 3 else 0.2 if n == 11 else 0.637,
        loss_itc=lambda n: 2.9 if n < 10 else 1.0,
        skipped_steps=lambda n: max(n - 11, 0),
        gradient_norm=lambda n: float(n != 13),
        learning_rate=lambda n: 0.0 if n > 8 else 1e-4,
        **{INCREASE: lambda n: 0.01 if n == 6 else None},
    )
    one = written(tmp_path / "one", logged)
    capsys.readouterr()
    assert written(tmp_path / "two", logged, [(1, 0), (7, 5), (10, 9), (13, 11), (15, 15)]) == one
    names = {name.removeprefix("alarm/") for row in one for name in row if name.startswith("alarm/")}
    assert names == {"itm_stuck", "itc_at_chance", "skipped_steps", "no_gradient", "ignores_image"}
    assert "goes on from step" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 1}, r"alarms.window = 1: expected a whole number of rows, 2 or more"),
        ({"window": 2.5}, r"alarms.window = 2.5"),
        ({"itm_margin": -1.0}, r"alarms.itm_margin = -1.0: expected a number from 0 on"),
        ({"data_share": "0.3"}, r"alarms.data_share = '0.3'"),
        ({"temperature_low": 0.6}, r"alarms.temperature_low = 0.6: expected less than alarms.temperature_high = 0.5"),
    ],
)
def test_thresholds_that_make_no_sense(changes, message):
    with pytest.raises(ValueError, match=message):
        Thresholds(**(alarms.block().to_dict() | changes))


def test_the_report_has_what_holds_on_top_and_names_what_ended():
    logged = [{"step": n, "alarm/itm_stuck": 1} for n in (2, 4)] + [{"step": 6}]
    logged += [{"step": n, "alarm/itm_stuck": 1, "timing/alarm/data_wait": 1} for n in (8, 10)]
    assert alarms.spans(logged) == {"alarm/itm_stuck": [(2, 4), (8, 10)], "timing/alarm/data_wait": [(8, 10)]}
    html = report.alarms_held(logged)
    assert html.index('class="alarms"') < html.index("itm stuck</b> since step 8") < html.index("Alarms that ended")
    assert "itm stuck (steps 2 to 4)" in html
    assert "data wait</b> since step 8" in html
    assert "<code>python -m blip2_jax.data preview</code>" in html
    assert 'class="alarms"' not in report.alarms_held(logged[:3])
