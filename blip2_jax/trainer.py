"""The one training loop, for every recipe."""

from __future__ import annotations

import contextlib
import json
import pathlib
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from blip2_jax import compat, configuration, files, flops, optimizer, params, tasks
from blip2_jax import workdir as workdirs
from blip2_jax.checkpoints import frozen
from blip2_jax.checkpoints.store import Keep, Store
from blip2_jax.data.pipeline import Delivery, check_batch, check_order, order_identity, training_batches
from blip2_jax.evaluation import attention
from blip2_jax.monitoring import clock, examples, offender, profiler, report, weights_and_biases
from blip2_jax.monitoring.alarms import Alarms, Thresholds
from blip2_jax.monitoring.metrics import MetricsWriter, read_metrics
from blip2_jax.monitoring.pictures import Thumbnails
from blip2_jax.monitoring.progress import TrainingProgress, tell
from blip2_jax.monitoring.rejects import Rejects
from blip2_jax.monitoring.watchdog import Watchdog
from blip2_jax.parallel import chips, processes
from blip2_jax.parallel import mesh as meshes
from blip2_jax.parallel.stopping import Stopping
from blip2_jax.step import initial_state, make_step


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""

    def __init__(self, number: signal.Signals, step: int):
        super().__init__(f"stopped by {number.name} after step {step}")
        self.signal = number


class Done(NamedTuple):
    """A step that is under way, and has still to be looked at: its number, metrics and batch."""

    number: int
    metrics: dict[str, jax.Array]
    delivery: Delivery


class Run:
    """A training run in a workdir: everything is opened, checked and restored before the first step."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
        self.config = config = configuration.resolved(config)
        self.workdir = workdir
        self.resolved = json.loads(config.to_json())
        self.leads = jax.process_index() == 0  # Of several processes one writes what is not an array.
        processes.first(lambda: workdirs.refuse_other_configuration(workdir, self.resolved))
        self.mesh = meshes.make_mesh(config.mesh)
        weights_and_biases.check(config.wandb)
        self.thresholds, self.traced = Thresholds(**config.alarms), profiler.parse_steps(config.profile.steps)
        self.compat = compat.resolve(config.compat)
        self.schedule = optimizer.schedule(config.optimizer, config.total_steps, self.compat.epoch_schedule)
        self.task = tasks.create(config)
        meshes.check_batch_size(config.batch_size, self.mesh, self.task.rows_in_step())
        self.task.mesh = self.mesh
        if config.data.eval:
            self.task.evaluation_layout()  # Raises what does not fit.
        starting_point = tasks.starting_point(self.task)
        self.parts = self.task.training_parts()
        self.evaluated = self.task.evaluation_pictures() if config.data.eval else {}
        self.thumbnails = {name: Thumbnails(pictures.source) for name, pictures in self.evaluated.items()}

        self.frozen = self.task.frozen
        root = jax.random.key(config.seed)
        self._prepare_step(starting_point(jax.random.fold_in(root, 0)), jax.random.fold_in(root, 1))
        print(
            f"frozen: {params.count(self.frozen):,} parameters, {params.size(self.frozen) / 2**20:,.1f} MiB",
            file=sys.stderr,
        )
        self._open_workdir()
        self._open_watch()

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
        size = (config.keep_checkpoints + 1) * params.size((self.state.trainable, self.state.optimizer))
        mend = "make room, or choose a --workdir on another disk"
        processes.first(lambda: files.require_room(workdir, size, "the checkpoints", mend))
        self.store = Store(workdir / "checkpoints", Keep(config.keep_checkpoints, config.keep_every, config.keep_best))
        known: dict[str, Any] = {}
        if self.store.newest is not None:
            frozen.check(self.task.parts, self.store.facts("frozen"), f"{workdir}/checkpoints/{self.store.newest}")
            self.state = self.store.restore(self.state)
            known = self.store.facts("data") or {}
            print(f"resumed from step {self.store.newest} of {workdir}", file=sys.stderr)
        step = int(self.state.step)
        self.rejects = Rejects(workdir, step, config.data.max_rejected, known.get("rejected", {}))
        self._open_data(known.get("order"))
        self.metrics = None
        if self.leads:
            files.write_json(workdir / "config.json", self.resolved)
            rows = self.store.facts("metrics") if step else None
            if rows is not None:  # What was logged afterwards is done again; what the storage lost comes back.
                files.write_text(workdir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
            more = lambda: weights_and_biases.WeightsAndBiases(workdir, config.wandb, self.resolved)
            self.metrics = MetricsWriter(workdir, step, more if config.wandb.project else None)

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

    def _open_watch(self) -> None:
        """Clock, alarms and profiler."""
        config, warmup = self.config, optimizer.warmup_steps(self.config.optimizer, self.config.total_steps)
        if self.metrics:
            self.alarms = Alarms(self.thresholds, config.batch_size, warmup, self.metrics.rows)
        peak = chips.peak_flops(jax.devices()[0].device_kind)
        work = clock.Work(config.batch_size, jax.device_count(), flops.per_step(self.task), peak)
        self.clock = clock.Clock(work, int(self.state.step))
        wait = lambda: jax.block_until_ready(self.state)
        self.profiler = profiler.Profiler(self.workdir / "profile", self.traced, wait, self.clock.measure)

    def train(self) -> None:
        """Run to the end.

        Raises:
          Interrupted: SIGINT or SIGTERM came; the state is saved.
          FloatingPointError: too many steps in a row were not finite.
          OSError: the workdir can no longer be written.
        """
        with contextlib.ExitStack() as opened:
            for part in filter(None, (self.metrics, self.rejects, self.store, self.profiler)):
                opened.callback(part.close)
            opened.callback(signal.signal, signal.SIGUSR1, signal.signal(signal.SIGUSR1, self.profiler.ask))
            self.watchdog = opened.enter_context(contextlib.closing(Watchdog(self.config.watchdog_minutes)))
            self.stopping = opened.enter_context(Stopping())
            opened.callback(lambda: tell(clock.summary(self.clock.seconds())))
            self._loop()
            with self.clock.measure("checkpoint", times=0):
                self.settle()

    def _loop(self) -> None:
        total, start = self.config.total_steps, int(self.state.step)
        previous: Done | None = None
        with TrainingProgress(self.task.name, total, start) as shown:
            for number in range(start + 1, total + 1):
                with self.profiler.step(number):
                    done = self._step(number, number == start + 1)
                    # Look at the step before this one, so that the device never waits for the host.
                    if previous:
                        self._look_at(previous, shown)
                    stopping = self.stopping.asked(number)
                    previous = None if self._pause(done, stopping, shown) else done
                self.watchdog.step(number)
                shown.step()
                if stopping and number < total:
                    self.settle()
                    raise Interrupted(self.stopping.signal, number)

    def _step(self, number: int, first: bool) -> Done:
        """Begin the next step."""
        with self.clock.measure("data"):
            delivery = next(self.data)
        compiling = self.clock.measure("compile") if first else contextlib.nullcontext()
        with compiling, jax.set_mesh(self.mesh):
            batch = meshes.global_batch(delivery.batch, self.config.batch_size, self.mesh)
            if first:
                check_batch(batch, self.task.schema())
            self.state, metrics = self.step(self.state, self.frozen, batch)
        if jax.default_backend() == "cpu":
            # It comes back nearly done anyway, and as one that is done it is counted in the time that it took.
            jax.block_until_ready(self.state)
            self.clock.done(number, timed=not first)
        return Done(number, metrics, delivery)

    def _pause(self, done: Done, stopping: bool, shown: TrainingProgress) -> bool:
        """Evaluate and save after a step, where that is due; whether it was, and so the step was looked at."""
        config, number = self.config, done.number
        last = number == config.total_steps
        evaluating = last or bool(config.eval_every and number % config.eval_every == 0)
        saving = last or stopping or number % config.checkpoint_every == 0 or bool(evaluating and config.keep_best)
        if not (evaluating or saving):
            return False
        jax.block_until_ready(self.state)  # So that what follows is not charged with this step's time.
        found = self._evaluate(number) if evaluating else {}
        self._look_at(done, shown, found)
        if evaluating:
            with self.clock.measure("evaluate", times=0):
                processes.first(lambda: report.write_run(self.workdir))
        if saving:
            self.save(found)
        return True

    def _look_at(self, done: Done, shown: TrainingProgress, found: Mapping[str, float] | None = None) -> None:
        """Log a step that is done, where that is due, with what an evaluation after it has found.

        Raises:
          FloatingPointError: it is the last of too many in a row that were not finite.
        """
        number, limit = done.number, self.config.max_skipped_in_a_row
        self.rejects.add(number, done.delivery.rejects)
        too_many = int(done.metrics["skipped_in_a_row"]) >= limit
        due = number in (1, self.config.total_steps) or number % self.config.log_every == 0
        self.clock.done(number)
        if not (due or found or too_many):
            return
        values = {name: np.asarray(value).item() for name, value in done.metrics.items()}
        self._log(number, values, shown, found or {})
        if self.store.written():
            self.settle()
        if too_many:
            self.settle()
            file = offender.write(self.workdir, number, done.delivery.batch, values)
            raise FloatingPointError(
                f"{limit} steps in a row were skipped up to step {number}, since the loss or a gradient was not finite "
                f"(config.max_skipped_in_a_row): {values}; the batch is in {file}, the last checkpoint is of step "
                f"{self.store.newest}"
            )

    def _log(self, number: int, values: dict, shown: TrainingProgress, found: Mapping[str, float]) -> None:
        # The schedule counts the steps that were applied.
        applied = number - 1 - (values["skipped_steps"] - bool(values["skipped_in_a_row"]))
        values["learning_rate"] = float(self.config.optimizer.learning_rate * self.schedule(applied))
        rejected = self.rejects.by_reason()
        values |= {"data/rejected": sum(rejected.values())}
        values |= {f"data/rejected/{reason}": count for reason, count in rejected.items()}
        values |= self.clock.reading(self._to_come(number)) | found
        if self.metrics:
            shown.logged({"step": number} | values)
            values |= self.alarms.add({"step": number} | values)
            self.metrics.write(number, values)
        self.rejects.check(rejected, number * self.config.batch_size)

    def _to_come(self, number: int) -> dict[str, int]:
        """How often what takes time is due after a step."""
        config = self.config
        evaluations = clock.due(number, config.eval_every, config.total_steps) if self.evaluated else 0
        saves = clock.due(number, config.checkpoint_every, config.total_steps)
        return {"train": config.total_steps - number, "evaluate": evaluations, "checkpoint": saves}

    def _evaluate(self, number: int) -> dict[str, float]:
        """Metrics of every evaluated source by path; what was found goes to samples/STEP.json."""
        metrics: dict[str, float] = {}
        samples: dict[str, list[dict]] = {}
        with self.clock.measure("evaluate"):
            trainable = self.task.assembled(self.state.trainable)
            for name, pictures in self.evaluated.items():
                values, found = self.task.evaluate(trainable, pictures)
                metrics |= {f"eval/{name}/{path}": value for path, value in values.items()}
                found += attention.samples(self.task, trainable, pictures, count=4)
                if self.leads:
                    found += self.thumbnails[name].samples(examples.keys_shown(found))
                samples[name] = found
            if samples and self.leads:
                files.write_json(self.workdir / "samples" / f"{number}.json", samples)
        return metrics

    def save(self, evaluated: Mapping[str, float]) -> None:
        """Begin to write a checkpoint, once the one before is there; `evaluated` was found at this step."""
        with self.clock.measure("checkpoint"):
            self.settle()
            self._evaluated = evaluated
            self._begin_to_save()

    def _begin_to_save(self) -> None:
        data = {"order": self.order, "rejected": self.rejects.by_reason()}
        rows = read_metrics(self.workdir / "metrics.jsonl") if self.leads else []
        identity = self.task.frozen_identity()
        self.store.save(self.state, self._evaluated, data=data, config=self.resolved, frozen=identity, metrics=rows)

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is there; try again for a while where that fails.

        Raises:
          OSError: it failed every time.
        """
        trouble = self.store.settle()
        for pause in files.PATIENCE:
            if trouble is None:
                return
            tell(f"a checkpoint could not be written: {trouble}; trying again in {pause:g} s")
            time.sleep(pause)
            self._begin_to_save()  # Of this step, since the state of that one is gone.
            trouble = self.store.settle()
        if trouble is not None:
            raise OSError(
                f"no checkpoint can be written in {self.workdir}: {trouble}; the last whole one is of step "
                f"{self.store.newest}, from which the same command goes on once that is mended"
            ) from trouble


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> None:
    """Train as `config` says in `workdir`, or go on where a run there was interrupted."""
    workdir = pathlib.Path(workdir)
    mend = "make room, and the same command goes on from the last checkpoint"
    with files.clear_about_full_disk(workdir, mend), workdirs.locked(workdir):
        Run(config, workdir).train()
