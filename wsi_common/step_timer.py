"""Where the time of a training loop goes: seconds by part of a step, without slowing the loop.

On CUDA the marks are events in the stream, read when a report is asked for: a part then has the
time that the device was busy with it or waited for it, and what overlaps the device's work costs
nothing.
"""

from __future__ import annotations

import time
from collections import defaultdict

import torch

END = "step"  # the last part of every step


class StepTimes:
    """Stopwatch of a loop; everything between two marks belongs to the later one.

    Args:
        device: where the loop computes.
        images: images of a step.
    """

    def __init__(self, device: torch.device, images: int) -> None:
        self._on_device = device.type == "cuda"
        self._images = images
        self._marks: list[tuple[str, float | torch.cuda.Event]] = [("", self._now())]
        self._seconds: dict[str, float] = defaultdict(float)
        self._steps = 0

    def mark(self, part: str) -> None:
        """What was done since the last mark was `part`; a step ends with the part "step"."""
        self._marks.append((part, self._now()))

    def report(self) -> dict[str, float]:
        """Log entries of the steps since the last report.

        Returns:
            `time/<part>` seconds a step, `time/images_per_second`, and `time/data_share`, the share
            spent waiting for images.
        """
        seconds, steps = self._read()
        for part, value in seconds.items():
            self._seconds[part] += value
        self._steps += steps
        return self._entries(seconds, steps)

    def whole(self) -> dict[str, float]:
        """The same for all steps."""
        self.report()
        return self._entries(self._seconds, self._steps)

    def _read(self) -> tuple[dict[str, float], int]:
        if self._on_device:
            torch.cuda.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (_, before), (part, after) in zip(self._marks, self._marks[1:]):
            seconds[part] += _between(before, after)
        steps = sum(part == END for part, _ in self._marks[1:])
        self._marks = [("", self._marks[-1][1])]
        return seconds, steps

    def _entries(self, seconds: dict[str, float], steps: int) -> dict[str, float]:
        if not steps:
            return {}
        total = sum(seconds.values())
        parts = {f"time/{part}": value / steps for part, value in seconds.items()}
        return parts | {
            "time/images_per_second": steps * self._images / total,
            "time/data_share": seconds.get("data", 0.0) / total,
        }

    def _now(self) -> float | torch.cuda.Event:
        if not self._on_device:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between(before: float | torch.cuda.Event, after: float | torch.cuda.Event) -> float:
    """Seconds."""
    return (
        before.elapsed_time(after) / 1e3 if isinstance(before, torch.cuda.Event) else after - before
    )
