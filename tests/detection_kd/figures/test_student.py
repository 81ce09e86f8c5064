"""Pictures of a student beside its teacher: where points lie, what is named, and the cases with too
little to draw.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.decomposition import PCA

from detection_kd import train_d2vfm
from detection_kd.figures.student import (
    draw_learning_curves,
    draw_planes,
    draw_r2,
    project_on_principal_plane,
)
from detection_kd.figures.student_report import write_report
from tests.detection_kd.d2vfm_runs import arguments
from wsi_common.cli import run
from wsi_common.planes import OTHERS, name_groups

RNG = np.random.default_rng(0)
TEACHER = (RNG.normal(size=(40, 6)) * [5, 3, 1, 1, 1, 1]).astype(np.float32)


def test_the_plane_is_the_teachers() -> None:
    (teacher, student), labels = project_on_principal_plane(TEACHER + 1, TEACHER)
    plane = PCA(2, svd_solver="full").fit(TEACHER)
    assert np.allclose(teacher, plane.transform(TEACHER), atol=1e-4)
    assert np.allclose(student - teacher, plane.components_ @ np.ones(6), atol=1e-4), (
        "shifted by the same everywhere"
    )
    assert (
        labels[0]
        == f"PC 1 of the teacher ({plane.explained_variance_ratio_[0]:.0%} of its variance)"
    )


def test_points_and_names_of_the_panels() -> None:
    groups = ["a"] * 30 + ["b$"] * 10
    figure = draw_planes(TEACHER, TEACHER, groups, "label")
    left, right = figure.axes
    assert (left.get_title(), right.get_title()) == (
        "teacher, 40 tiles",
        "student, mean cosine 1.000",
    )
    assert left.get_xlim() == right.get_xlim()
    for panel in (left, right):
        assert [len(points.get_offsets()) for points in panel.collections] == [30, 10]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["a", r"b\$"] and figure.legends[0].get_title().get_text() == "label"


def test_groups_beyond_the_colours_are_others() -> None:
    groups = [str(i) for i in range(9) for _ in range(9 - i)]
    shown = name_groups(groups)
    assert sorted(set(shown)) == ["0", "1", "2", "3", "4", "5", OTHERS]
    assert shown[-1] == OTHERS and name_groups(["x", "y"]) == ["x", "y"]


def test_umap_is_a_second_row_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fitted:
        embedding_ = TEACHER[:, :2]

        def transform(self, x: np.ndarray) -> np.ndarray:
            return x[:, 2:4]

    module = ModuleType("umap")
    module.UMAP = lambda **_: SimpleNamespace(fit=lambda _: Fitted())  # type: ignore[attr-defined]
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "umap", module)
    figure = draw_planes(TEACHER, TEACHER, ["a"] * 40)
    assert len(figure.axes) == 4 and figure.axes[2].get_xlabel() == "UMAP 1 of the teacher"


def test_curves_mark_the_best_epoch_and_leave_out_what_was_not_measured() -> None:
    epochs = [
        {"epoch": i, "loss": 3.0 / i, "cosine": c, "r2": 0.1, "cka": 0.2}
        for i, c in ((1, 0.5), (2, 0.9), (3, 0.8))
    ]
    figure = draw_learning_curves(epochs)
    loss, agreement, neighbours = figure.axes
    assert loss.lines[0].get_xdata()[0] == 2 and loss.lines[1].get_ydata().tolist() == [
        3.0,
        1.5,
        1.0,
    ]
    texts = [text.get_text() for text in agreement.get_legend().get_texts()]
    assert texts == ["cosine  0.900", "r2  0.100", "cka  0.200"]
    assert len(neighbours.lines) == 1 and neighbours.get_legend() is None


def test_r2_histogram_counts_every_dimension() -> None:
    axes = draw_r2(np.array([0.2, 0.9, -3.0, np.nan])).axes[0]
    assert sum(bar.get_height() for bar in axes.patches) == 3 and axes.patches[0].get_height() == 1
    assert axes.get_title() == "3 dimensions, 1 below -0.5"


@pytest.mark.parametrize("tiles", [1, 2])
def test_a_report_on_next_to_nothing(tiles: int, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"epoch": 1, "loss": 1.0, "cosine": 0.5, "r2": 0.0, "cka": 0.0}\n'
    )
    features = torch.randn(tiles, 3)
    write_report(tmp_path, features, features, ["S0"] * tiles, {}, True)
    assert (tmp_path / "student_vs_teacher.png").is_file() == (tiles > 1)
    assert (tmp_path / "r2_by_dimension.csv").read_text().count(",,") == (3 if tiles == 1 else 0)


def test_a_training_leaves_its_pictures(
    pairs_root: Path, backbone_path: Path, tmp_path: Path
) -> None:
    (tmp_path / "labels.csv").write_text("case_id,slide_id,label\nC,S0,ill\nC,S1,well\nC,S2,well\n")
    settings = ["epochs=1", "figures=true", f"labels={tmp_path}/labels.csv"]
    assert (
        run(
            train_d2vfm.main,
            train_d2vfm.Config,
            arguments(pairs_root, backbone_path, tmp_path / "run", *settings),
        )
        == 0
    )
    for name in ("student_vs_teacher", "learning_curves", "r2_by_dimension"):
        with Image.open(tmp_path / "run" / f"{name}.png") as picture:
            assert np.asarray(picture).std() > 5
