"""Where the time of a run goes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict


class Clock:
    """Seconds by purpose (train, data, compile, evaluate, checkpoint), and the pace of training since the last reading.

    The pace counts train and data alone: the first step compiles, which would spoil the average.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._steps = 0
        self._since = time.perf_counter()
        self._other = 0.0

    @contextlib.contextmanager
    def measure(self, purpose: str):
        """Add the duration of a with-block to `purpose`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            duration = time.perf_counter() - start
            self.seconds[purpose] += duration
            if purpose not in ("train", "data"):
                self._other += duration

    def step(self) -> None:
        """One more training step is done."""
        self._steps += 1

    def pace(self, batch_size: int, devices: int, steps_left: int) -> dict[str, float]:
        """Timing metrics over the steps since the last call; empty if there were none."""
        now = time.perf_counter()
        if not self._steps:
            return {}
        per_step = max(now - self._since - self._other, 1e-9) / self._steps
        pace = {
            "timing/step_seconds": per_step,
            "timing/images_per_second": batch_size / per_step,
            "timing/images_per_second_per_chip": batch_size / per_step / devices,
            "timing/data_seconds": self.seconds["data"],
            "timing/seconds_left": per_step * steps_left,
        }
        self._steps, self._since, self._other = 0, now, 0.0
        return pace
