"""Progress of a long measurement on standard error, so that its table or JSON can be piped."""

from __future__ import annotations

import sys
import time

START = time.perf_counter()


def say(what: str) -> None:
    """Progress, with the seconds since the start."""
    print(f"{time.perf_counter() - START:5.0f} s {what}", file=sys.stderr, flush=True)
