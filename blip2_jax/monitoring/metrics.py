"""What a run measured: metrics.jsonl, one row a logged step, and TensorBoard events."""

from __future__ import annotations

import json
import math
import pathlib
import time
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from blip2_jax import files


class MetricsWriter:
    """Rows of {"step": ..., "loss": ...}; a resumed run continues behind its checkpoint, no step twice."""

    def __init__(self, workdir: pathlib.Path, resumed_at: int):
        """Open WORKDIR/metrics.jsonl and cut off the rows after step `resumed_at`."""
        self._file = workdir / "metrics.jsonl"
        rows = [row for row in read_metrics(self._file) if row["step"] <= resumed_at]
        files.write_text(self._file, "".join(json.dumps(row) + "\n" for row in rows))
        self._stream = self._file.open("a")
        # Not tensorboardX's SummaryWriter: its thread dies of a full disk, and the run then waits for it without end.
        folder = workdir / "tensorboard"
        folder.mkdir(exist_ok=True)
        self._events = EventsWriter(str(folder / "events"), filename_suffix=f".from_{resumed_at + 1}")
        restart = SessionLog(status=SessionLog.START)  # TensorBoard drops what it knows of this step and later ones.
        self._events.write_event(Event(wall_time=time.time(), step=resumed_at + 1, session_log=restart))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append a row; everything about a step must be in one call. JSON has no NaN and no infinity: they are null."""
        lost = lambda value: isinstance(value, float) and not math.isfinite(value)
        row = {"step": step} | {name: None if lost(value) else value for name, value in values.items()}
        self._stream.write(json.dumps(row, allow_nan=False) + "\n")
        self._stream.flush()
        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        ]
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        self._events.flush()

    def close(self) -> None:
        self._stream.close()
        self._events.close()


def read_metrics(file: pathlib.Path) -> list[dict[str, Any]]:
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
