"""Alarms: what is known to go wrong with such runs, seen in the rows that a run logs anyway.

A detector is a function of the logged rows alone, so a run that goes on from a checkpoint reads them back from
metrics.jsonl and raises the alarms that it would have raised if it had never stopped.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_collections

from blip2_jax.monitoring.metrics import without_lost
from blip2_jax.monitoring.progress import tell

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """What an alarm begins at, by the names in `config.alarms`.

    Attributes:
      window: logged rows behind the warm-up that must agree before a loss counts as stuck, and over which data waits
        and skipped steps are counted.
      itm_margin: nats; a loss_itm whose mean stays so near to that of a constant answer is stuck.
      itc_margin: nats; a loss_itc that does not fall so far below log(batch) is at chance.
      temperature_low, temperature_high: between which the temperature belongs. Nothing clamps it.
      shuffled_increase: nats a token; an evaluation in which wrong pictures cost less says that pictures are ignored.
      gradient_norm: a norm up to this is none.
      query_cosine: above it the outputs of an image's queries are one vector.
      data_share: of a step's time spent waiting for its batch.
      skipped_share: of the steps in the newer half of the window, if it is no smaller in the older half.
    """

    window: int = 20
    itm_margin: float = 0.01
    itc_margin: float = 0.05
    temperature_low: float = 0.001
    temperature_high: float = 0.5
    shuffled_increase: float = 0.05
    gradient_norm: float = 0.0
    query_cosine: float = 0.98
    data_share: float = 0.3
    skipped_share: float = 0.02

    def __post_init__(self) -> None:
        """Raise ValueError for thresholds that make no sense."""
        for name, value in dataclasses.asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"alarms.{name} = {value!r}: expected a number from 0 on")
        if self.window < 2 or self.window != int(self.window):
            raise ValueError(f"alarms.window = {self.window}: expected a whole number of rows, 2 or more")
        if not self.temperature_low < self.temperature_high:
            raise ValueError(
                f"alarms.temperature_low = {self.temperature_low}: expected less than alarms.temperature_high = "
                f"{self.temperature_high}"
            )


def block() -> ml_collections.ConfigDict:
    """The block of a recipe: the defaults."""
    return ml_collections.ConfigDict(dataclasses.asdict(Thresholds()))


class History:
    """What the detectors look at: the newest logged rows, and what must be kept of the older ones.

    Attributes:
      rows: the newest `window`, the last one last.
      learnt: whether any learning rate so far was above 0.
      increases: by evaluated source, how much wrong pictures cost in its last evaluation, in nats a token.
    """

    def __init__(self, thresholds: Thresholds, batch_size: int, warmup: int) -> None:
        """Nothing logged yet, of a run with batches of so many pairs and so many steps of warm-up."""
        self.thresholds, self.batch_size, self.warmup = thresholds, batch_size, warmup
        self.rows: deque[Row] = deque(maxlen=thresholds.window)
        self.learnt, self.logged = False, 0
        self.increases: dict[str, float] = {}

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.logged += 1
        self.learnt |= (row.get("learning_rate") or 0.0) > 0
        for name, value in row.items():
            found = re.fullmatch(r"eval/(.+)/caption/shuffled_image_loss_increase", name)
            if found and value is not None:
                self.increases[found[1]] = value

    def last(self, name: str) -> float | None:
        """A value of the newest row, None if it is not there or was not finite."""
        return self.rows[-1].get(name)

    def plateau(self, name: str) -> list[Row]:
        """The whole window, if all of it lies behind the warm-up and has a finite value of that name; else nothing."""
        whole = len(self.rows) == self.rows.maxlen
        settled = all(row["step"] > self.warmup and row.get(name) is not None for row in self.rows)
        return list(self.rows) if whole and settled else []


def constant_answer_loss(rows: int, without_negative: int) -> float:
    """Nats of an ITM that gives every pair the share of true pairs: 0.6365 where each row has its two wrong ones.

    Args:
      rows: each has one true pair.
      without_negative: rows of them that have no wrong pairs.
    """
    share = rows / (rows + 2 * (rows - without_negative))
    return -sum(p * math.log(p) for p in (share, 1 - share) if p)


# Each says what it found, or nothing.


def _itm_stuck(h: History) -> str:
    rows = h.plateau("loss_itm")
    constant = [constant_answer_loss(h.batch_size, row.get("itm_rows_without_negative") or 0) for row in rows]
    off = [row["loss_itm"] - loss for row, loss in zip(rows, constant, strict=True)]
    # Single rows are noisy, and a mean of all could be that of a loss on its way down.
    halves = off[: len(off) // 2], off[len(off) // 2 :]
    if not off or any(abs(sum(half) / len(half)) > h.thresholds.itm_margin for half in halves):
        return ""
    return f"loss_itm is {rows[-1]['loss_itm']:.4f}, that of one constant answer {constant[-1]:.4f}"


def _itc_at_chance(h: History) -> str:
    rows, chance = h.plateau("loss_itc"), math.log(h.batch_size)
    if not rows or any(row["loss_itc"] < chance - h.thresholds.itc_margin for row in rows):
        return ""
    return f"loss_itc is {rows[-1]['loss_itc']:.3f}, that of guessing {chance:.3f}"


def _temperature(h: History) -> str:
    value, low, high = h.last("temperature"), h.thresholds.temperature_low, h.thresholds.temperature_high
    return f"temperature is {value:.4g}" if value is not None and not low < value < high else ""


def _ignores_image(h: History) -> str:
    low = {name: value for name, value in h.increases.items() if value < h.thresholds.shuffled_increase}
    return ", ".join(f"wrong pictures cost {value:.3f} nats a token on {name}" for name, value in low.items())


def _no_gradient(h: History) -> str:
    value = h.last("gradient_norm")
    return f"gradient_norm is {value:g}" if value is not None and value <= h.thresholds.gradient_norm else ""


def _queries_collapsed(h: History) -> str:
    rows = h.plateau("query_cosine")
    if not rows or any(row["query_cosine"] <= h.thresholds.query_cosine for row in rows):
        return ""
    return f"query_cosine is {rows[-1]['query_cosine']:.4f}"


def _no_learning_rate(h: History) -> str:
    # The first step of a warm-up from 0 has a rate of 0.
    return f"learning_rate was 0 in all {h.logged} logged rows" if h.logged > 1 and not h.learnt else ""


def _skipped_steps(h: History) -> str:
    rows = [row for row in h.rows if row.get("skipped_steps") is not None]
    if len(rows) < 3:
        return ""
    first, middle, last = rows[0], rows[len(rows) // 2], rows[-1]
    share = lambda old, new: (new["skipped_steps"] - old["skipped_steps"]) / (new["step"] - old["step"])
    before, now = share(first, middle), share(middle, last)
    if now <= h.thresholds.skipped_share or now < before:
        return ""
    return f"{now:.0%} of the last {last['step'] - middle['step']} steps were skipped, {before:.0%} of those before"


def _data_wait(h: History) -> str:
    shares = [row["timing/data_share"] for row in h.rows if row.get("timing/data_share") is not None][-3:]
    if len(shares) < 3 or min(shares) <= h.thresholds.data_share:
        return ""
    return f"{shares[-1]:.0%} of the time is waiting for batches"


class Detector(NamedTuple):
    """Attributes:
    found: what it finds in a history, or nothing.
    meaning: what that means and what to try.
    """

    found: Callable[[History], str]
    meaning: str


# By the name that the alarm has in metrics.jsonl. Those that hang on time are under timing/, as all that another
# machine or another start would change.
DETECTORS = {
    "alarm/itm_stuck": Detector(
        _itm_stuck,
        "Matching tells no pair from another. If loss_itc still falls, wait: hard negatives come from it. If not, "
        "raise objective.itm_share or batch_size, and look whether captions fit (`python -m blip2_jax.data preview`).",
    ),
    "alarm/itc_at_chance": Detector(
        _itc_at_chance,
        "Images and captions are not told apart. Look at the batches with `python -m blip2_jax.data preview`, check "
        "that config.vision has its weights, and try another optimizer.learning_rate.",
    ),
    "alarm/temperature": Detector(
        _temperature,
        "The temperature has left the range in which ITC learns. Lower optimizer.learning_rate or fresh_multiplier; "
        "compat.decay_all_matrices pulls it down, duplicates that are no negatives can push it up.",
    ),
    "alarm/ignores_image": Detector(
        _ignores_image,
        "Captions are written as well without the picture. Start from a trained stage 1 (config.init), keep its "
        "queries apart (objective.diversity there), set data.begin, or train for longer.",
    ),
    "alarm/no_gradient": Detector(
        _no_gradient,
        "Nothing learns. Check that a term of the objective has weight, and that config.init is not broken.",
    ),
    "alarm/queries_collapsed": Detector(
        _queries_collapsed,
        "All queries say the same of a picture, which leaves a language model with one vector. Raise "
        "objective.diversity.",
    ),
    "alarm/no_learning_rate": Detector(
        _no_learning_rate,
        "Nothing can have been learnt. Check optimizer.learning_rate and warmup; if skipped_steps grows with step, no "
        "step was finite.",
    ),
    "alarm/skipped_steps": Detector(
        _skipped_steps,
        "Losses or gradients are not finite, and it does not get better. Lower optimizer.learning_rate, set "
        "optimizer.clip_norm, lengthen optimizer.warmup.",
    ),
    "timing/alarm/data_wait": Detector(
        _data_wait,
        "The chips wait for the host. Raise data.threads or data.workers, make the images smaller with `python -m "
        "blip2_jax.data prepare --resize`, or compute image tokens before (data.feature_views).",
    ),
}


class Alarms:
    """The alarms of a run; each is told on stderr when it begins and when it ends."""

    def __init__(self, thresholds: Thresholds, batch_size: int, warmup: int, rows: Iterable[Row] = ()) -> None:
        """Begin where the rows logged so far have left off, and tell what holds there.

        Args:
          thresholds: of the detectors.
          batch_size: pairs in a batch.
          warmup: steps of it.
          rows: of metrics.jsonl, up to the step from which the run goes on.
        """
        self._history = History(thresholds, batch_size, warmup)
        step = 0
        for row in rows:
            self._history.add(row)
            step = row["step"]
        self._holding = self._found() if step else {}
        for name, found in self._holding.items():
            _announce(name, f"goes on from step {step}: {found}. {DETECTORS[name].meaning}")

    def _found(self) -> dict[str, str]:
        found = {name: detector.found(self._history) for name, detector in DETECTORS.items()}
        return {name: what for name, what in found.items() if what}

    def add(self, row: Row) -> dict[str, int]:
        """The alarms that hold with one more logged row, as what that row should say of them: {"alarm/NAME": 1}."""
        self._history.add(without_lost(row))
        before, self._holding = self._holding, self._found()
        for name, found in self._holding.items():
            if name not in before:
                _announce(name, f"at step {row['step']}: {found}. {DETECTORS[name].meaning}")
        for name in before.keys() - self._holding.keys():
            _announce(name, f"ended at step {row['step']}")
        return dict.fromkeys(self._holding, 1)


def _announce(name: str, text: str) -> None:
    tell(f"ALARM {name.rpartition('/')[2]} {text}")


def spans(rows: Iterable[Row]) -> dict[str, list[tuple[int, int]]]:
    """By alarm the first and the last logged step of each time that it held."""
    found: dict[str, list[tuple[int, int]]] = {}
    holding: set[str] = set()
    for row in rows:
        now = {name for name in DETECTORS if row.get(name)}
        for name in now:
            known = found.setdefault(name, [])
            if name in holding:
                known[-1] = (known[-1][0], row["step"])
            else:
                known.append((row["step"], row["step"]))
        holding = now
    return found
