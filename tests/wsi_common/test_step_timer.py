"""Where a loop's time goes: every second belongs to one part, reports do not overlap."""

from __future__ import annotations

import pytest
import torch

from wsi_common import step_timer as step_times
from wsi_common.step_timer import StepTimes


def test_parts_of_steps_by_a_clock_of_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 4.5, 6.5, 7.5, 9.0])
    monkeypatch.setattr(step_times.time, "perf_counter", lambda: next(clock))
    times = StepTimes(torch.device("cpu"), images=8)
    assert times.report() == {}
    for part in ("data", "forward", "step", "data", "forward", "forward", "step"):
        times.mark(part)
    # data 1.0 + 0.5, forward 2.0 + 2.0 + 1.0, step 1.0 + 1.5, over 2 steps
    expected = {"time/data": 0.75, "time/forward": 2.5, "time/step": 1.25}
    report = times.report()
    assert {name: report[name] for name in expected} == pytest.approx(expected)
    assert report["time/images_per_second"] == pytest.approx(16 / 9) and report[
        "time/data_share"
    ] == pytest.approx(1.5 / 9)
    assert times.report() == {} and times.whole() == pytest.approx(report)
