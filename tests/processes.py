"""Commands as several processes on this machine that find each other, with fake devices of their own."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import IO, NamedTuple


class Ended(NamedTuple):
    """How a process ended, and what it wrote; that of the first is empty where it was shown."""

    code: int
    output: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run(
    command: Sequence[str], count: int, devices: int, show_first: bool = False, timeout: float = 900, **more: str
) -> list[Ended]:
    """python -m `command` in `count` processes of together so many fake devices; when one fails the others are ended.

    Args:
      command: module and arguments.
      count: of processes; 1 is alone.
      devices: of all of them together.
      show_first: the first writes to where this process does.
      timeout: seconds, after which all are ended.
      more: environment variables.
    """
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices // count), "JAX_PLATFORMS": "cpu"} | more
    if count > 1:
        environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": str(count)}
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(count)]
        running = [
            subprocess.Popen(
                [sys.executable, "-m", *command],
                env=environment | {"JAX_PROCESS_ID": str(number)},
                stdout=None if show_first and not number else output,
                stderr=None if show_first and not number else subprocess.STDOUT,
            )
            for number, output in enumerate(outputs)
        ]
        try:
            _wait(running, time.monotonic() + timeout)
        finally:
            for process in running:
                process.kill()
                process.wait()
        return [Ended(process.returncode, _written(output)) for process, output in zip(running, outputs, strict=True)]


def _wait(running: Sequence[subprocess.Popen], deadline: float) -> None:
    """Until all have ended, one has failed, or it is too late."""
    while any(process.poll() is None for process in running) and time.monotonic() < deadline:
        if any(process.poll() for process in running):
            time.sleep(5)  # The others may be about to say why.
            return
        time.sleep(0.2)


def _written(output: IO[str]) -> str:
    output.seek(0)
    return output.read()
