"""Being asked to stop: by a person (SIGINT), or by a cluster that takes the machine away (SIGTERM)."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import jax
from jax.experimental import multihost_utils


class Stopping:
    """While it is entered, signals ask for a stop; all processes of a run see it after the same step.

    Of several processes jax itself takes SIGTERM, wherever it arrives, and they agree on a step. A second SIGINT stops
    at once; a second SIGTERM does not, since clusters may send it to a process in more than one way.
    """

    def __init__(self) -> None:
        self.signal = signal.SIGTERM  # What asked; of another process it is known that it was this one.
        self._asked = False
        self._together = jax.process_count() > 1
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stopping:
        for number in (signal.SIGINT,) if self._together else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _frame: Any) -> None:
        if self._asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._asked:
            return
        print("\nstopping after this step; Ctrl-C once more stops at once", file=sys.stderr, flush=True)
        self._asked, self.signal = True, signal.Signals(number)
        if self._together:
            os.kill(os.getpid(), signal.SIGTERM)

    def asked(self, step: int) -> bool:
        """Whether to stop after this step; of several processes each has to ask after every step."""
        return multihost_utils.reached_preemption_sync_point(step) if self._together else self._asked
