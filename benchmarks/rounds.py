"""What the benchmarks share: command line, progress, and rounds in which contestants take turns."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

Call = Callable[[], object]
# case -> contestant -> what was measured -> figure
Figures = dict[str, dict[str, dict[str, float]]]
START = time.perf_counter()


def say(what: str) -> None:
    """Print progress on standard error, with the seconds since the start."""
    print(f"{time.perf_counter() - START:5.0f} s {what}", file=sys.stderr, flush=True)


def make_parser(description: str | None, **numbers: int) -> argparse.ArgumentParser:
    """A parser with a script's docstring as its help, and whole numbers by name and default."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def format_table(figures: dict[str, Figures]) -> str:
    """One line per contestant below the part and the case."""
    lines = []
    for part, cases in figures.items():
        for case, rows in cases.items():
            lines.append(f"{part}: {case}")
            for who, row in rows.items():
                lines.append(f"  {who:24}" + "".join(f" {n} {x:.4g}," for n, x in row.items())[:-1])
    return "\n".join(lines)


def clock(call: Call) -> float:
    """Milliseconds of one call."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def cpu_seconds() -> float:
    """CPU seconds of this process and of those that it has started and that are at work."""
    tasks = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    children = [pid for task in tasks for pid in task.read_text().split()]
    ticks = 0
    for pid in (str(os.getpid()), *children):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure_ratios(
    clocks: Mapping[str, Callable[[], float]], baseline: str, rounds: int
) -> dict[str, tuple[float, float]]:
    """What each clock says over rounds in which all take turns, and how many times as fast as the
    baseline that is, compared within a round: medians, after a warm-up round.
    """
    times = [{name: read() for name, read in clocks.items()} for _ in range(rounds + 1)][1:]
    median = statistics.median
    return {
        name: (
            median(row[name] for row in times),
            median(row[baseline] / row[name] for row in times),
        )
        for name in clocks
    }


def compare(
    contestants: dict[str, Call], clock: Callable[[Call], float], rounds: int
) -> dict[str, float]:
    """Median milliseconds of each over rounds in which all take turns, after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for round_ in range(rounds + 1):
        for name, call in contestants.items():
            elapsed = clock(call)
            if round_:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def measure_rates(calls: dict[str, Callable[[], float]]) -> dict[str, float]:
    """One round: how many items a second each call gets through, by the number that it gives."""
    rates = {}
    for name, call in calls.items():
        start = time.perf_counter()
        rates[name] = call() / (time.perf_counter() - start)
    return rates


def pin_kernels(choose: Callable[[str], bool], kernels: str, call: Call) -> Call:
    """The call with the CPU kernels of one instruction set; `choose` of its op switches to them."""

    def run() -> None:
        choose(kernels)
        call()

    return run
