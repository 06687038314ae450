"""The one training loop, for every recipe."""

from __future__ import annotations

import json
import pathlib
import signal
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from blip2_jax import compat, files, optimizer, params, tasks
from blip2_jax.checkpoints import frozen
from blip2_jax.checkpoints.store import Store, read_config
from blip2_jax.data.pipeline import check_batch, check_order, order_identity, training_batches
from blip2_jax.monitoring import report
from blip2_jax.monitoring.clock import Clock
from blip2_jax.monitoring.metrics import MetricsWriter
from blip2_jax.monitoring.progress import progress
from blip2_jax.monitoring.rejects import Rejects
from blip2_jax.parallel import mesh as meshes
from blip2_jax.step import initial_state, make_step


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""


def refuse_other_configuration(workdir: pathlib.Path, resolved: dict) -> None:
    """Raise ValueError if the workdir belongs to a run of another configuration."""
    if not (workdir / "config.json").exists():
        return
    lines = files.differences(read_config(workdir), resolved)
    if lines:
        raise ValueError(
            f"{workdir} belongs to a run of another configuration:\n"
            + "\n".join(lines)
            + "\nChoose another --workdir, or give the run the settings it was started with."
        )


class Run:
    """A training run in a workdir: everything is opened, checked and restored before the first step."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        self.resolved = json.loads(config.to_json())
        self.leads = jax.process_index() == 0  # Of several processes one writes what is not an array.
        refuse_other_configuration(workdir, self.resolved)
        self.mesh = meshes.make_mesh(config.mesh)
        self._check()
        self.task = tasks.create(config)
        meshes.check_batch_size(config.batch_size, self.mesh, self.task.rows_in_step())
        self.task.mesh = self.mesh
        starting_point = tasks.starting_point(self.task)
        self.parts = self.task.training_parts()
        self.evaluated = self.task.evaluation_pictures() if config.data.eval else {}

        self.frozen = self.task.frozen
        root = jax.random.key(config.seed)
        self._prepare_step(starting_point(jax.random.fold_in(root, 0)), jax.random.fold_in(root, 1))
        print(
            f"frozen: {params.count(self.frozen):,} parameters, {params.size(self.frozen) / 2**20:,.1f} MiB",
            file=sys.stderr,
        )
        self._open_workdir()
        self.clock = Clock()
        self._asked_to_stop: int | None = None

    def _check(self) -> None:
        """Raise ValueError for settings that could not work, before anything is read."""
        config = self.config
        meshes.check_batch_size(config.batch_size, self.mesh)
        for name in ("total_steps", "max_skipped_in_a_row"):
            if not config[name] > 0:
                raise ValueError(f"{name} must be above 0, found {config[name]}")
        if jax.process_count() > 1 and (config.data.eval or (config.data.feature_views and not config.data.features)):
            raise ValueError(
                f"{jax.process_count()} processes train, but do not evaluate, nor compute image tokens before: set "
                "data.eval='' and evaluate the workdir with one process; and set data.feature_views=0, or run "
                "cache_features and name its folder in data.features"
            )
        self.compat = compat.resolve(config.compat)
        self.schedule = optimizer.schedule(config.optimizer, config.total_steps, self.compat.epoch_schedule)

    def _prepare_step(self, trainable: params.Tree, rng: jax.Array) -> None:
        """The state at the start, spread over the mesh, and the step that goes on from there."""
        decays = params.resolve(optimizer.decay_table(self.compat.decay_all_matrices), trainable, "weight decay")
        rates = params.resolve(self.task.rate_table(trainable), trainable, "learning rate")
        self.transformation = optimizer.create(
            self.config.optimizer, self.config.total_steps, decays, rates, self.compat.epoch_schedule
        )
        print(params.describe(trainable, {"decays": decays, "rate": optimizer.readable(rates)}), file=sys.stderr)
        self.state, places = initial_state(trainable, self.transformation, rng, self.mesh, self.config.shard_trainable)
        self.step = make_step(self.task, self.transformation, places)

    def _open_workdir(self) -> None:
        """Checkpoints and metrics; where the workdir has a checkpoint, go on from there."""
        config, workdir = self.config, self.workdir
        files.require_room(
            workdir,
            (config.keep_checkpoints + 1) * params.size((self.state.trainable, self.state.optimizer)),
            "the checkpoints",
            "make room, or choose a --workdir on another disk",
        )
        if self.leads:
            files.write_json(workdir / "config.json", self.resolved)
        self.store = Store(workdir / "checkpoints", config.keep_checkpoints)
        if self.store.newest is not None:
            checkpoint = workdir / "checkpoints" / str(self.store.newest)
            frozen.check(self.task.parts, json.loads((checkpoint / "frozen.json").read_text()), str(checkpoint))
            self.state = self.store.restore(self.state)
            print(f"resumed from step {self.store.newest} of {workdir}", file=sys.stderr)
        step = int(self.state.step)
        self.metrics = MetricsWriter(workdir, step) if self.leads else None
        known = self.store.data_facts() if self.store.newest is not None else {}
        self.rejects = Rejects(workdir, step, config.data.max_rejected, known.get("rejected", {}))
        self._open_data(known.get("order"))

    def _open_data(self, known: list[dict] | None) -> None:
        """Batches from the next step on; `known` are the sources that the run began with."""
        config, self.order = self.config, order_identity(self.parts)
        if known:
            check_order(known, self.order)
        self.data = training_batches(
            self.parts,
            self.task.batches.collate,
            config.batch_size,
            config.seed,
            rows=meshes.own_rows(config.batch_size, self.mesh),
            start=int(self.state.step),
            threads=config.data.threads,
            workers=config.data.workers,
        )

    def train(self) -> None:
        """Run to the end.

        Raises:
          Interrupted: SIGINT or SIGTERM came; the state is saved.
        """
        handlers = {number: signal.signal(number, self._ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._loop()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.store.close()
            self.rejects.close()
            if self.metrics:
                self.metrics.close()

    def _ask_to_stop(self, number: int, _frame: Any) -> None:
        if self._asked_to_stop is not None:
            raise KeyboardInterrupt
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)
        self._asked_to_stop = number

    def _loop(self) -> None:
        total, start = self.config.total_steps, int(self.state.step)
        previous: tuple[int, dict, list] | None = None
        with progress(total=total, initial=start, desc=self.task.name, unit="step") as bar:
            for number in range(start + 1, total + 1):
                with self.clock.measure("data"):
                    batch, rejects = next(self.data)
                first = number == start + 1
                with self.clock.measure("compile" if first else "train"), jax.set_mesh(self.mesh):
                    batch = meshes.global_batch(batch, self.config.batch_size, self.mesh)
                    if first:
                        check_batch(batch, self.task.schema())
                    self.state, metrics = self.step(self.state, self.frozen, batch)
                    self.clock.step()
                # Read the step before this one, so that the device never waits for the host.
                if previous:
                    self._look_at(*previous, bar)
                previous = (number, metrics, rejects)
                saving = number == total or number % self.config.checkpoint_every == 0
                evaluating = number == total or (self.config.eval_every and number % self.config.eval_every == 0)
                if evaluating or saving or self._asked_to_stop is not None:
                    jax.block_until_ready(self.state)  # So that what follows is not charged with this step's time.
                    extra = self._evaluate(number) if evaluating else {}
                    self._look_at(*previous, bar, extra)
                    previous = None
                    if saving or self._asked_to_stop is not None:
                        self._save()
                bar.update()
                if self._asked_to_stop is not None and number < total:
                    raise Interrupted(f"stopped by {signal.Signals(self._asked_to_stop).name} after step {number}")

    def _look_at(self, number: int, metrics: dict, rejects: list, bar: Any, extra: dict | None = None) -> None:
        """Log a step that is done, where that is due.

        Raises:
          FloatingPointError: it is the last of too many in a row that were not finite.
        """
        self.rejects.add(number, rejects)
        limit = self.config.max_skipped_in_a_row
        too_many = int(metrics["skipped_in_a_row"]) >= limit
        due = number in (1, self.config.total_steps) or number % self.config.log_every == 0
        if not (due or extra or too_many):
            return
        values = {name: np.asarray(value).item() for name, value in metrics.items()}
        self._log(number, values, bar, extra or {})
        if too_many:
            raise FloatingPointError(
                f"{limit} steps in a row were skipped up to step {number}, since the loss or a gradient was not finite "
                f"(config.max_skipped_in_a_row): {values}; the last checkpoint is of step {self.store.newest}"
            )

    def _log(self, number: int, values: dict, bar: Any, extra: dict) -> None:
        # The schedule counts the steps that were applied.
        applied = number - 1 - (values["skipped_steps"] - bool(values["skipped_in_a_row"]))
        values["learning_rate"] = float(self.config.optimizer.learning_rate * self.schedule(applied))
        left = self.config.total_steps - number
        rejected = self.rejects.by_reason()
        values |= {"data/rejected": sum(rejected.values())}
        values |= {f"data/rejected/{reason}": count for reason, count in rejected.items()}
        values |= self.clock.pace(self.config.batch_size, jax.device_count(), left) | extra
        if self.metrics:
            self.metrics.write(number, values)
        self.rejects.check(rejected, number * self.config.batch_size)
        shown = [
            f"{name.removeprefix('loss_')} {value:.3f}" for name, value in values.items() if name.startswith("loss")
        ]
        bar.set_postfix_str(", ".join(shown), refresh=False)

    def _evaluate(self, number: int) -> dict[str, float]:
        """Metrics of every evaluated source by path; what was found goes to samples/STEP.json and report.html."""
        metrics: dict[str, float] = {}
        samples: dict[str, list[dict]] = {}
        with self.clock.measure("evaluate"):
            for name, pictures in self.evaluated.items():
                values, samples[name] = self.task.evaluate(self.state.trainable, pictures)
                metrics |= {f"eval/{name}/{path}": value for path, value in values.items()}
        if samples and self.leads:
            files.write_json(self.workdir / "samples" / f"{number}.json", samples)
        return metrics

    def _save(self) -> None:
        with self.clock.measure("checkpoint"):
            data = {"order": self.order, "rejected": self.rejects.by_reason()}
            self.store.save(self.state, data, self.resolved, self.task.frozen_identity())


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> None:
    """Train as `config` says in `workdir`, or go on where a run there was interrupted; then write its report."""
    workdir = pathlib.Path(workdir)
    with files.clear_about_full_disk(workdir, "make room, and the same command goes on from the last checkpoint"):
        run = Run(config, workdir)
        run.train()
        if run.leads:
            report.write_run(workdir)
