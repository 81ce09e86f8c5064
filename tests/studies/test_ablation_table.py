"""The table of an ablation: the front by hand, rows that are missing or failed, and the same
figures in every file.
"""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor

from studies.ablation_table import Config, main
from studies.ablations.figure import FRONT, spread_equal_speeds
from studies.ablations.rows import mark_pareto_front, read_rows
from wsi_common.config import load_config
from wsi_common.errors import UserError
from wsi_common.metrics.run_bootstrap import format_difference

# name: (tiles/s, AUC of abmil, of mean)
MEASURED = {
    "default": (100.0, 0.90, 0.80),
    "adapter-p": (100.0, 0.85, 0.95),
    "stages-0": (200.0, 0.88, 0.70),
    "stages-2": (80.0, 0.92, 0.60),
    "stain": (50.0, 0.99, 0.90),
    "colour": (900.0, 0.50, 0.50),
}
FAILED = "train_d2vfm: adapter 'x<y>' is unknown, or so"


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Four variants that were measured, one that failed and one that only lacks a benchmark."""
    variants = [
        {"name": n, "factor": n.split("-")[0], "settings": {}}
        for n in [*list(MEASURED)[:4], "adapter-x", "ema-0.9"]
    ]
    plan = {"teacher": "stain", "references": ["colour"], "variants": variants}
    sets = {}
    for name, (speed, abmil, mean) in MEASURED.items():
        entries = {"abmil": {"auc_mean": abmil, "auc_ci": [abmil - 0.1, min(1.0, abmil + 0.1)]}}
        entries["mean"] = {"auc_mean": mean, "auc_ci": None}
        if name != "default":
            entries["abmil"] |= {
                "auc_difference": abmil - 0.9,
                "auc_difference_ci": [abmil - 1, abmil - 0.8],
            }
        sets[name] = entries | {
            "tiles_per_second": speed,
            "gflops": None if name == "stain" else 0.25,
            "parameters": 2_850_199,
        }
    summary = {"feature_sets": sets, "models": ["mean", "abmil"], "headline": "abmil"}
    stages = [
        {"name": "train default", "seconds": 12.5},
        {"name": "train adapter-x", "seconds": None},
    ]
    for name, content in (
        ("study", plan),
        ("mil/summary", summary),
        ("stages", {"stages": stages}),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "students" / "default").mkdir(parents=True)
    agreement = {"cosine": 0.97, "r2": -0.5, "knn_10": 0.25, "epoch": 3}
    (tmp_path / "students" / "default" / "results.json").write_text(json.dumps(agreement))
    quoted = FAILED.removeprefix("train_d2vfm: ")
    (tmp_path / "failures.csv").write_text(
        f'variant,stage,error\nadapter-x,train_d2vfm,"{quoted}"\n'
    )
    return tmp_path


def by_name(study: Path, model: str = "") -> dict[str, dict]:
    return {row["name"]: row for row in read_rows(study, model)[0]}


def test_the_front_by_hand() -> None:
    points = [(1.0, 1.0), (2.0, 2.0), (3.0, 1.0), (2.0, 2.0), None, (3.0, 0.5), (2.0, 1.9)]
    assert mark_pareto_front(points) == [False, True, True, True, False, False, False]
    assert mark_pareto_front([None]) == [False]
    rng = np.random.default_rng(0)
    points = [(float(a), float(b)) for a, b in rng.integers(0, 8, (60, 2))]
    ordered = sorted(
        set(points), reverse=True
    )  # from the fastest on, every new best AUC is on the front
    best = {
        point
        for i, point in enumerate(ordered)
        if all(point[1] > other[1] for other in ordered[:i])
    }
    assert mark_pareto_front(points) == [point in best for point in points]


def test_rows_in_order_with_what_is_known(study: Path) -> None:
    rows, models, model = read_rows(study)
    assert (models, model) == (["mean", "abmil"], "abmil")
    expected = [
        "default",
        "adapter-p",
        "stages-0",
        "stages-2",
        "adapter-x",
        "ema-0.9",
        "stain",
        "colour",
    ]
    assert [row["name"] for row in rows] == expected
    assert [row["kind"] for row in rows] == ["variant"] * 6 + ["teacher", "reference"]
    default, failed, lacking = rows[0], rows[4], rows[5]
    assert (default["cosine"], default["r2"], default["knn_10"], default["seconds"]) == (
        0.97,
        -0.5,
        0.25,
        12.5,
    )
    assert default["auc"]["abmil"] == {
        "mean": 0.9,
        "ci": [0.8, 1.0],
        "difference": None,
        "difference_ci": None,
    }
    assert (
        failed["error"] == FAILED
        and failed["auc"] == {}
        and failed["seconds"] is None
        and failed["gflops"] is None
    )
    assert lacking["error"] == "not in the benchmark"
    assert not any(row["error"] for row in rows if row["name"] in MEASURED)


def test_the_front_is_of_variants_and_of_the_chosen_classifier(study: Path) -> None:
    front = {name for name, row in by_name(study).items() if row["pareto"]}
    assert front == {"default", "stages-0", "stages-2"}, "teacher and reference are no variants"
    assert {name for name, row in by_name(study, "mean").items() if row["pareto"]} == {
        "adapter-p",
        "stages-0",
    }
    with pytest.raises(
        UserError, match="expected a classifier of the benchmark; did you mean 'abmil'"
    ):
        read_rows(study, "abmli")


def test_every_file_has_the_same_figures(study: Path) -> None:
    main(load_config(Config, [f"study={study}", "title=A & B"]))
    with (study / "ablation.csv").open(newline="") as stream:
        table = {row["variant"]: row for row in csv.DictReader(stream)}
    assert list(table) == list(by_name(study))
    row = table["stages-2"]
    assert [float(row[f"auc_abmil_{part}"]) for part in ("mean", "low", "high")] == pytest.approx(
        [0.92, 0.82, 1.0]
    )
    parts = [float(row[f"auc_abmil_difference{part}"]) for part in ("", "_low", "_high")]
    assert parts == pytest.approx([0.02, -0.08, 0.12])
    assert (row["auc_mean_mean"], row["auc_mean_low"], row["tiles_per_second"], row["pareto"]) == (
        "0.6",
        "",
        "80.0",
        "1",
    )
    assert (table["adapter-x"]["error"], table["adapter-x"]["auc_abmil_mean"]) == (FAILED, "")
    markdown = (study / "ablation.md").read_text().splitlines()
    assert len({line.count("|") for line in markdown if line.startswith("|")}) == 1
    shown = (
        "| **stages-2** | - | - | - | 0.600 | 0.920 [0.820, 1.000] | +0.020 [-0.080, +0.120] "
        "| 80 | 0.25 | 2.85M | - |"
    )
    assert shown in markdown
    assert f"- adapter-x: {FAILED}" in markdown
    html = (study / "ablation.html").read_text()
    assert (
        "A &amp; B" in html
        and "x&lt;y&gt;" in html
        and "0.920" in html
        and "+0.020 [-0.080, +0.120]" in html
    )
    assert not re.search(r'(src|href)="(?!data:|#)', html), "whole in itself"
    assert json.loads((study / "ablation.json").read_text())["headline"] == "abmil"
    with Image.open(study / "ablation.png") as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert (
        pixels.shape[1] > 1000
        and (pixels.reshape(-1, 3) == ImageColor.getrgb(FRONT)).all(1).sum() > 100
    ), "the front is drawn"


def test_the_same_inputs_give_the_same_bytes(study: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        main(load_config(Config, [f"study={study}", f"output={tmp_path / name}"]))
    for file in ("ablation.csv", "ablation.md", "ablation.json", "ablation.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_points_of_one_speed_stand_side_by_side() -> None:
    x = spread_equal_speeds(np.array([100.0, 200.0, 100.0, 100.0]), 0.1)
    assert x[1] == pytest.approx(200) and np.log(x[[0, 2, 3]] / 100) == pytest.approx(
        [-0.1, 0, 0.1]
    )


def test_signed_differences() -> None:
    assert format_difference(None, None) == "-"
    assert format_difference(0.0123, None) == "+0.012"
    assert format_difference(-0.5, [-0.75, 0.25]) == "-0.500 [-0.750, +0.250]"


def test_what_is_no_study_is_refused(study: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a study of studies.ablation, found no file"):
        read_rows(tmp_path / "nowhere")
    (study / "study.json").write_text("[]")
    with pytest.raises(UserError, match="found another shape"):
        read_rows(study)


def test_a_study_in_which_nothing_was_measured_is_refused(study: Path) -> None:
    (study / "mil" / "summary.json").write_text(
        json.dumps({"feature_sets": {}, "models": ["mean"], "headline": "mean"})
    )
    with pytest.raises(UserError, match=r"expected a row with AUC \(mean\) and tiles a second"):
        main(load_config(Config, [f"study={study}"]))
    assert not (study / "ablation.csv").exists()
