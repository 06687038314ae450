"""Tells what every thread is doing when a run stands still."""

from __future__ import annotations

import faulthandler
import sys
import threading

_GRACE = 1.0  # Second, in which the sentence goes before the stacks.


class Watchdog:
    """Prints the stacks of all threads when no step has ended for some minutes, and again after as many.

    Python's own timer prints them, which needs no Python to run: a thread that hangs may hold the interpreter.
    """

    def __init__(self, minutes: float):
        """Watch from now on; 0 minutes: never."""
        self._seconds = minutes * 60
        self._step = 0
        self._moved, self._closed = threading.Event(), False
        # Not sys.stderr, which all processes of a run but the first have turned away.
        self._stream = sys.__stderr__
        if self._seconds:
            self._arm()
            self._thread = threading.Thread(target=self._tell, name="watchdog", daemon=True)
            self._thread.start()

    def step(self, number: int) -> None:
        """A step has ended."""
        self._step = number
        if self._seconds:
            self._arm()
            self._moved.set()

    def close(self) -> None:
        """Watch no longer."""
        if self._seconds and not self._closed:
            faulthandler.cancel_dump_traceback_later()
            self._closed = True
            self._moved.set()
            self._thread.join()

    def _arm(self) -> None:
        faulthandler.dump_traceback_later(self._seconds + _GRACE, repeat=True, file=self._stream)

    def _tell(self) -> None:
        while not self._closed:
            if not self._moved.wait(self._seconds):
                minutes = f"{self._seconds / 60:g} minutes"
                sentence = f"\nno step has ended for {minutes}, the last one was {self._step}; what every thread does:"
                print(sentence, file=self._stream, flush=True)
                self._moved.wait()
            self._moved.clear()
