"""Processes that share numbered pieces of work."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

Tell = Callable[[int], None]
Work = Callable[[int, Tell], None]

_SECONDS_BETWEEN_REPORTS = 0.1
_SECONDS_TO_STOP = 10


class Report(NamedTuple):
    """What a worker says.

    Attributes:
      steps: done since it spoke last.
      done: number of a piece of work that is done now, or None.
    """

    steps: int
    done: int | None = None


class _Reporter:
    """Sends steps on, now and then; raises BrokenPipeError when nobody listens any more."""

    def __init__(self, connection: Connection):
        self._connection, self._steps, self._last = connection, 0, 0.0

    def __call__(self, steps: int) -> None:
        self._steps += steps
        if time.monotonic() - self._last > _SECONDS_BETWEEN_REPORTS:
            self.send()

    def send(self, done: int | None = None) -> None:
        self._connection.send(Report(self._steps, done))
        self._steps, self._last = 0, time.monotonic()


def _work(work: Work, connection: Connection) -> None:
    """Do what comes through a connection, until nobody is at its other end: stopped, or killed."""
    tell = _Reporter(connection)
    try:
        while True:
            number = connection.recv()
            work(number, tell)
            tell.send(number)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except Exception as error:
        error.add_note(f"in a worker:\n{traceback.format_exc()}")
        connection.send(error)


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """Processes that start meanwhile ignore SIGINT and SIGTERM for good; they are told to stop by other means."""
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def share_out(work: Work, numbers: Iterable[int], count: int) -> Iterator[Report]:
    """Have every piece of work done by one of several processes; whoever leaves early closes this (contextlib.closing).

    Args:
      work: does the piece of a number, and calls the function that it is given with the steps it has done; that one
        raises BrokenPipeError when the work is to stop. It can be pickled.
      numbers: of the pieces, in the order in which they are begun.
      count: of processes, at most.

    Yields:
      What workers report, in no order.

    Raises:
      ChildProcessError: a worker died; and whatever `work` raises.
    """
    context, numbers = multiprocessing.get_context("spawn"), iter(numbers)
    workers: dict[Connection, Any] = {}
    try:
        for number in itertools.islice(numbers, count):
            here, there = context.Pipe()
            workers[here] = context.Process(target=_work, args=(work, there))
            with _signals_ignored():
                workers[here].start()
            there.close()
            here.send(number)
        while workers:
            for connection in wait(list(workers)):
                report = _receive(connection, workers[connection])
                yield report
                if report.done is None:
                    continue
                number = next(numbers, None)
                if number is None:
                    connection.close()
                    workers.pop(connection).join()
                else:
                    connection.send(number)
    finally:
        _stop(workers)


def _receive(connection: Connection, process: Any) -> Report:
    try:
        message = connection.recv()
    except (EOFError, ConnectionResetError) as error:
        process.join(_SECONDS_TO_STOP)
        raise ChildProcessError(
            f"a worker ended with exit code {process.exitcode} (-9: it was killed, as happens when memory runs out; "
            "fewer workers need less)"
        ) from error
    if isinstance(message, Exception):
        raise message
    return message


def _stop(workers: dict[Connection, Any]) -> None:
    """Leave: each worker notices at its next step, and cleans up what it had begun."""
    for connection in workers:
        connection.close()
    for process in workers.values():
        process.join(_SECONDS_TO_STOP)
        if process.is_alive():
            process.kill()
            process.join()
