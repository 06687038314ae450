"""One progress bar for everything that takes long: live in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(iterable: Any = None, **options: Any) -> tqdm:
    """A tqdm bar on stderr; where that is no terminal it is printed every 15 seconds, and passing bars not at all."""
    live = sys.stderr.isatty()
    options.setdefault("disable", not live and options.get("leave") is False)
    settings = {"file": sys.stderr, "dynamic_ncols": live, "mininterval": 0.2 if live else 15.0, "smoothing": 0.1}
    return tqdm(iterable, **(settings | ({} if live else {"ascii": True, "ncols": 100}) | options))
