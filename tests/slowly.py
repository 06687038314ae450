"""The commands on data, with records that take their time in workers, so that there is a middle to stop them in."""

import sys
import time

from blip2_jax.data import __main__ as command
from blip2_jax.data import prepare

_process = prepare.process


def _slowly(*arguments):
    time.sleep(0.05)
    return _process(*arguments)


if __name__ == "__main__":
    command.main(sys.argv[1:])
else:  # A worker, which gets here as it starts.
    prepare.process = _slowly
