"""Train: python -m blip2_jax.main --config=configs/stage1.py --workdir=DIR

A config may name a variant (configs/stage1.py:nano_long), and every setting can be changed on the command line
(--config.batch_size=64). The same command goes on where an interrupted run stopped. On several machines, start it on
each; the workdir is one folder that all of them see.

It exits with 0 when the run is at its end, with 130 after Ctrl-C, with 75 where the same command should be started
again (after SIGTERM, as of a machine that is taken away, or the loss of another process), and with 1 after an error.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from blip2_jax import configuration, environment, trainer
from blip2_jax.checkpoints import downloads
from blip2_jax.parallel import processes

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "What to train: a file of configs/, :VARIANT behind it.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the report of the run go.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", None, "Whether this is one of several processes; by default what the environment says."
)
_AGAIN = 75  # EX_TEMPFAIL: launchers start the same command again.
flags.mark_flags_as_required(["config", "workdir"])


def main(_argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file it renames.
    jax.config.update("jax_compilation_cache_dir", str(downloads.cache_directory() / "compiled"))
    try:
        processes.join(_DISTRIBUTED.value)
        with open(os.devnull, "w") as nowhere, contextlib.ExitStack() as stack:
            if jax.process_index():
                stack.enter_context(contextlib.redirect_stderr(nowhere))  # One process tells; all tell of errors.
            print(environment.report(_WORKDIR.value), file=sys.stderr)
            trainer.train(_CONFIG.value, _WORKDIR.value)
    except trainer.Interrupted as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        sys.exit(130 if stopped.signal == signal.SIGINT else _AGAIN)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        processes.leave(1)
    except Exception as error:
        if jax.process_count() == 1:
            raise
        traceback.print_exc()
        if isinstance(error, jax.errors.JaxRuntimeError):  # What a process sees of it when another one is gone.
            print("another process was lost; the same command goes on from the last checkpoint", file=sys.stderr)
            processes.leave(_AGAIN)
        processes.leave(1)


if __name__ == "__main__":
    app.run(main, flags_parser=configuration.parse_flags)
