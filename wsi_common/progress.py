"""Progress of anything longer than seconds: a tqdm bar at a terminal, a plain line every so often
elsewhere.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Progress:
    """A counter with rate and remaining time; use as a context manager and call `advance`."""

    def __init__(
        self,
        label: str,
        total: int,
        unit: str,
        *,
        enabled: bool = True,
        every_seconds: float = 15.0,
    ) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.count = 0
        self._start = self._said = time.monotonic()
        self._every = every_seconds
        self._enabled = enabled
        terminal = enabled and sys.stderr.isatty()
        self._bar = (
            tqdm(total=total, desc=label, unit=unit, dynamic_ncols=True) if terminal else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, amount: int = 1) -> None:
        """Count `amount` more units as done."""
        self.count += amount
        if self._bar is not None:
            self._bar.update(amount)
            return
        now = time.monotonic()
        if self._enabled and now - self._said >= self._every:
            self._said = now
            rate = self.count / (now - self._start)
            remaining = (self.total - self.count) / rate if rate else float("inf")
            logger.info(
                "%s: %d/%d %s, %.1f/s, %.0f s left",
                self.label,
                self.count,
                self.total,
                self.unit,
                rate,
                remaining,
            )


def progress(
    items: Iterable[T], label: str, total: int, unit: str = "it", *, enabled: bool = True
) -> Iterator[T]:
    """Iterate with progress."""
    with Progress(label, total, unit, enabled=enabled) as counter:
        for item in items:
            yield item
            counter.advance()


def describe_values(values: Mapping[str, float], names: Sequence[str], digits: int) -> str:
    """Format those of the named values that are there, for one line of the log."""
    return ", ".join(f"{name} {values[name]:.{digits}f}" for name in names if name in values)
