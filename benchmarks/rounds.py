"""What the benchmarks share: command line, progress, and rounds in which contestants take turns."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

Call = Callable[[], object]
START = time.perf_counter()


def say(what: str) -> None:
    """Progress on standard error, so that a table or JSON can be piped; with the seconds since the
    start.
    """
    print(f"{time.perf_counter() - START:5.0f} s {what}", file=sys.stderr, flush=True)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a script's docstring as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def clock(call: Call) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def compare(
    contestants: dict[str, Call], clock: Callable[[Call], float], rounds: int
) -> dict[str, float]:
    """Median milliseconds of each over rounds in which all take turns, after one round that does
    not count.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, call in contestants.items():
            elapsed = clock(call)
            if round_:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def pin_kernels(choose: Callable[[str], bool], kernels: str, call: Call) -> Call:
    """The call with the CPU kernels of one instruction set; `choose` of its op switches to them."""

    def run() -> None:
        choose(kernels)
        call()

    return run
