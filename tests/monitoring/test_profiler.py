"""Traces: of the steps that were asked for, by configuration or on demand, and without harm where they fail."""

import contextlib
import os
import signal

import jax
import jax.numpy as jnp
import pytest

from blip2_jax import trainer
from blip2_jax.monitoring.metrics import read_metrics
from blip2_jax.monitoring.profiler import Profiler, parse_steps
from tests import tiny


def traced(folder):
    """By first step, the numbers of the steps that a trace has."""
    found = {}
    for trace in folder.glob("*/plugins/profile/*/*.xplane.pb"):
        events = [
            event
            for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
            for line in plane.lines
            for event in line.events
            if event.name == "training step"
        ]
        found[trace.relative_to(folder).parts[0]] = sorted({dict(event.stats)["step_num"] for event in events})
    return found


def run(profiler, steps, ask_in=()):
    """Steps that do something; the ones in which someone asks for a trace."""
    work = jax.jit(lambda x: x @ x)
    for number in steps:
        with profiler.step(number):
            work(jnp.ones((8, 8))).block_until_ready()
            if number in ask_in:
                profiler.ask()
    profiler.close()


def profiler(folder, steps=""):
    return Profiler(folder, parse_steps(steps), lambda: None, lambda purpose: contextlib.nullcontext())


def test_the_steps_of_the_configuration_are_traced(tmp_path):
    run(profiler(tmp_path, "3:5"), range(1, 8))
    assert traced(tmp_path) == {"3": [3, 4]}


def test_three_steps_are_traced_on_demand_and_what_is_left_at_the_end(tmp_path):
    run(profiler(tmp_path), range(1, 9), ask_in=(2, 7))
    assert traced(tmp_path) == {"3": [3, 4, 5], "8": [8]}


def test_a_resumed_run_traces_what_is_left(tmp_path):
    run(profiler(tmp_path, "3:6"), range(5, 8))
    assert traced(tmp_path) == {"5": [5]}


def test_nothing_asked_for_is_nothing_traced(tmp_path):
    run(profiler(tmp_path / "profile"), range(1, 4))
    assert not (tmp_path / "profile").exists()


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_profiler_that_fails_ends_no_run(tmp_path, monkeypatch, capsys, broken):
    def fail(*_):
        raise RuntimeError("no profiler today")

    with monkeypatch.context() as patch:
        patch.setattr(jax.profiler, broken, fail)
        run(profiler(tmp_path, "2:4"), range(1, 6))
    assert capsys.readouterr().err.count("the run goes on without it: no profiler today") == 1
    if broken == "stop_trace":
        jax.profiler.stop_trace()
    run(profiler(tmp_path / "again", "2:3"), range(1, 4))
    assert traced(tmp_path / "again") == {"2": [2]}


@pytest.mark.parametrize("text", ["5", "5:5", "8:5", "0:3", "a:b", "1:2:3"])
def test_ranges_that_make_no_sense(text):
    with pytest.raises(ValueError, match=f"profile.steps = '{text}': expected FIRST:END"):
        parse_steps(text)


def test_a_run_is_watched(folder, own_cache, tmp_path, capsys):
    """Both ways of tracing, plain lines, clocks and MFU, in a run."""
    changes = {"data.eval": "", "total_steps": 7, "checkpoint_every": 4, "profile.steps": "2:3", "log_every": 1}
    watched = trainer.Run(tiny.recipe("stage1", folder, **changes), tmp_path)
    original = watched.step

    def step(state, *arguments):
        if int(state.step) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(state, *arguments)

    watched.step = step
    watched.train()
    assert traced(tmp_path / "profile") == {"2": [2], "5": [5, 6, 7]}
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    for row in rows[1:]:  # The first step compiles.
        assert row["timing/flops_per_second_per_chip"] > 0
        assert "timing/mfu" not in row  # What a CPU can do is not known.
    last = rows[-1]
    assert all(last[f"timing/{name}_seconds"] > 0 for name in ("train", "data", "compile", "checkpoint", "profile"))
    lines = capsys.readouterr().err.splitlines()
    logged = [line for line in lines if line.startswith("stage1 step ")]
    assert [line.partition(":")[0] for line in logged] == [f"stage1 step {n}/7" for n in range(1, 8)]
    for words in (
        "(itc",
        "itm accuracy positive",
        "temperature 0.07",
        "gradient norm",
        "images/s",
        "data wait",
        "left",
    ):
        assert words in logged[-1]
    assert any(" in all: train " in line and "compile" in line for line in lines[-3:])
