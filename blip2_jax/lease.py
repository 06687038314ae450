"""A lease on a folder in an object store, where the kernel's locks end at the machine that takes them.

The holder writes another number into a file every so often. Who finds the file waits whether that goes on, so that no
two clocks are compared, and takes the folder over if it does not.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator

PERIOD = 15.0  # Seconds from one renewal to the next.
MISSED = 4  # Renewals, after which the holder is gone.


@contextlib.contextmanager
def leased(file: pathlib.Path, holder: str, lost: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold the lease that lies in `file`.

    Args:
      file: of the lease; its folder exists.
      holder: a name for others to read.
      lost: is called, from another thread, when somebody else has taken the lease, as may happen to a machine that was
        suspended; by default it ends this process at once, before it writes anything more.

    Raises:
      BlockingIOError: somebody has it.
    """
    own = f"{holder} {secrets.token_hex(8)}"
    _wait_until_free(file)
    file.write_text(f"{own} 0")
    time.sleep(PERIOD / 5)  # Of two that found it free at once, one has written last.
    if not _read(file).startswith(own):
        raise BlockingIOError(_taken(file))
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(file, own, ended, lost or _end), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if _read(file).startswith(own):
            file.unlink()


def _read(file: pathlib.Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def _wait_until_free(file: pathlib.Path) -> None:
    before = _read(file)
    if before:
        seconds = MISSED * PERIOD
        print(
            f"{file}: waiting {seconds:g} s to see whether its holder is gone ({before})", file=sys.stderr, flush=True
        )
    for _ in range(MISSED if before else 0):
        time.sleep(PERIOD)
        now = _read(file)
        if not now:
            return
        if now != before:
            raise BlockingIOError(_taken(file))


def _taken(file: pathlib.Path) -> str:
    return (
        f"{file.parent} is in use by another run ({_read(file) or 'unknown'}): wait until it ends, stop it, or choose "
        "another --workdir"
    )


def _renew(file: pathlib.Path, own: str, ended: threading.Event, lost: Callable[[], None]) -> None:
    number = 0
    while not ended.wait(PERIOD):
        number += 1
        # Storage may fail for a while; the lease lasts longer.
        with contextlib.suppress(OSError):
            if not _read(file).startswith(own):
                print(f"{_taken(file)}; this one ends", file=sys.stderr, flush=True)
                lost()
                return
            file.write_text(f"{own} {number}")


def _end() -> None:
    os._exit(1)
