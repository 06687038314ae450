"""What a run measured: metrics.jsonl, one row a logged step, and from there TensorBoard and Weights & Biases."""

from __future__ import annotations

import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from blip2_jax import files

Row = dict[str, Any]

# The name of what an evaluation found: of which source, and what. A source may be a path with slashes.
EVALUATION = r"eval/(.+?)/((?:retrieval|classification|caption|question)/.+|loss_\w+)"


class Sink(Protocol):
    """What else is told of rows."""

    def write(self, row: Row) -> None:
        """Take the finite numbers of a row."""

    def close(self) -> None:
        """Nothing follows."""


class MetricsWriter:
    """Rows of {"step": ..., "loss": ...}; a resumed run continues behind its checkpoint, no step twice.

    Attributes:
      rows: those that were there when it was opened.
    """

    def __init__(self, workdir: pathlib.Path, resumed_at: int, open_more: Callable[[], Sink] | None = None):
        """Open WORKDIR/metrics.jsonl and cut off the rows after step `resumed_at`.

        Args:
          workdir: of the run.
          resumed_at: the step that it goes on from.
          open_more: opens what is told of rows beside TensorBoard, and is then told of the rows that are already there.
        """
        file = workdir / "metrics.jsonl"
        self.rows = [row for row in read_metrics(file) if row["step"] <= resumed_at]
        self._lines = files.Appender(file, until(file, resumed_at))
        self._sinks: list[Sink] = [TensorBoard(workdir / "tensorboard", resumed_at)]
        if open_more:
            self._sinks.append(open_more())
            for row in self.rows:
                self._sinks[-1].write(_finite(row))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Append a row; everything about a step must be in one call. JSON has no NaN and no infinity: they are null."""
        row = without_lost({"step": step} | dict(values))
        self._lines.append(json.dumps(row, allow_nan=False))
        for sink in self._sinks:
            sink.write(_finite(row))

    def close(self) -> None:
        self._lines.close()
        for sink in self._sinks:
            sink.close()


class TensorBoard:
    """Events in a folder."""

    def __init__(self, folder: pathlib.Path, resumed_at: int):
        """Go on behind step `resumed_at`."""
        folder.mkdir(exist_ok=True)
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and the run then waits for it without end.
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".from_{resumed_at + 1}")
        restart = SessionLog(status=SessionLog.START)  # TensorBoard drops what it knows of this step and later ones.
        self._events.write_event(Event(wall_time=time.time(), step=resumed_at + 1, session_log=restart))

    def write(self, row: Row) -> None:
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step"]
        self._events.write_event(Event(wall_time=time.time(), step=row["step"], summary=Summary(value=scalars)))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def without_lost(row: Mapping[str, Any]) -> Row:
    """A row as metrics.jsonl has it: None for what is not finite."""
    lost = lambda value: isinstance(value, float) and not math.isfinite(value)
    return {name: None if lost(value) else value for name, value in row.items()}


def _finite(row: Row) -> Row:
    """The numbers of a row."""
    return {name: value for name, value in row.items() if isinstance(value, (int, float))}


def read_metrics(file: pathlib.Path) -> list[Row]:
    """The rows of a metrics.jsonl, None for what was not finite; a last line that a kill cut short is left out."""
    if not file.exists():
        return []
    rows = []
    for line in file.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


def until(file: pathlib.Path, step: int) -> str:
    """The lines of a file of rows up to a step."""
    return "".join(json.dumps(row) + "\n" for row in read_metrics(file) if row["step"] <= step)
