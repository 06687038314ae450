"""Several processes that are one run: whether this is one of them, and how it finds the others."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils


def expected(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that this is one of several processes.

    That is so with JAX_COORDINATOR_ADDRESS, in a step of Slurm (srun) or a run of Open MPI of several tasks, and on a
    TPU pod of several hosts or slices.
    """
    if "JAX_COORDINATOR_ADDRESS" in environment or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    return any(int(environment.get(name) or 1) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))


def join(distributed: bool | None) -> None:
    """Find the other processes, before anything asks for a device.

    Who they are is said by JAX_COORDINATOR_ADDRESS (of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID together, or by
    the cluster, where jax knows it.

    Args:
      distributed: whether there are others; None: as the environment says.

    Raises:
      ValueError: there are said to be, but nothing tells where.
    """
    if not (expected(os.environ) if distributed is None else distributed):
        return
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(num_processes=number("JAX_NUM_PROCESSES"), process_id=number("JAX_PROCESS_ID"))


def add_up(counts: np.ndarray) -> np.ndarray:
    """int[N], the sum over all processes, which have to call together."""
    if jax.process_count() == 1:
        return counts
    return np.asarray(multihost_utils.process_allgather(counts)).sum(0)
