"""The one training loop, for every recipe."""

from __future__ import annotations

import functools
import json
import pathlib
import signal
import sys
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from blip2_jax import files, optimizer, params, tasks
from blip2_jax.checkpoints import frozen
from blip2_jax.checkpoints.store import Store, TrainState, read_config
from blip2_jax.data.pipeline import check_batch, training_batches
from blip2_jax.monitoring import report
from blip2_jax.monitoring.clock import Clock
from blip2_jax.monitoring.metrics import MetricsWriter
from blip2_jax.monitoring.progress import progress
from blip2_jax.parallel import mesh as meshes
from blip2_jax.tasks.common import Task


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""


def refuse_other_configuration(workdir: pathlib.Path, resolved: dict) -> None:
    """Raise ValueError if the workdir belongs to a run of another configuration."""
    if not (workdir / "config.json").exists():
        return
    known, new = params.flatten(read_config(workdir)), params.flatten(resolved)
    changed = [name for name in sorted(known.keys() | new.keys()) if known.get(name) != new.get(name)]
    if changed:
        lines = [f"  {name}: {known.get(name)!r} there, {new.get(name)!r} asked for" for name in changed]
        raise ValueError(
            f"{workdir} belongs to a run of another configuration:\n"
            + "\n".join(lines)
            + "\nChoose another --workdir, or give the run the settings it was started with."
        )


def make_step(task: Task, transformation: optax.GradientTransformation):
    """The compiled training step: (state, frozen, batch) -> (state, metrics)."""

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, frozen_params: params.Tree, batch: dict):
        key = jax.random.fold_in(state.rng, state.step)
        objective = functools.partial(task.loss, frozen=frozen_params, batch=batch, key=key)
        (loss, metrics), gradients = jax.value_and_grad(objective, has_aux=True)(state.trainable)
        updates, optimizer_state = transformation.update(gradients, state.optimizer, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = {"loss": loss, **metrics, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, state.rng, trainable, optimizer_state), metrics

    return step


class Run:
    """A training run in a workdir: everything is opened, checked and restored before the first step."""

    def __init__(self, config: ml_collections.ConfigDict, workdir: pathlib.Path):
        self.config, self.workdir = config, workdir
        self.resolved = json.loads(config.to_json())
        refuse_other_configuration(workdir, self.resolved)
        self.mesh = meshes.make_mesh(config.mesh)
        meshes.check_batch_size(config.batch_size, self.mesh)
        if not config.total_steps > 0:
            raise ValueError(f"total_steps must be above 0, found {config.total_steps}")
        self.task = tasks.create(config)
        starting_point = tasks.starting_point(self.task)
        parts = self.task.training_parts()
        self.data = iter(
            training_batches(parts, self.task.collate, config.batch_size, config.seed, config.data.threads)
        )
        self.evaluated = self.task.evaluation_pictures() if config.data.eval else {}

        everywhere = meshes.replicated(self.mesh)
        self.frozen = jax.device_put(self.task.frozen, everywhere)
        root = jax.random.key(config.seed)
        trainable = starting_point(jax.random.fold_in(root, 0))
        decays = params.resolve(self.task.decay_table(), trainable, "weight decay")
        rates = params.resolve(self.task.rate_table(trainable), trainable, "learning rate")
        self.schedule = optimizer.schedule(config.optimizer, config.total_steps)
        self.transformation = optimizer.create(config.optimizer, config.total_steps, decays, rates)
        state = TrainState(
            jnp.int32(0), jax.random.fold_in(root, 1), trainable, jax.jit(self.transformation.init)(trainable)
        )
        self.state = jax.device_put(state, everywhere)
        self.step = make_step(self.task, self.transformation)
        print(params.describe(trainable, {"decays": decays, "rate": rates}), file=sys.stderr)
        print(
            f"frozen: {params.count(self.frozen):,} parameters, {params.size(self.frozen) / 2**20:,.1f} MiB",
            file=sys.stderr,
        )

        files.require_room(
            workdir,
            (config.keep_checkpoints + 1) * params.size((state.trainable, state.optimizer)),
            "the checkpoints",
            "make room, or choose a --workdir on another disk",
        )
        files.write_json(workdir / "config.json", self.resolved)
        self.store = Store(workdir / "checkpoints", config.keep_checkpoints)
        if self.store.newest is not None:
            checkpoint = workdir / "checkpoints" / str(self.store.newest)
            frozen.check(self.task.parts, json.loads((checkpoint / "frozen.json").read_text()), str(checkpoint))
            self.state = self.store.restore(self.state, self.data)
            print(f"resumed from step {self.store.newest} of {workdir}", file=sys.stderr)
        self.metrics = MetricsWriter(workdir, int(self.state.step))
        self.clock = Clock()
        self._asked_to_stop: int | None = None

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
            self.metrics.close()

    def _ask_to_stop(self, number: int, _frame: Any) -> None:
        if self._asked_to_stop is not None:
            raise KeyboardInterrupt
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)
        self._asked_to_stop = number

    def _loop(self) -> None:
        total, start = self.config.total_steps, int(self.state.step)
        sharding = meshes.batch_sharding(self.mesh)
        previous: tuple[int, dict] | None = None
        with progress(total=total, initial=start, desc=self.task.name, unit="step") as bar:
            for number in range(start + 1, total + 1):
                with self.clock.measure("data"):
                    batch = next(self.data)
                first = number == start + 1
                if first:
                    check_batch(batch, self.task.schema())
                with self.clock.measure("compile" if first else "train"):
                    batch = jax.device_put(batch, sharding)
                    self.state, metrics = self.step(self.state, self.frozen, batch)
                    self.clock.step()
                # Read the step before this one, so that the device never waits for the host.
                if previous:
                    self._log(*previous, bar)
                previous = (number, metrics)
                saving = number == total or number % self.config.checkpoint_every == 0
                evaluating = number == total or (self.config.eval_every and number % self.config.eval_every == 0)
                if evaluating or saving or self._asked_to_stop is not None:
                    jax.block_until_ready(self.state)  # So that what follows is not charged with this step's time.
                    extra = self._evaluate(number) if evaluating else {}
                    self._log(*previous, bar, extra)
                    previous = None
                    if saving or self._asked_to_stop is not None:
                        self._save()
                bar.update()
                if self._asked_to_stop is not None and number < total:
                    raise Interrupted(f"stopped by {signal.Signals(self._asked_to_stop).name} after step {number}")

    def _log(self, number: int, metrics: dict, bar: Any, extra: dict | None = None) -> None:
        if not (number in (1, self.config.total_steps) or number % self.config.log_every == 0 or extra):
            return
        values = {name: float(value) for name, value in metrics.items()}
        if not np.isfinite(values["loss"]):
            raise FloatingPointError(f"the loss is {values['loss']} at step {number}: {values}")
        values["learning_rate"] = float(self.config.optimizer.learning_rate * self.schedule(number - 1))
        left = self.config.total_steps - number
        values |= self.clock.pace(self.config.batch_size, jax.device_count(), left) | (extra or {})
        self.metrics.write(number, values)
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
        if samples:
            files.write_json(self.workdir / "samples" / f"{number}.json", samples)
        return metrics

    def _save(self) -> None:
        with self.clock.measure("checkpoint"):
            self.store.save(self.state, self.data, self.resolved, self.task.frozen_identity())


def train(config: ml_collections.ConfigDict, workdir: str | pathlib.Path) -> None:
    """Train as `config` says in `workdir`, or go on where a run there was interrupted; then write its report."""
    workdir = pathlib.Path(workdir)
    with files.clear_about_full_disk(workdir, "make room, and the same command goes on from the last checkpoint"):
        run = Run(config, workdir)
        run.train()
        report.write_run(workdir)
