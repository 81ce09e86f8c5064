"""Does leaving out hard tiles help? Teachers on labels of which most positives are wrong, their
filters and students, and controls; one table with paired intervals.

    python -m studies.filter_study --config configs/uts/filter_study.yaml crops=amibr_midog21
    output=runs/filter_study

For every seed, fields are composed of real mitotic figures (patch_encoder.demo.compose_mitoses),
wrong labels are drawn, and all rows are trained on them. Test slides are in no training. The same
command goes on where it was stopped; a row that fails is listed in failures.csv, and the others go
on.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.filter_tables.rows import train_references, train_student
from studies.filter_tables.scores import score_network
from studies.filter_tables.seed_folder import TRUTH, SeedFolder
from studies.filter_tables.table import REFERENCES, RowScores, make_table, write_tables
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import read_json, write_or_remove_csv
from wsi_common.seed import check_seeds

logger = logging.getLogger(__name__)


@dataclass
class Config:
    """Keys of the study."""

    output: str = key(REQUIRED, "where the results are written; tables and runs", runtime=True)
    crops: str = key(
        REQUIRED, "folder of AMi-Br: patches/ and the table of its MIDOG 2021 part", path=True
    )
    seeds: list[int] = key([1, 2, 3, 4, 5], "training seeds; of fields and wrong labels, too")
    noise: str = key(
        "MIDOG_noisy.json",
        "annotations of the composed fields with wrong labels; at random or systematic",
        choices=("MIDOG_noisy.json", "MIDOG_systematic.json"),
    )
    compose: list[str] = key([], "further key=value of compose_mitoses")
    train_mitosis: list[str] = key([], "further arguments of train_mitosis")
    filters: dict[str, Any] = key({}, "rows with a filter; {name: {key of filter_samples: value}}")
    batch_size: int = key(64, "items per step over all processes; tiles", least=1, runtime=True)
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    resamples: int = key(2000, "bootstrap resamples of the confidence intervals")


def run_seed(config: Config, seed: int, failures: list[dict[str, Any]]) -> dict[str, RowScores]:
    """Train, filter and score all rows of a seed; rows that fail are left out."""
    path = Path(config.output) / Path(config.noise).stem / f"seed{seed}"
    folder = SeedFolder(path, seed, config.noise, config.train_mitosis)
    folder.compose(config.crops, config.compose)
    runs = train_references(folder)
    audits: dict[str, list[Any]] = {}
    for name, keys in config.filters.items():
        try:
            runs[name] = train_student(folder, runs["teacher"], name, keys)
            audits[name] = [read_json(path / name / "filter" / "audit.json", "audit of a filter")]
        except UserError as error:
            logger.error("seed %d: %s failed: %s", seed, name, error)
            failures.append({"seed": seed, "row": name, "error": str(error)})
    options = (folder.data(TRUTH), config.batch_size, config.device)
    return {
        name: RowScores([score_network(run, *options)], audits.get(name, []))
        for name, run in runs.items()
    }


def join(rows: list[dict[str, RowScores]]) -> dict[str, RowScores]:
    """Rows over all seeds; one that failed for a seed is left out, so that all have the same."""
    whole = [name for name in rows[0] if all(name in row for row in rows)]
    return {
        name: RowScores(
            [scores for row in rows for scores in row[name].scores],
            [audit for row in rows for audit in row[name].audits],
        )
        for name in whole
    }


def main(config: Config) -> int:
    """Run all seeds; the table is written after each of them."""
    check_seeds(config.seeds)
    failures: list[dict[str, Any]] = []
    done: list[dict[str, RowScores]] = []
    output = Path(config.output) / Path(config.noise).stem
    for seed in config.seeds:
        done.append(run_seed(config, seed, failures))
        lines = make_table(join(done), REFERENCES, config.resamples)
        write_tables(output, lines, REFERENCES)
        logger.info("seed %d: table in %s", seed, output / "filter_study.md")
    write_or_remove_csv(output / "failures.csv", ["seed", "row", "error"], failures)
    return 1 if failures else 0


if __name__ == "__main__":
    launch(main, Config)
