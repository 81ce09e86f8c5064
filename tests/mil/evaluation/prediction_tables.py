"""Tables of predictions that the tests of the evaluation script read, and its call."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from mil.evaluate import Config, main
from wsi_common.cli import run as run_script


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def table(
    path: Path, classes: str = "np", models: tuple[str, ...] = ("a_1", "b"), folds: int = 2
) -> Path:
    """Predictions of 60 slides of 40 patients; model a_1 knows more than b. Validation and test
    patients differ.
    """
    generator = np.random.default_rng(0)
    rows = []
    for m, model in enumerate(models):
        for fold in range(folds):
            for i in range(60):
                case, target = i // 3 * 2 + (i % 3 > 0), (i // 3 * 2 + (i % 3 > 0)) % len(classes)
                logits = (
                    generator.normal(size=len(classes)) + (2.0 - m) * np.eye(len(classes))[target]
                )
                p = np.exp(logits) / np.exp(logits).sum()
                row = {
                    "model": model,
                    "fold": fold,
                    "split": "test" if case // 4 % 2 == fold else "val",
                    "slide_id": f"s{i}",
                }
                row |= {"case_id": f"c{case}", "label": classes[target]}
                rows.append(
                    row
                    | {
                        f"prob_{name}": repr(float(value))
                        for name, value in zip(classes, p, strict=True)
                    }
                )
    return write(path, rows)


def evaluate(*arguments: str) -> int:
    return run_script(main, Config, ["resamples=100", *arguments])


def rows_of(kind: str) -> list[dict[str, object]]:
    generator = np.random.default_rng(1)
    rows = []
    for i in range(40):
        row: dict[str, object] = {"slide_id": f"s{i}", "case_id": f"c{i}"}
        if kind == "multilabel":
            has = generator.random(2) < 0.5
            row["label"] = (
                "|".join(name for name, there in zip(("ink", "fold"), has, strict=True) if there)
                or "-"
            )
            row |= {
                f"prob_{name}": 0.6 * generator.random() + 0.4 * there
                for name, there in zip(("ink", "fold"), has, strict=True)
            }
        elif kind == "ordinal":
            p = generator.dirichlet(np.ones(3))
            row["label"] = ("g1", "g2", "g3")[i % 3]
            row |= {
                f"prob_{name}": value for name, value in zip(("g1", "g2", "g3"), p, strict=True)
            }
        elif kind == "regression":
            row["label"] = generator.normal(50, 10)
            row["predicted"] = row["label"] + generator.normal(0, 5)
        else:
            row |= {"time": i // 2 + 1, "event": i % 3 != 0, "risk": generator.normal() - i / 10}
            row["event"] = int(bool(row["event"]))
        rows.append(row)
    return rows
