"""Where the time of a run goes."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

# What a run spends time on; "train" is all that is nothing else, since the host hardly ever sees the device at work.
PURPOSES = ("train", "data", "compile", "evaluate", "checkpoint", "profile")


class Work(NamedTuple):
    """What a step is.

    Attributes:
      images: in a step.
      chips: that share it.
      flops: analytic operations of a step.
      peak: operations a second of a chip by its datasheet; None: not known, and so is the share of it.
    """

    images: int
    chips: int
    flops: float
    peak: float | None


class Clock:
    """Seconds by purpose since it was made, and the pace of training since the last reading.

    The pace counts train and data alone: the first step compiles, which would spoil the average.
    """

    def __init__(self, work: Work, step: int = 0) -> None:
        """Nothing is measured yet of a run that goes on from `step`."""
        self._work = work
        self._began = time.perf_counter()
        self._spent = dict.fromkeys(PURPOSES[1:], 0.0)
        self._times: Counter[str] = Counter()
        self._done = self._read = step
        self._last = self.seconds()
        self._pace: dict[str, float] = {}

    @contextlib.contextmanager
    def measure(self, purpose: str, times: int = 1) -> Iterator[None]:
        """Add the duration of a with-block to a purpose other than "train".

        Args:
          purpose: one of PURPOSES.
          times: 0 where it belongs to what was measured before, so that means count both as one.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            self._spent[purpose] += time.perf_counter() - start
            self._times[purpose] += times

    def done(self, step: int, timed: bool = True) -> None:
        """All steps up to `step` are known to be done; if not `timed`, in time that counts for another purpose."""
        self._done = max(self._done, step)
        if not timed:
            self._read = self._done

    def seconds(self) -> dict[str, float]:
        """Seconds of each purpose."""
        return {"train": time.perf_counter() - self._began - sum(self._spent.values()), **self._spent}

    def reading(self, to_come: Mapping[str, int]) -> dict[str, float]:
        """Metrics under timing/: seconds of each purpose, and the pace of the steps since the last reading.

        Args:
          to_come: how many more times each purpose is due; what was never measured is taken to last no time.
        """
        seconds = self.seconds()
        values = {f"timing/{purpose}_seconds": spent for purpose, spent in seconds.items()}
        steps = self._done - self._read
        if not steps:  # What was read before a pause has counted the step of this row.
            return values | self._pace
        waited = seconds["data"] - self._last["data"]
        passed = max(seconds["train"] - self._last["train"] + waited, 1e-9)
        per_step, work = passed / steps, self._work
        means = {purpose: self._spent[purpose] / max(times, 1) for purpose, times in self._times.items()}
        means["train"] = per_step
        pace = {
            "timing/step_seconds": per_step,
            "timing/images_per_second": work.images / per_step,
            "timing/images_per_second_per_chip": work.images / per_step / work.chips,
            "timing/flops_per_second_per_chip": work.flops / per_step / work.chips,
            "timing/data_share": waited / passed,
            "timing/seconds_left": sum(means.get(purpose, 0.0) * times for purpose, times in to_come.items()),
        }
        if work.peak is not None:
            pace["timing/mfu"] = pace["timing/flops_per_second_per_chip"] / work.peak
        self._read, self._last, self._pace = self._done, seconds, pace
        return values | pace


def due(step: int, every: int, total: int) -> int:
    """How often something that is due every so many steps, and at the end, comes after `step`; 0: at the end alone."""
    if step >= total:
        return 0
    regular = (total // every - step // every) if every else 0
    return regular + bool(not every or total % every)


def totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds by purpose of a run, from the rows of its metrics.jsonl, over all the times that it was started."""
    sums: Counter[str] = Counter()
    last: dict[str, float] = {}
    for row in rows:
        now = {name: row.get(f"timing/{name}_seconds", 0.0) for name in PURPOSES}
        if any(now[name] < last.get(name, 0.0) for name in PURPOSES):  # Another process began from nothing.
            sums.update(last)
        last = now
    sums.update(last)
    return {name: sums[name] for name in PURPOSES}


def duration(seconds: float) -> str:
    """As a person reads it: 8.4 s, 3:25, 2:03:25, 4 d 2:03:25."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02d}:{rest:02d}" if hours or days else f"{minutes}:{rest:02d}"
    return f"{days} d {text}" if days else text


def summary(seconds: Mapping[str, float]) -> str:
    """One line about where the time went: what took none is left out."""
    total = sum(seconds.values())
    parts = [f"{name} {duration(spent)} ({spent / total:.0%})" for name, spent in seconds.items() if spent > 0]
    return f"{duration(total)} in all: {', '.join(parts)}"
