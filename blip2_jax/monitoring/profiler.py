"""Traces of some steps, for TensorBoard's profile plugin, XProf and Perfetto: WORKDIR/profile/STEP."""

from __future__ import annotations

import contextlib
import pathlib
import re
from collections.abc import Callable, Iterator

import jax

from blip2_jax.monitoring.progress import tell

STEPS_ON_DEMAND = 3


def parse_steps(text: str) -> range:
    """The steps that config.profile.steps names: "5:8" are 5, 6 and 7; "" is none.

    Raises:
      ValueError: it is no such range.
    """
    found = re.fullmatch(r"(\d+):(\d+)", text)
    if found and 0 < int(found[1]) < int(found[2]):
        return range(int(found[1]), int(found[2]))
    if text:
        raise ValueError(f"profile.steps = {text!r}: expected FIRST:END, such as 5:8 for the steps 5, 6 and 7; or ''")
    return range(0)


class Profiler:
    """Traces the steps of a configuration, and more when asked. What fails in it is told and never ends the run."""

    def __init__(
        self, folder: pathlib.Path, steps: range, wait: Callable[[], object], measure: Callable[[str], Iterator]
    ) -> None:
        """Nothing is traced yet.

        Args:
          folder: which gets a folder named by the first step for each trace.
          steps: to trace.
          wait: returns when the steps that were started are done, so that a trace holds whole steps and no others.
          measure: a clock's, to which the time that tracing itself takes is told.
        """
        self._folder, self._steps, self._wait, self._measure = folder, steps, wait, measure
        self._asked, self._end = False, 0  # The step before which the trace that runs ends; 0: none runs.

    def ask(self, *_: object) -> None:
        """Trace the next steps; of use as a handler of signals."""
        self._asked = True

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around all that belongs to a step; its number stands in the trace."""
        if not self._end and (self._asked or number in self._steps):
            end = self._steps.stop if number in self._steps else number + STEPS_ON_DEMAND
            self._asked = False
            with self._guard("starting a trace"), self._measure("profile"):
                self._wait()
                jax.profiler.start_trace(str(self._folder / str(number)))
                self._end = end
        with jax.profiler.StepTraceAnnotation("training step", step_num=number):
            yield
        if self._end and number + 1 >= self._end:
            self.close()

    def close(self) -> None:
        """End the trace that runs, if one does."""
        if not self._end:
            return
        self._end = 0
        with self._guard("writing a trace"), self._measure("profile"):
            self._wait()
            jax.profiler.stop_trace()
            tell(f"traced steps are in {self._folder}")

    @contextlib.contextmanager
    def _guard(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Whatever it is, the run is worth more than a look at it.
            tell(f"{what} failed, and the run goes on without it: {error}")
            self._steps = range(0)
