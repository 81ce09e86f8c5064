"""What a finished D2VFM training leaves: R2 of every dimension as a table, and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from detection_kd.evaluation.feature_agreement import compute_r2_by_dimension
from wsi_common.files import write_csv

COLUMNS = ("dimension", "r2", "teacher_std")


def write_report(
    folder: Path,
    student: Float[Tensor, "n d"],
    teacher: Float[Tensor, "n d"],
    slides: Sequence[str],
    labels: Mapping[str, str],
    figures: bool,
) -> None:
    """Write `r2_by_dimension.csv` (empty where the teacher does not vary) and, with `figures`,
    those of `detection_kd.figures.student`.

    Args:
        folder: run directory with `metrics.jsonl`.
        student, teacher: features of the validation tiles at the best epoch.
        slides: slide of every tile.
        labels: label by slide; empty: tiles are coloured by slide.
        figures: whether to draw.
    """
    r2 = compute_r2_by_dimension(student, teacher).tolist()
    spread = teacher.std(dim=0, correction=0).tolist()
    rows = [
        {
            "dimension": i,
            "r2": "" if math.isnan(value) else f"{value:.6f}",
            "teacher_std": f"{deviation:.6g}",
        }
        for i, (value, deviation) in enumerate(zip(r2, spread, strict=True))
    ]
    write_csv(folder / "r2_by_dimension.csv", COLUMNS, rows)
    if not figures:
        return
    from detection_kd.figures.student import (
        write_student_figures,
    )  # matplotlib and scikit-learn load for seconds

    groups = [labels.get(slide, "no label") if labels else slide for slide in slides]
    epochs = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    features = (student.cpu().numpy(), teacher.cpu().numpy())
    write_student_figures(
        folder, *features, groups, np.asarray(r2), epochs, "label" if labels else "slide"
    )
