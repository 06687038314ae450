"""Commands on data.

python -m blip2_jax.data prepare --source SOURCE --output DIR    # any source to sharded ArrayRecord
python -m blip2_jax.data preview --config FILE --output FILE     # the first batches as the model sees them
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from blip2_jax.data import beam, workers
from blip2_jax.data.corpus import Corpus, Engine
from blip2_jax.data.filters import Filters, filters
from blip2_jax.data.prepare import Settings, facts_file, make_plan
from blip2_jax.data.statistics import table

_PREPARE = """Write a source as a corpus: ArrayRecord files, what is in them, and what was left out.

The records go to DIR/*.arrayrecord, to be named as --config.data.train=arrayrecord:'DIR/*.arrayrecord'. Beside them
are corpus.json (where they come from), statistics.json, rejects.jsonl and contact_sheet.jpg. Interrupted or killed, the
same command goes on."""


def _number(kind: type, expected: str, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """A parser of numbers from `low` to `high`."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")
        return value

    return parse


_WHOLE = _number(int, "a whole number from 1 up", 1)
_SIZE = _number(float, "a number of megabytes from 0.001 up", 0.001)
_SHARE = _number(float, "a share from 0 to 1", 0, 1)


_FILTERS = [field.name for field in dataclasses.fields(Filters)]


def _filter(text: str) -> tuple[str, Any]:
    """A name, and a number where it is one."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, found {text!r}")
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return name, kind(value)
    return name, value


def _prepare_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blip2_jax.data prepare",
        description=_PREPARE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--source", required=True, help="what to read, such as folder:DIR")
    add("--output", required=True, type=pathlib.Path, metavar="DIR", help="the folder of the corpus")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--shards", type=_WHOLE, metavar="N", help="how many files")
    size.add_argument("--shard_megabytes", type=_SIZE, default=256, metavar="MB", help="the size of a file (256)")
    chosen = f"which images and captions are kept, such as min_side=64 scripts=latin: {', '.join(_FILTERS)}"
    add("--filters", nargs="*", type=_filter, metavar="NAME=VALUE", help=chosen)
    add("--shuffle", action="store_true", help="put the records in a random order")
    add("--seed", type=int, default=0, help="of that order (0)")
    smaller = "make images smaller whose shorter side has more pixels (JPEG of quality 92)"
    add("--resize", type=_WHOLE, default=0, metavar="SIDE", help=smaller)
    check = "decode every image, and leave out those that cannot be used; otherwise look at headers alone"
    add("--check", action=argparse.BooleanOptionalAction, default=True, help=check)
    allowed = "of the records that may be unusable (0.1)"
    add("--max_rejected", type=_SHARE, default=0.1, metavar="SHARE", help=allowed)
    engines = "processes on this machine, or Apache Beam"
    add("--engine", choices=("local", "beam"), default="local", help=engines)
    add("--workers", type=_WHOLE, default=os.cpu_count(), metavar="N", help="processes on this machine (one a core)")
    add("--runner", default="DirectRunner", help="of Beam (DirectRunner: this machine); its own flags follow after --")
    return parser


def _engine(options: argparse.Namespace, flags: Sequence[str], is_done: Callable[[int], bool]) -> Engine:
    if options.engine == "local":
        if flags:
            raise ValueError(f"{' '.join(flags)} behind --: only --engine=beam has flags of its own")
        return functools.partial(workers.share_out, count=options.workers)
    beam.require_beam()
    chosen = {"is_done": is_done, "runner": options.runner, "workers": options.workers, "flags": flags}
    return functools.partial(beam.share_out, **chosen)


def prepare(arguments: Sequence[str]) -> None:
    """Write a corpus, as the command line says.

    Raises:
      ImportError, OSError, ValueError: what went wrong, in words for the user.
      KeyboardInterrupt: SIGINT or SIGTERM came; nothing half-written is left.
    """
    own, separator, flags = list(arguments), "--", []
    if separator in own:
        own, flags = own[: own.index(separator)], own[own.index(separator) + 1 :]
    options = _prepare_parser().parse_args(own)
    chosen = None if options.filters is None else filters(dict(options.filters))
    settings = Settings(options.check, chosen, options.resize, options.seed if options.shuffle else None)
    plan, size = make_plan(options.source, settings, options.shards, options.shard_megabytes)
    corpus = Corpus(plan, options.output.absolute(), size, options.max_rejected)
    engine = _engine(options, flags, lambda number: facts_file(plan, corpus.folder, number).exists())
    print(table(corpus.write(engine)))
    print(f"\nto train on it: --config.data.train='{corpus.source}'")


def preview(arguments: Sequence[str]) -> None:
    """Write the page of a recipe's first batches, as the command line says.

    Raises:
      OSError, ValueError: what went wrong, in words for the user.
    """
    # These bring jax with them, which `prepare` and its workers do without.
    import jax
    from absl import flags
    from ml_collections import config_flags

    from blip2_jax.data import preview

    jax.config.update("jax_platforms", "cpu")  # Accelerators may be busy with training.
    command, values = ["python -m blip2_jax.data preview", *arguments], flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config", None, "A recipe: a file of configs/, :VARIANT behind it.", values, sys_argv=command
    )
    output = flags.DEFINE_string("output", None, "The HTML file to write.", flag_values=values)
    batches = flags.DEFINE_integer("batches", 2, "How many.", lower_bound=1, flag_values=values)
    rows = flags.DEFINE_integer("rows", 128, "Of each batch, at most.", lower_bound=1, flag_values=values)
    if {"-h", "--help", "--helpfull"} & set(arguments):
        print(f"{preview.__doc__}\nflags:\n{values.main_module_help() or values}")
        return
    try:
        unknown = values(command)[1:]
    except (flags.Error, AttributeError) as error:  # The latter of a setting that there is not.
        raise ValueError(str(error)) from error
    if unknown or config.value is None or not output.value:
        found = f", found {' '.join(unknown)}" if unknown else ""
        raise ValueError(f"preview needs --config=FILE and --output=FILE and nothing else{found}")
    file = pathlib.Path(output.value)
    preview.write(config.value, file, batches.value, rows.value)
    print(f"wrote {file}")


def main(arguments: Sequence[str]) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Both stop alike.
    try:
        if arguments[:1] == ["prepare"]:
            prepare(arguments[1:])
        elif arguments[:1] == ["preview"]:
            preview(arguments[1:])
        else:
            sys.exit(__doc__)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except (ImportError, OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
