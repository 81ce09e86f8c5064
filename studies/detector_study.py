"""What does a change of the detector's recipe bring? Trainings of every change with several seeds,
measured on test images that no training has seen; one table with paired intervals.

    python -m studies.detector_study --config configs/ts2gkd/detector_study.yaml train=train.json
    val=val.json test=test.json images=images output=runs/detector_study

The row `recipe` has no change, `recipe_again` none but other seeds, and `colour` is a control
without a network. The same command goes on where it was stopped; a row that fails is listed in
failures.csv, and the others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detection_kd.box_sets.image_groups import group_images
from detection_kd.evaluation.coco_metrics import draw_weights
from detection_kd.evaluation.coco_results import read_results
from studies.detector_tables.colour_boxes import detect_by_colour
from studies.detector_tables.scores import RecipeScores, score_row
from studies.detector_tables.table import make_table, write_tables
from studies.detector_tables.trainings import SHARED, DetectorRecipe
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import safe_id, write_or_remove_csv
from wsi_common.seed import check_seeds

logger = logging.getLogger(__name__)
RECIPE, AGAIN, COLOUR = "recipe", "recipe_again", "colour"
ANOTHER = 1000  # what `recipe_again` adds to its seed


@dataclass
class Config:
    """Keys of the study."""

    output: str = key(REQUIRED, "where the results are written; tables and runs", runtime=True)
    train: str = key(REQUIRED, "COCO JSON to train on", path=True)
    val: str = key(REQUIRED, "COCO JSON to evaluate on; it selects the epoch", path=True)
    test: str = key(REQUIRED, "COCO JSON to test on; no training sees it", path=True)
    images: str = key(REQUIRED, "folder of the images that the annotations name", path=True)
    recipe: str = key(
        "configs/ts2gkd/detector_bccd.yaml", "keys of train_detector that all rows have", path=True
    )
    train_detector: list[str] = key([], "further key=value of train_detector, for all rows")
    changes: dict[str, Any] = key(
        {}, "rows beside the recipe; {name: {key of train_detector: value}}"
    )
    seeds: list[int] = key([1, 2, 3], "training seeds; of every row")
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    resamples: int = key(1000, "bootstrap resamples of the confidence intervals", least=1)
    group: str = key(
        "",
        "regular expression; images whose names match alike stay together, as ^[^_]+, in the "
        "resamples; empty: each on its own",
    )


def check(config: Config) -> None:
    """Refuse what no table can be made of."""
    check_seeds(config.seeds)
    if shared := set(config.seeds) & {seed + ANOTHER for seed in config.seeds}:
        raise UserError(
            f"seeds: {min(shared)} is that of {AGAIN} for {min(shared) - ANOTHER}; take another"
        )
    for name, keys in config.changes.items():
        safe_id(str(name), "changes")
        if name in (RECIPE, AGAIN, COLOUR):
            raise UserError(f"changes.{name}: expected another name, this row is there already")
        if not isinstance(keys, Mapping):
            raise UserError(
                f"changes.{name}: expected {{key of train_detector: value}}, found {keys}"
            )
        if other := sorted(set(SHARED) & keys.keys()):
            raise UserError(
                f"changes.{name}: expected keys that may differ between rows, found "
                f"{', '.join(other)}; set it for all of them"
            )


def train_row(
    config: Config, recipe: DetectorRecipe, name: str, failures: list[dict[str, Any]]
) -> list[Path]:
    """Train a row with all seeds; the detections of each, or nothing where a training fails."""
    results = []
    for seed in config.seeds:
        run, own_seed = Path(config.output) / f"seed{seed}" / name, seed + ANOTHER * (name == AGAIN)
        try:
            results.append(recipe.train(run, own_seed, config.changes.get(name, {})))
        except UserError as error:
            logger.error("seed %d: %s failed: %s", seed, name, error)
            failures.append({"row": name, "seed": seed, "error": str(error)})
            return []
    return results


def main(config: Config) -> int:
    """Run all rows; the table is written after each of them."""
    check(config)
    files = {name: getattr(config, name) for name in ("train", "val", "test", "images")}
    arguments = ["--config", config.recipe, *config.train_detector]
    recipe = DetectorRecipe(arguments, files, config.device)
    train, test = recipe.read_sets()
    groups = group_images(test, config.images, config.group)
    weights, freedom = draw_weights(groups, config.resamples), len(np.unique(groups)) - 1
    failures: list[dict[str, Any]] = []
    scores: dict[str, RecipeScores] = {}
    output = Path(config.output)
    for name in (RECIPE, AGAIN, *config.changes):
        results = train_row(config, recipe, name, failures)
        write_or_remove_csv(output / "failures.csv", ["row", "seed", "error"], failures)
        if not results and name == RECIPE:
            raise UserError(f"the recipe itself fails: {failures[0]['error']}")
        if not results:
            continue
        scores[name] = score_row(test, [read_results(path, test) for path in results], weights)
        if COLOUR not in scores:
            scores[COLOUR] = score_row(test, [detect_by_colour(train, test)], weights)
        write_tables(output, make_table(scores, RECIPE, freedom), RECIPE)
        logger.info("%s: table in %s", name, output / "detector_study.md")
    return 1 if failures else 0


if __name__ == "__main__":
    launch(main, Config)
