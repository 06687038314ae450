"""The folder of a run: one run at a time, of one configuration."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import socket
import time
from collections.abc import Iterator
from typing import Any, TextIO

from blip2_jax import files, lease, params
from blip2_jax.checkpoints.store import read_config
from blip2_jax.parallel import processes

# Settings that do not change what is learnt, so that a run may go on with others: where and how it is computed, and
# what is told of it.
FREE = re.compile(
    r"mesh|shard_trainable|pieces|objective/(block|exchange)|model/(remat|unroll)|llm_remat"
    r"|(log|checkpoint|eval)_every|keep_.*|watchdog_minutes|max_skipped_in_a_row|(evaluation|profile|wandb|alarms)/.*"
    r"|data/(threads|workers|max_rejected|eval|features)"
)


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[None]:
    """A workdir, made if need be, that belongs to this run until it ends, however it ends.

    The first process of a run holds it: by a lock, which the kernel frees, and in an object store also by a lease,
    which it has to renew. A workdir in which nothing came to be is gone afterwards.

    Raises:
      BlockingIOError: another run has it.
    """
    with contextlib.ExitStack() as held:
        processes.first(lambda: held.enter_context(_hold(workdir)))
        yield


@contextlib.contextmanager
def _hold(workdir: pathlib.Path) -> Iterator[None]:
    holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    file = workdir / "run.lock"
    with contextlib.ExitStack() as held:
        while True:
            workdir.mkdir(parents=True, exist_ok=True)
            stream = held.enter_context(file.open("a+"))
            _lock(stream, workdir)
            with contextlib.suppress(FileNotFoundError):  # A run that ended just now has removed it.
                if os.path.samestat(file.stat(), os.fstat(stream.fileno())):
                    break
        stream.truncate(0)
        print(holder, file=stream, flush=True)
        if files.in_object_store(workdir):
            held.enter_context(lease.leased(workdir / "run.lease", holder))
        try:
            yield
        finally:
            if workdir.exists() and {other.name for other in workdir.iterdir()} <= {"run.lock", "run.lease"}:
                file.unlink()
                held.close()
                workdir.rmdir()


def _lock(stream: TextIO, workdir: pathlib.Path) -> None:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        raise BlockingIOError(
            f"{workdir} is in use by another run ({stream.read().strip() or 'unknown'}): wait until it ends, stop it, "
            "or choose another --workdir"
        ) from None


def refuse_other_configuration(workdir: pathlib.Path, resolved: dict[str, Any]) -> None:
    """Raise ValueError if the workdir belongs to a run that learns otherwise: settings differ that are not FREE."""
    if not (workdir / "config.json").exists():
        return
    known, asked = (params.flatten(config) for config in (read_config(workdir), resolved))
    lines = files.differences(
        {name: value for name, value in known.items() if not FREE.fullmatch(name)},
        {name: value for name, value in asked.items() if not FREE.fullmatch(name)},
    )
    if lines:
        raise ValueError(
            f"{workdir} belongs to a run of another configuration:\n"
            + "\n".join(lines)
            + "\nChoose another --workdir, or give the run the settings it was started with."
        )
