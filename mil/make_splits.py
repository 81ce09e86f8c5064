"""Make the splits of a cohort, once, as files that CLAM and this project's trainings read.

    python -m mil.make_splits labels=cohort/labels.csv output=cohort/splits folds=5
    python -m mil.train ... splits=cohort/splits fold=0

Stratified by label (by event, grade or a slide's rarest label with the `task=` of the training) and
drawn by patient; `inner_folds=4` nests a cross-validation in every outer fold, `repeats=3` draws
the folds three times, `protocol=fixed` takes the official test set. Files that are there are never
remade: other ones are an error that names the first difference, unless `overwrite=true`.
`check=true` makes nothing and checks `output`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from mil.datasets.bags import find_bags
from mil.datasets.labels import LabelledSlides
from mil.datasets.splits import (
    SETS,
    Split,
    find_numbered,
    list_split_values,
    make_splits,
    read_stored_splits,
    select_known_slides,
    write_clam_splits,
)
from mil.datasets.stored_splits import check_splits
from mil.tasks.keys import FoldKeys, TaskKeys
from mil.tasks.table import read_targets
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, identity, key
from wsi_common.files import sha256_file, write_json
from wsi_common.provenance import can_reuse

logger = logging.getLogger(__name__)


@dataclass
class Config(TaskKeys, FoldKeys):
    """Keys of the splits."""

    output: str = key(REQUIRED, "where the results are written; splits_<k>.csv", runtime=True)
    features: list[str] = key(
        [],
        "folder of feature bags; every slide must have a bag in each of them; empty: not checked",
        path=True,
    )
    inner_folds: int = key(
        0,
        "validation folds within every outer fold (nested CV); 0: one validation set of "
        "val_fraction",
    )
    repeats: int = key(
        1, "number of repeats of the cross-validation; drawn with split_seed, split_seed + 1, ..."
    )
    val_fraction: float = key(
        0.2,
        "share of the training patients (or slides) that is held out for validation; "
        "without inner_folds",
    )
    check: bool = key(False, "make nothing: check the files in output", runtime=True)


def must_write(output: Path, splits: list[Split], overwrite: bool) -> bool:
    """Whether the splits have to be written; False where the same ones are there.

    Raises:
        UserError: other splits are there.
    """
    if overwrite or not find_numbered(output):
        return True
    found, wanted = (
        {f"splits_{split.fold}.csv": split.digest()[:12] for split in each}
        for each in (read_stored_splits(output), splits)
    )
    others = "other splits, which splits=<folder> uses as they are"
    return not can_reuse(output, lambda: found, wanted, others)


def report(splits: list[Split], slides: LabelledSlides) -> None:
    """One line a split: slides and patients of its sets."""
    for split in splits:
        parts = {name: slides.only(getattr(split, name)) for name in SETS}
        sizes = (
            f"{name} {len(p.records)} slides of {len(set(p.cases.tolist()))} patients"
            for name, p in parts.items()
        )
        logger.info("split %d: %s", split.fold, ", ".join(sizes))


def main(config: Config) -> None:
    output = Path(config.output)
    values = list_split_values(config.subset)
    slides, _ = read_targets(config.labels, config.task, values, config.positive, config.grades)
    if config.check:
        splits = read_stored_splits(output)
        slides = select_known_slides(output, splits, slides)
    available = set(slides.slide_ids)
    for folder in config.features:
        available &= set(find_bags(folder, slides.slide_ids))
    if config.check:
        report(check_splits(splits, slides, available), slides)
        line = "%s: %d splits, no patient on two sides, no slide twice, every class in every set"
        logger.info(line, output, len(splits))
        return
    drawn = (config.protocol, config.folds, config.val_fraction, config.split_seed)
    splits = make_splits(slides, *drawn, config.inner_folds, config.repeats)
    if must_write(output, splits, config.overwrite):
        write_clam_splits(output, splits, slides)
        stamp = {"labels_sha256": sha256_file(config.labels), "splits": len(splits)}
        write_json(output / "splits.json", identity(config) | stamp)
    else:
        logger.info("%s: the same splits are there already; left as they are", output)
    report(splits, slides)


if __name__ == "__main__":
    launch(main, Config)
