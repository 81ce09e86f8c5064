"""One bad slide never stops a cohort: it is logged, and listed in `failures.csv`."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from patch_encoder.cohort.labels import read_rows
from wsi_common.files import write_csv

logger = logging.getLogger(__name__)


class Failures:
    """The slides that could not be worked on in this run of a stage.

    Args:
        stage: name of the stage.
        part: `1-of-4` for a process that has a part of the cohort: its list is
            `failures.1-of-4.csv`.
    """

    def __init__(self, stage: str, part: str = "") -> None:
        self.stage, self.part = stage, part
        self.name = f"failures.{part}.csv" if part else "failures.csv"
        self.rows: list[dict[str, str]] = []

    @property
    def slides(self) -> set[str]:
        """Ids of the slides that failed."""
        return {row["slide"] for row in self.rows}

    def add(self, slide_id: str, error: str) -> None:
        """Log and remember one slide; the first error of a slide counts."""
        if any(row["slide"] == slide_id for row in self.rows):
            return
        logger.error("%s: slide %s failed: %s", self.stage, slide_id, error)
        self.rows.append({"slide": slide_id, "stage": self.stage, "error": error})

    def add_all(self, errors: Mapping[str, str]) -> None:
        """Log and remember several slides: slide id -> error."""
        for slide_id, error in errors.items():
            self.add(slide_id, error)

    def note(self, slide_id: str, remark: str) -> None:
        """Log what is wrong with a slide that is used all the same."""
        logger.warning("%s: slide %s: %s", self.stage, slide_id, remark)

    def write(self, folder: Path) -> int:
        """Write the list (removed when nothing failed); returns the exit status, 0 or 1."""
        path = folder / self.name
        if not self.part:
            # the whole cohort was gone over: what its parts once listed no longer counts
            for old in folder.glob("failures.*-of-*.csv"):
                old.unlink(missing_ok=True)
        if not self.rows:
            if path.exists():  # else a read-only folder of finished work is an error
                path.unlink(missing_ok=True)
            return 0
        write_csv(path, ["slide", "stage", "error"], self.rows)
        logger.error("%s: %d slides failed, listed in %s", self.stage, len(self.rows), path)
        return 1


def find_reason(slide_id: str, folders: Iterable[Path]) -> str:
    """What the lists in these folders say of a slide; empty: nothing."""
    for folder in folders:
        for file in sorted(folder.glob("failures*.csv")):
            for _, row in read_rows(file, ("slide", "error")):
                if row["slide"] == slide_id:
                    return row["error"]
    return ""
