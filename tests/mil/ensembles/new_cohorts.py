"""A second cohort with slides and patients of its own, and the scripts of training and
prediction.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from mil import benchmark, predict, train
from tests.mil.conftest import write_cohort
from wsi_common.config import load_config

SMALL = (
    *("device=cpu", "folds=2", "training.epochs=4", "training.min_epochs=1"),
    *("training.lr=1e-3",),
)


def write_new_cohort(root: Path, slides: int = 12, seed: int = 5, **options) -> Path:
    """As `write_cohort`, with other ids of slides and patients."""
    write_cohort(root, slides=slides, seed=seed, **options)
    for path in sorted((root / "bags" / "h5_files").iterdir()):
        path.rename(path.with_name(f"new_{path.name}"))
    rows = read_csv(root / "labels.csv")
    for row in rows:
        row |= {"slide_id": f"new_{row['slide_id']}", "case_id": f"other_{row['case_id']}"}
    return write_csv_rows(root / "labels.csv", rows).parent


def write_csv_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def train_benchmark(cohort: Path, output: Path, *more: str) -> Path:
    keys = [f"labels={cohort}/labels.csv", f"features=[{cohort}/bags]", f"output={output}"]
    keys += [*SMALL, "isolated=false", "resamples=20", "seeds=[1]", "models=[mean]", *more]
    assert benchmark.main(load_config(benchmark.Config, keys)) == 0
    return output


def train_run(cohort: Path, output: Path, *more: str) -> Path:
    keys = [f"labels={cohort}/labels.csv", f"features={cohort}/bags", f"output={output}"]
    assert train.main(load_config(train.Config, [*keys, *SMALL, "model=mean", *more])) is None
    return output


def predict_with(run: Path, features: Path, output: Path, *more: str) -> int:
    keys = [f"run={run}", f"features={features}", f"output={output}"]
    keys += ["device=cpu", "resamples=20", "figures=false", *more]
    return predict.main(load_config(predict.Config, keys))


def read_results(run: Path) -> dict:
    return json.loads((run / "results.json").read_text())
