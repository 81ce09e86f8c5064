"""The student's benchmark on tiny stand-ins: what it prints and keeps, ratios by hand, verdicts at
the bar.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import student
from benchmarks.student import BARS, best, contestants, parse, ratios, verdicts


def test_ratios_are_medians_of_the_ratios_within_a_round_each_side_in_its_faster_form() -> None:
    a = parse(
        [
            "--stages",
            "1",
            "--models",
            "vit_b16",
            "--forms",
            "published",
            "fp32",
            "onnx",
            "--compile",
            "--bf16",
        ]
    )
    names = [
        "student_n1 published",
        "student_n1 fp32",
        "student_n1 fp32 compiled",
        "student_n1 bf16",
        "student_n1 onnx",
    ]
    names += ["vit_b16 fp32", "vit_b16 fp32 compiled", "vit_b16 bf16", "vit_b16 onnx"]
    table = [
        [4.0, 10.0, 12.0, 8.0, 20.0, 3.0, 2.0, 2.0, 5.0],
        [5.0, 20.0, 12.0, 9.0, 10.0, 4.0, 8.0, 3.0, 5.0],
        [6.0, 18.0, 30.0, 9.0, 30.0, 6.0, 5.0, 1.0, 5.0],
    ]
    found = ratios([dict(zip(names, row, strict=True)) for row in table], a)
    # fp32: 12/3, 20/8, 30/6; the ratio of the medians would be 20/6
    assert found == pytest.approx(
        {
            "student_n1 fp32 / student_n1 published": 4.0,  # of 12/4, 20/5, 30/6
            "student_n1 fp32 / vit_b16 fp32": 4.0,
            "student_n1 onnx / student_n1 published": 5.0,  # of 20/4, 10/5, 30/6
            "student_n1 onnx / vit_b16 fp32": 5.0,  # of 20/3, 10/8, 30/6
            "student_n1 onnx / vit_b16 onnx": 4.0,  # of 20/5, 10/5, 30/5
            "student_n1 bf16 / student_n1 published": 1.8,  # of 8/4, 9/5, 9/6
            "student_n1 bf16 / vit_b16 bf16": 4.0,  # of 8/2, 9/3, 9/1
        }
    )
    assert (
        best(
            {"vit_b16 fp32": 1.0, "vit_b16 fp32 compiled": 2.0, "vit_b16 bf16": 9.0},
            "vit_b16",
            "fp32",
        )
        == 2.0
    )


def test_bars_are_met_at_their_edge_and_between_equals_only() -> None:
    bar = BARS[("student_n1", "vit_b16")]
    found = {
        "student_n1 fp32 / vit_b16 fp32": bar,
        "student_n1 onnx / vit_b16 onnx": bar - 1e-6,
        "student_n1 int8 / vit_b16 fp32": 100.0,
        "student_n1 onnx / vit_b16 fp32": 100.0,
        "student_n0 fp32 / vit_b16 fp32": 100.0,
        "student_n1 fp32 / vit_g14 fp32": BARS[("student_n1", "vit_g14")] + 1,
    }
    assert verdicts(found) == {
        "student_n1 fp32 / vit_b16 fp32": True,
        "student_n1 onnx / vit_b16 onnx": False,
        "student_n1 fp32 / vit_g14 fp32": True,
    }


def test_contestants_follow_the_options() -> None:
    a = parse(
        [
            "--stages",
            "1",
            "--models",
            "vit_b16",
            "vit_g14",
            "--forms",
            "fp32",
            "onnx",
            "--native",
            "--compile",
        ]
    )
    assert contestants(a) == [
        ("student_n1", "fp32"),
        ("student_n1", "onnx"),
        ("student_n1", "fp32 compiled"),
        ("student_n1@256", "fp32"),
        ("student_n1@256", "onnx"),
        ("vit_b16", "fp32"),
        ("vit_b16", "fp32 compiled"),
        ("vit_g14", "fp32"),
        ("vit_b16", "onnx"),
    ]


class Small(nn.Module):
    """Stands in for every network: a layer as wide as the contestant."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, 7, stride=8)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.convolution(pixels.float() / 255).relu().mean((2, 3))


@pytest.mark.process
def test_a_run_prints_and_keeps_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        student, "build", lambda model, form="fp32": Small(student.DIM).eval().requires_grad_(False)
    )
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # of this whole process
    kept = tmp_path / "student.json"
    options = [
        "--stages",
        "1",
        "--models",
        "vit_b16",
        "--forms",
        "published",
        "fp32",
        "--rounds",
        "2",
        "--batch",
        "2",
    ]
    student.main([*options, "--tiles", "4", "--workers", "0", "--json", "--output", str(kept)])
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert json.loads(kept.read_text()) == report
    assert list(report["contestants"]) == [
        "student_n1 published",
        "student_n1 fp32",
        "vit_b16 fp32",
    ]
    rows = report["contestants"]
    assert all(row["tiles_per_second"] > 0 for row in rows.values())
    assert (
        rows["student_n1 fp32"]["slides_per_hour"] > 0
        and "slides_per_hour" not in rows["student_n1 published"]
    )
    cells, weights = 28 * 28, 3 * 7 * 7 * student.DIM
    assert rows["vit_b16 fp32"]["gflops"] == pytest.approx(2 * cells * weights / 1e9)
    assert rows["vit_b16 fp32"]["parameters_m"] == pytest.approx((weights + student.DIM) / 1e6)
    rounds = report["rounds"]
    assert len(rounds) == 2 and report["arguments"]["rounds"] == 2
    ratio = sum(one["student_n1 fp32"] / one["vit_b16 fp32"] for one in rounds) / 2
    assert report["ratios"]["student_n1 fp32 / vit_b16 fp32"] == pytest.approx(ratio)
    assert report["met"] == {"student_n1 fp32 / vit_b16 fp32": ratio >= 4}
    assert "round 2" in printed.err and "end to end" in printed.err
    student.main([*options, "--tiles", "0"])
    assert "student_n1 fp32 / vit_b16 fp32" in capsys.readouterr().out


@pytest.mark.process
def test_peak_memory_is_that_of_a_fresh_process() -> None:
    a = parse(["--batch", "1"])
    assert 100 < student.peak_memory("resnet50_layer3", "fp32", a) < 5000
