"""The slide-level tasks of INTELLIGENS run by their configurations on files in its published layout: a table, splits and
one tensor per slide.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from mil.benchmark import Config, main
from tests.helpers import ROOT
from wsi_common.cli import run

CLASSES = {  # as its tables name them
    "brca": ("IDC", "ILC"),
    "c16": ("normal", "tumor"),
    "nsclc": ("LUAD", "LUSC"),
    "panda": ("grades0", "grades1"),
    "rcc": ("CCRCC", "CHRCC", "PRCC"),
}
MODELS = {"c16": ["clam_sb", "clam_mb", "dtfd", "abmil"], "rcc": ["clam_mb", "dtfd"]}  # else one
SIZES = {"train": 4, "val": 2, "test": 3}  # slides per class
FAST = (
    "recipes={clam_sb: {epochs: 1, min_epochs: 1}, clam_mb: {epochs: 1, min_epochs: 1}}",
    "training.epochs=1", "training.min_epochs=1", "resamples=20", "isolated=false", "device=cpu",
    "threads=1",
)  # fmt: skip


def write_task(folder: Path, classes: tuple[str, ...], *, index: bool) -> None:
    """Table, the splits of one fold and bags; the shorter columns of the splits end in blanks."""
    rng, rows = np.random.default_rng(0), []
    columns: dict[str, list[str]] = {name: [] for name in SIZES}
    (folder / "bags").mkdir(parents=True)
    (folder / "splits").mkdir()
    for number, label in enumerate(classes):
        for name, count in SIZES.items():
            for slide in (f"{label}-01Z.DX{name}.{copy}" for copy in range(count)):
                bag = rng.normal(size=(rng.integers(3, 12), 16)) + 2 * np.eye(16)[number]
                torch.save(torch.from_numpy(bag).float(), folder / "bags" / f"{slide}.pt")
                rows.append((slide, slide, label))
                columns[name].append(slide)
    longest = max(map(len, columns.values()))
    padded = [[*ids, *[""] * (longest - len(ids))] for ids in columns.values()]
    with (folder / "labels.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([("case_id", "slide_id", "label"), *rows])
    with (folder / "splits" / "splits_0.csv").open("w", newline="") as stream:
        front = [[""], *([place] for place in range(longest))]
        lines = [list(SIZES), *map(list, zip(*padded, strict=True))]
        both = zip(front, lines, strict=True)
        csv.writer(stream).writerows([*([*a, *b] if index else b for a, b in both)])


@pytest.mark.process
@pytest.mark.parametrize("task", list(CLASSES))
def test_a_task_is_trained_and_judged_by_its_configuration(task: str, tmp_path: Path) -> None:
    write_task(tmp_path, CLASSES[task], index=task != "c16")
    config = ROOT / "configs" / "intelligens" / f"{task}.yaml"
    paths = [f"labels={tmp_path}/labels.csv", f"splits={tmp_path}/splits"]
    paths += [f"features=[{tmp_path}/bags]", f"output={tmp_path}/mil"]
    models = MODELS.get(task, ["clam_sb"])
    paths += [f"models=[{','.join(models)}]", f"headline={models[0]}"]
    assert run(main, Config, ["--config", str(config), *paths, *FAST]) == 0
    with (tmp_path / "mil" / "predictions.csv").open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["split"] == "test"]
    assert {row["model"] for row in rows} == set(models)
    assert len(rows) == len(models) * len(CLASSES[task]) * SIZES["test"]
    assert f"prob_{CLASSES[task][-1]}" in rows[0]
