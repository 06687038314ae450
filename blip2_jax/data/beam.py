"""Apache Beam has pieces of work done, on this machine or on any cluster that it knows."""

from __future__ import annotations

import functools
import importlib.util
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from blip2_jax.data.workers import Report, Work

_SECONDS_BETWEEN_LOOKS = 1.0
# There are no triggers here; only, without it the DirectRunner first tries to download another runner.
_STAY_HERE = "--allow_unsafe_triggers"


def require_beam() -> None:
    """Raise ImportError, and say what helps, if Beam is not installed."""
    if importlib.util.find_spec("apache_beam") is None:
        raise ImportError("this engine is Apache Beam, which is not installed: pip install 'blip2_jax[beam]'")


def _do(work: Work, number: int) -> None:
    work(number, lambda steps: None)


class _Pipeline(threading.Thread):
    """A pipeline that runs while others look at what it has done."""

    def __init__(self, work: Work, numbers: Sequence[int], flags: Sequence[str]):
        super().__init__(daemon=True)
        self._work, self._numbers, self._flags = work, numbers, flags
        self._running: Any = None
        self.error: Exception | None = None

    def run(self) -> None:
        logging.getLogger().setLevel(logging.ERROR)  # Beam tells of optional packages that it does not find.
        try:
            import apache_beam as beam
            from apache_beam.options.pipeline_options import PipelineOptions

            pipeline = beam.Pipeline(options=PipelineOptions(self._flags))
            # Reshuffled, or one worker would get them all.
            numbers = pipeline | beam.Create(self._numbers) | beam.Reshuffle()
            _ = numbers | beam.Map(functools.partial(_do, self._work))
            self._running = pipeline.run()
            self._running.wait_until_finish()
        except Exception as error:  # Beam raises what it likes.
            self.error = error

    def stop(self) -> None:
        """A cluster would go on by itself."""
        if self.is_alive() and self._running is not None:
            self._running.cancel()


def share_out(
    work: Work,
    numbers: Sequence[int],
    *,
    is_done: Callable[[int], bool],
    runner: str,
    workers: int,
    flags: Sequence[str] = (),
) -> Iterator[Report]:
    """What `workers.share_out` does, by Beam.

    Args:
      work: as there; what comes of it must be seen from here and from where Beam's workers are.
      numbers: of the pieces.
      is_done: whether a piece is done, since runners do not say so before the end.
      runner: one of Beam's; DirectRunner is this machine.
      workers: processes on this machine; other runners have flags of their own for it.
      flags: further ones of Beam.

    Raises:
      ImportError: Beam is not installed.
      ChildProcessError: a piece failed, or could not be begun.
    """
    require_beam()
    if not numbers:
        return
    chosen = [
        f"--runner={runner}",
        f"--direct_num_workers={workers}",
        f"--direct_running_mode={'multi_processing' if workers > 1 else 'in_memory'}",
        "--default_sdk_harness_log_level=ERROR",
        _STAY_HERE,
    ]
    pipeline = _Pipeline(work, numbers, [*chosen, *flags])
    pipeline.start()
    waiting, ended = list(numbers), False
    try:
        while not ended:
            ended = not pipeline.is_alive()  # Before looking, so that nothing is missed.
            for number in [number for number in waiting if is_done(number)]:
                waiting.remove(number)
                yield Report(0, number)
            pipeline.join(_SECONDS_BETWEEN_LOOKS)
    finally:
        pipeline.stop()
    if pipeline.error:
        said = str(pipeline.error).strip().splitlines()
        raise ChildProcessError(f"Beam's {runner} failed: {said[-1]}") from pipeline.error
    if waiting:
        raise ChildProcessError(
            f"Beam's {runner} ended, but {len(waiting)} of {len(numbers)} shards are not to be seen here: its workers "
            "must write to a folder that they share with this machine"
        )
