"""A corpus in a folder of its own: begun, taken up again, finished, and described.

00003-of-00016.arrayrecord   records, for the source arrayrecord:FOLDER/*.arrayrecord
00003-of-00016.json          what is known of them, and that they are all there
corpus.json                  where it comes from: source, settings, counts, versions
statistics.json              counts and quantiles
rejects.jsonl                a line for each record that was left out, and why
contact_sheet.jpg            some of its images
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import functools
import glob
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Iterator, Sequence

from blip2_jax import __version__, files
from blip2_jax.data import contact_sheet, shards
from blip2_jax.data.prepare import Plan, facts_file, read_facts, write_shard
from blip2_jax.data.sources import open_source
from blip2_jax.data.statistics import Statistics, most_frequent, summary
from blip2_jax.data.workers import Report, Work
from blip2_jax.monitoring.progress import progress

Engine = Callable[[Work, Sequence[int]], Iterator[Report]]

_HEADROOM = 2**27  # Bytes to leave on the disk.
# Reasons of what a filter was to leave out, so that they are no sign of a broken source.
_FILTERED = ("too_small", "aspect", "caption_length", "script")
_VERSIONS = ("array_record", "msgpack", "numpy", "Pillow")


class TooManyRejects(ValueError):
    """More records cannot be used than was allowed."""


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus that is to be written, or finished.

    Attributes:
      plan: what it is made of.
      folder: new, or with a part of the corpus; where all workers see it.
      size: bytes that it will take, about.
      max_rejected: share of its records that may be unusable.
    """

    plan: Plan
    folder: pathlib.Path
    size: float
    max_rejected: float

    def write(self, engine: Engine) -> Statistics:
        """Write what is missing.

        Args:
          engine: has pieces of work done and reports, as `workers.share_out` does.

        Raises:
          OSError, ValueError: the folder holds something else, there is no room, or no record can be used.
          TooManyRejects: as it says; rejects.jsonl lists them.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise NotADirectoryError(f"{self.folder} is a file; expected a folder, or nothing yet")
        self.folder.mkdir(parents=True, exist_ok=True)
        mend = "make room, and the same command goes on"
        with _alone(self.folder), files.clear_about_full_disk(self.folder, mend):
            self._claim()
            try:
                statistics = self._write_missing(engine)
            finally:
                self._remove_partial_files()
            self._describe(statistics)
        return statistics

    @property
    def source(self) -> str:
        """The string that names the finished corpus as a source."""
        return f"arrayrecord:{glob.escape(str(self.folder))}/*.arrayrecord"

    def _claim(self) -> None:
        """Write the plan to corpus.json, or find it there.

        Raises:
          FileExistsError, ValueError: something else is there.
        """
        file, planned = self.folder / "corpus.json", json.loads(json.dumps(dataclasses.asdict(self.plan)))
        if not file.exists():
            others = sorted(path.name for path in self.folder.iterdir())
            if others:
                raise FileExistsError(
                    f"{self.folder} holds other files ({', '.join(others[:3])}): name a folder that is not there"
                )
            files.write_json(file, {"plan": planned, "finished": False})
            return
        try:
            known = json.loads(file.read_text(encoding="utf-8"))["plan"]
            # Where the same records are to be found may change.
            lines = files.differences(known | {"source": self.plan.source}, planned)
        except (ValueError, KeyError, TypeError) as error:
            raise FileExistsError(f"{file} is not a plan of this command: name a folder that is not there") from error
        if lines:
            raise ValueError(
                f"{self.folder} holds a corpus of another plan:\n"
                + "\n".join(lines)
                + "\nRepeat the command that it was begun with, or name another folder."
            )

    def _remove_partial_files(self) -> None:
        """Those of processes that were killed."""
        for file in self.folder.glob("*.partial-*"):
            file.unlink(missing_ok=True)

    def _write_missing(self, engine: Engine) -> Statistics:
        plan, statistics, missing, left = self.plan, Statistics(), [], 0
        self._remove_partial_files()
        for number in range(plan.shards):
            if facts := read_facts(plan, self.folder, number):
                statistics.update(facts.statistics)
            else:
                facts_file(plan, self.folder, number).unlink(missing_ok=True)
                missing.append(number)
                left += len(shards.shard_range(plan.length, number, plan.shards))
        print(
            f"{plan.length:,} records of {plan.source} to {plan.shards:,} shards, about {self.size / 1e6:,.1f} MB; "
            f"{plan.shards - len(missing):,} are there",
            file=sys.stderr,
        )
        room = int(self.size * left / plan.length) + _HEADROOM
        files.require_room(self.folder, room, "the corpus", "make room, or name a folder on another disk")
        work = functools.partial(write_shard, plan, self.folder)
        with (
            progress(total=plan.length, initial=plan.length - left, desc="prepare", unit="record") as bar,
            contextlib.closing(engine(work, missing)) as reports,
        ):
            self._check_rejects(statistics)
            for report in reports:
                bar.update(report.steps)
                if report.done is None:
                    continue
                statistics.update(read_facts(plan, self.folder, report.done).statistics)
                # Some engines know of no steps.
                bar.update(max(0, statistics.records + statistics.rejected.total() - bar.n))
                self._check_rejects(statistics)
        return statistics

    def _check_rejects(self, statistics: Statistics) -> None:
        """Raise TooManyRejects as soon as that is certain, in whatever order shards are written."""
        rejected, length = statistics.rejected, self.plan.length
        bad = rejected.total() - sum(rejected[reason] for reason in _FILTERED)
        if bad <= self.max_rejected * length and rejected.total() < length:
            return
        self._write_rejects()
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in most_frequent(rejected))
        listed = f"{self.folder / 'rejects.jsonl'} lists them"
        if rejected.total() == length:
            raise TooManyRejects(f"none of the {length:,} records of {self.plan.source} is left ({reasons}); {listed}")
        raise TooManyRejects(
            f"{bad:,} or more of {length:,} records of {self.plan.source} cannot be used ({reasons}), and "
            f"--max_rejected allows a share of {self.max_rejected:g}; {listed}"
        )

    def _write_rejects(self) -> None:
        """rejects.jsonl, of all shards that are there, in order."""
        known = (read_facts(self.plan, self.folder, number) for number in range(self.plan.shards))
        with files.replacing(self.folder / "rejects.jsonl") as partial, partial.open("w", encoding="utf-8") as stream:
            for reject in (reject for facts in known if facts for reject in facts.rejects):
                stream.write(json.dumps({"source": self.plan.source} | reject, ensure_ascii=False) + "\n")

    def _describe(self, statistics: Statistics) -> None:
        """Write all that is not records."""
        self._write_rejects()
        files.write_json(self.folder / "statistics.json", summary(statistics))
        written = open_source(self.source)
        said = f"{statistics.records:,} records, {statistics.captions:,} captions, from {self.plan.source}"
        contact_sheet.write(self.folder / "contact_sheet.jpg", written, self.folder.name, said)
        totals = {name: getattr(statistics, name) for name in ("records", "captions", "questions", "file_bytes")}
        provenance = {
            "plan": dataclasses.asdict(self.plan),
            "finished": True,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "identity": written.identity,
            "rejected": dict(most_frequent(statistics.rejected)),
            "versions": {name: importlib.metadata.version(name) for name in _VERSIONS}
            | {"blip2_jax": __version__, "python": platform.python_version()},
        }
        files.write_json(self.folder / "corpus.json", provenance | totals)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Hold a folder for this process, until it ends or leaves."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(f"another command is at work in {folder}: wait for it, or name another") from error
        yield
    finally:
        os.close(descriptor)
