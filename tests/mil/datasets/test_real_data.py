"""Real data: the Musk1 bags of Dietterich et al. (1997) through ABMIL, and feature bags of another
project.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from mil.benchmark import Config, main
from mil.datasets.bags import load_bags
from mil.models import build
from patch_encoder.bags.writer import write_bag
from wsi_common.config import load_config


def write_musk(source: Path, root: Path) -> int:
    """musk1.data (molecule, conformer, 166 features, label) as bags and labels.csv; returns the
    number of bags.
    """
    bags: dict[str, list[list[float]]] = {}
    labels: dict[str, str] = {}
    with source.open() as stream:
        for row in csv.reader(stream):
            if row:
                bags.setdefault(row[0], []).append([float(value) for value in row[2:168]])
                labels[row[0]] = "musk" if float(row[168].rstrip(".")) == 1 else "other"
    for name, rows in bags.items():
        write_bag(
            root / "bags" / "h5_files" / f"{name}.h5",
            np.array(rows, np.float32),
            np.zeros((len(rows), 2), np.int64),
            {},
        )
    rows = [f"{name},{name},{label}" for name, label in labels.items()]
    (root / "labels.csv").write_text("\n".join(["case_id,slide_id,label", *rows]) + "\n")
    return len(bags)


@pytest.mark.process
def test_abmil_on_musk1_is_far_above_chance(real_data: Path, tmp_path: Path):
    source = real_data / "mil_classic" / "musk1.data"
    if not source.is_file():
        pytest.skip(f"{source} not found")
    assert write_musk(source, tmp_path) == 92
    training = [
        "training.epochs=6",
        "training.min_epochs=6",
        "training.lr=1e-3",
        "standardize=true",
        "positive=musk",
    ]
    options = ["models=[abmil]", "seeds=[2024]", "folds=2", "device=cpu", *training]
    config = load_config(
        Config,
        [
            f"labels={tmp_path}/labels.csv",
            f"features=[{tmp_path}/bags]",
            f"output={tmp_path}/out",
            *options,
        ],
    )
    assert main(config) == 0
    with (tmp_path / "out" / "results.csv").open() as stream:
        aucs = [float(row["auc"]) for row in csv.DictReader(stream)]
    assert len(aucs) == 2 and np.mean(aucs) > 0.8


def test_feature_bags_of_another_project_are_read(real_data: Path):
    files = {
        path.parent.name: path
        for path in sorted((real_data / "mopadi_features").glob("*/features.h5"))
    }
    if len(files) != 2:
        pytest.skip(f"{real_data}/mopadi_features not found")
    bags = load_bags(files)
    assert {slide: bag.shape for slide, bag in bags.items()} == {
        "TCGA-3X-AAVA-01Z-00-DX1": (180, 512),
        "TCGA-AD-6964-01Z-00-DX1": (777, 512),
    }
    assert bags["TCGA-3X-AAVA-01Z-00-DX1"].coords is None
    assert bags["TCGA-AD-6964-01Z-00-DX1"].coords.shape == (777, 2)
    with torch.no_grad():
        outputs = [build("abmil", 512, 2)(bag.read(), bag.coords) for bag in bags.values()]
    assert [len(output.attention) for output in outputs] == [180, 777]
