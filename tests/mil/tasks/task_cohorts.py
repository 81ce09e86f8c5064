"""labels.csv of a small cohort written anew for each kind of task."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

# task -> header in place of `label`, and its cells from the slide's number and whether it is
# positive
COHORTS: dict[str, tuple[str, Callable[[int, bool], str]]] = {
    "multilabel": (
        "label",
        lambda i, positive: "|".join(["a"] * positive + ["b"] * (i % 3 == 0)) or "-",
    ),
    "ordinal": ("label", lambda i, positive: str(2 * positive + (i // 2) % 2)),
    "cox": ("time,event", lambda i, positive: f"{1 if positive else 9},{int(i % 4 != 2)}"),
}
COHORTS["discrete"] = COHORTS["cox"]
COHORTS["regression"] = ("label", lambda i, positive: f"{4000 * positive + 1000 + 7 * i}")


def rewrite(cohort: Path, kind: str) -> Path:
    """The cohort with labels.csv of the task."""
    header, cells = COHORTS[kind]
    with (cohort / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    lines = []
    for i, row in enumerate(rows):
        # a patient has one follow-up
        number = int(row["case_id"].removeprefix("case")) if "time" in header else i
        filled = cells(number, row["label"] == "pos")
        lines.append(f"{row['case_id']},{row['slide_id']},{filled},{row['split']}")
    (cohort / "labels.csv").write_text(
        "\n".join([f"case_id,slide_id,{header},split", *lines]) + "\n"
    )
    return cohort
