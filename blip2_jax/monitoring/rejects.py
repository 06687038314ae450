"""Records that could not be used: rejects.jsonl, their numbers for the metrics, and the limit past which a run ends."""

from __future__ import annotations

import json
import pathlib
from collections import Counter
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from blip2_jax import files
from blip2_jax.data.records import REASONS
from blip2_jax.monitoring.metrics import until
from blip2_jax.parallel import processes

_ENOUGH = 1000  # Records, before a share of them says something.


class Rejects:
    """Counts what the batches of finished steps left out; each process has a file of its own."""

    def __init__(self, workdir: pathlib.Path, step: int, limit: float, known: Mapping[str, int]):
        """Open WORKDIR/rejects.jsonl, without its rows after `step`.

        Args:
          workdir: of the run; process n > 0 writes rejects-n.jsonl.
          step: at which the run goes on.
          limit: share of the records read past which the run ends.
          known: rejects by reason up to that step, of all processes.
        """
        number, count = jax.process_index(), jax.process_count()
        names = ["rejects.jsonl", *(f"rejects-{other}.jsonl" for other in range(1, count))]
        self._file = workdir / names[number]
        # There may have been more processes before, whose files nobody else cuts back.
        for file in set(workdir.glob("rejects-*.jsonl")) if number == 0 else ():
            if file.name not in names:
                files.write_text(file, until(file, step))
        self._lines = files.Appender(self._file, until(self._file, step))
        self._limit, self._known, self._own = limit, Counter(known), Counter()

    def add(self, step: int, rejects: Sequence[Mapping[str, str]]) -> None:
        """What the batch of a finished step left out."""
        for reject in rejects:
            self._lines.append(json.dumps({"step": step, **reject}))
            self._own[reject["reason"]] += 1

    def by_reason(self) -> dict[str, int]:
        """Their numbers since the run began, of all processes, which have to ask together."""
        own = np.array([self._own[reason] for reason in REASONS])
        total = dict(zip(REASONS, processes.add_up(own).tolist(), strict=True))
        return {reason: count + self._known[reason] for reason, count in total.items() if count + self._known[reason]}

    def check(self, rejected: Mapping[str, int], used: int) -> None:
        """Raise ValueError if too many are rejected, by reason, beside `used` examples."""
        total = sum(rejected.values())
        if used + total >= _ENOUGH and total > self._limit * (used + total):
            raise ValueError(
                f"{total:,} of {used + total:,} records could not be used ({rejected}), more than data.max_rejected = "
                f"{self._limit}: see {self._file}; mend the data, or allow more"
            )

    def close(self) -> None:
        self._lines.close()
