"""Several processes that are one run: whether this is one of them, how it finds the others, what one does for all."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import pathlib
import sys
import threading
import urllib.request
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import multihost

# A process that has not been heard of for so long is lost, and all others end: within a minute of its death.
_HEARTBEAT_SECONDS = 30
# Processes end together; one that ended with an error does not wait for others that wait for it.
_SHUTDOWN_SECONDS = 60
_JOIN_SECONDS = 300
_LONGEST_MILLISECONDS = 24 * 3600 * 1000

_EXPLICIT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")

# What `first` hands on, the most special first.
_KINDS = (
    *(FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError, TimeoutError),
    *(ConnectionError, OSError, ValueError),
)
_calls = itertools.count()  # The same in every process; a barrier's name serves once.


def expected(environment: Mapping[str, str]) -> bool:
    """Whether the environment says that this is one of several processes.

    That is so with JAX_COORDINATOR_ADDRESS, in a step of Slurm (srun) or a run of Open MPI of several tasks, and on a
    TPU pod of several hosts or slices, where the variables of Kubernetes or the machine's metadata say so.

    Raises:
      ValueError: a number of tasks is none.
    """
    if "JAX_COORDINATOR_ADDRESS" in environment or "MEGASCALE_COORDINATOR_ADDRESS" in environment:
        return True
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    if any((_number(environment, name) or 1) > 1 for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    asked = {"TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"} & environment.keys()
    return not asked and _has_tpu() and len(tpu_workers(environment)) > 1


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name)
    if not text:
        return None
    if not text.isdecimal():
        raise ValueError(f"the environment variable {name} is {text!r}: expected a number from 0 up")
    return int(text)


def _has_tpu() -> bool:
    """Whether this machine has a TPU and jax would use it; nothing else is asked for metadata."""
    if importlib.util.find_spec("libtpu") is None or jax.config.jax_platforms not in (None, "", "tpu"):
        return False
    devices = pathlib.Path("/dev")
    return any(devices.glob("accel*")) or any((devices / "vfio").glob("[0-9]*"))


def tpu_workers(environment: Mapping[str, str]) -> list[str]:
    """The hosts of the TPU slice that this VM is part of, by its metadata; none where there is no such thing."""
    address = environment.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{address}/computeMetadata/v1/instance/attributes/worker-network-endpoints"
    request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # No proxy knows of this machine's metadata.
    try:
        with direct.open(request, timeout=5) as answer:
            return [worker for worker in answer.read().decode().strip().split(",") if worker]
    except OSError:
        return []


def join(distributed: bool | None) -> None:
    """Find the other processes, before anything asks for a device.

    Who they are is said by JAX_COORDINATOR_ADDRESS (of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID together, or by
    the cluster, where jax knows it.

    Args:
      distributed: whether there are others; None: as the environment says.

    Raises:
      ValueError: there are said to be, but nothing tells where.
      ConnectionError: not all of them are there after five minutes.
    """
    if not (expected(os.environ) if distributed is None else distributed):
        return
    count, index = _number(os.environ, "JAX_NUM_PROCESSES"), _number(os.environ, "JAX_PROCESS_ID")
    if count is not None and index is not None and index >= count:
        raise ValueError(f"JAX_PROCESS_ID is {index}: expected below {count}, which JAX_NUM_PROCESSES is")
    _initialize(
        num_processes=count,
        process_id=index,
        # Where all is said, no cluster is asked: Kubernetes wants rights for that, and a TPU's metadata takes time.
        cluster_detection_method="deactivate" if all(os.environ.get(name) for name in _EXPLICIT) else None,
        heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )
    if jax.default_backend() == "cpu":
        # Process 0 alone finds its programs there, and Gloo waits but half a minute for those that compile.
        jax.config.update("jax_enable_compilation_cache", False)


def _initialize(**options: int | str | None) -> None:
    """jax.distributed.initialize, with errors in the place of the abort that it ends a process with."""
    problems: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(**options, initialization_timeout=_JOIN_SECONDS + 60)
        except Exception as error:  # Whatever it is, the caller's thread has to know.
            problems.append(error)

    # jax's own time-out kills the process; this one is shorter, and a thread can be left alone.
    thread = threading.Thread(target=initialize, name="join", daemon=True)
    thread.start()
    thread.join(_JOIN_SECONDS)
    where = os.environ.get("JAX_COORDINATOR_ADDRESS") or "the address that the cluster gives"
    said = ", ".join(f"{name}={os.environ.get(name, '')}" for name in _EXPLICIT)
    if thread.is_alive() or any(not isinstance(problem, ValueError) for problem in problems):
        found = f" ({problems[0]})" if problems else f" within {_JOIN_SECONDS} s"
        raise ConnectionError(
            f"the processes of this run have not found each other at {where}{found}: process 0 listens there. Check "
            "that all of them were started, each with another number, that the port is free and open between the "
            f"machines, and that no proxy stands between them; this one has {said}"
        ) from (problems[0] if problems else None)
    if problems:
        raise ValueError(
            f"this is said to be one of several processes, but not which ({problems[0]}): expected all of "
            f"{', '.join(_EXPLICIT)}, a step of srun, mpirun, or a TPU pod; found {said}. Of one process alone say "
            "--nodistributed"
        ) from problems[0]


def first(function: Callable[[], object]) -> None:
    """Run `function` in process 0 alone, while all others wait for it; all processes have to call together.

    Raises:
      ValueError, OSError: it raised that: every process raises it, with the same message.
    """
    if jax.process_count() == 1:
        function()
        return
    problem: ValueError | OSError | None = None
    if jax.process_index() == 0:
        try:
            function()
        except (ValueError, OSError) as error:
            problem = error
    # Devices would wait for half a minute (Gloo), or as a kernel that takes its time (NCCL); a barrier is patient, and
    # ends with the process that it waits for.
    multihost.get_barrier_sync_fn()(key=f"first_{next(_calls)}", timeout_ms=_LONGEST_MILLISECONDS)
    told = _from_first(_described(problem) if problem else b"")
    if problem:
        raise problem
    if told:
        raise _problem(told)


def _described(problem: ValueError | OSError) -> bytes:
    kind = next(number for number, kind in enumerate(_KINDS) if isinstance(problem, kind))
    return json.dumps([kind, str(problem), getattr(problem, "errno", None)]).encode()


def _problem(described: bytes) -> ValueError | OSError:
    kind, message, number = json.loads(described)
    problem = _KINDS[kind](message)
    if isinstance(problem, OSError):
        problem.errno = number
    return problem


def _from_first(content: bytes) -> bytes:
    """What process 0 says, in every process."""
    _settle()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    if not length:
        return b""
    own = np.frombuffer(content, np.uint8) if content else np.zeros(length, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).tobytes()


def leave(code: int) -> NoReturn:
    """End this process with an exit code, whatever the others do.

    At its end jax waits for the others, which may be waiting for this one, and then aborts all of them, so that an
    error looks like a signal. One of several ends here at once, and the others end when they miss it.
    """
    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def add_up(counts: np.ndarray) -> np.ndarray:
    """int[N], the sum over all processes, which have to call together."""
    if jax.process_count() == 1:
        return counts
    _settle()
    return np.asarray(multihost_utils.process_allgather(counts)).sum(0)


def _settle() -> None:
    """Wait for the step that is under way: on CPUs Gloo mixes up what two programs exchange at once."""
    if jax.default_backend() == "cpu":
        jax.block_until_ready(jax.live_arrays())
