"""What region encoders are worth: DINO, SLPD's terms and the plain mean of tiles, on cohorts whose
regions have known zones; one table with paired intervals.

    python -m studies.region_study --config configs/slpd/study.yaml output=runs/region_study

Without `cohort` the cohorts are simulated, one per nuisance; with it, one cohort of bags is taken.
Every row is pre-trained with each seed for the same number of steps, on raw features and on
features standardised per slide. Slides are classified by the benchmark's own code. Pre-training
sees all slides without their labels (transductive). Everything that is done is stored; the same
command goes on where it was stopped. A training that fails is listed in failures.csv, and the
others go on.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from patch_encoder.demo.region_simulation import (
    ENCODER,
    RegionSimulation,
    write_simulated_cohort,
)
from patch_encoder.regions.keys import RegionKeys
from patch_encoder.regions.opening import open_store
from patch_encoder.regions.store import RegionStore
from studies.region_tables.cells import (
    Cell,
    Condition,
    average_tiles,
    encode,
    find_zones,
    make_cell,
)
from studies.region_tables.intervals import NO_SEED
from studies.region_tables.stages import run_script
from studies.region_tables.table import ConditionTable, collect_condition, write_tables
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key, make_assignments
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes, write_or_remove_csv
from wsi_common.seed import check_seeds

logger = logging.getLogger(__name__)
TILE_MEAN, RANDOM = "tile_mean", "random"
START = "backbone_start.pt"  # a trained row's network before training


@dataclass
class Config:
    """Keys of the study."""

    output: str = key(REQUIRED, "where the results are written; tables and cells", runtime=True)
    cohort: str = key(
        "",
        "folder of a cohort with labels.csv, and zones.csv or the zones/ of a rendered one; empty: "
        "cohorts are simulated",
        path=True,
    )
    features: str = key(
        "",
        "folder of feature bags; of all encoders, for cohort; empty: <cohort>/features",
        path=True,
    )
    tile_encoder: str = key(
        ENCODER, "tile encoder of the regions; its bags lie in <features>/<encoder>"
    )
    baselines: list[str] = key([], "further tile encoders of which the tile mean is a row")
    simulation: dict[str, Any] = key({}, "options of the simulated cohorts; {name: value}")
    nuisances: list[float] = key(
        [0.0, 0.5, 1.0, 2.0], "size of the slides' offsets in the simulated cohorts"
    )
    standardised: list[float] = key(
        [0.5],
        "nuisances at which networks are trained on standardised features; at the others these "
        "are the same up to rounding, which the row of the tile mean shows",
    )
    region_tiles: int = key(6, "side of a region in tiles, G", least=1)
    clusters: int = key(4, "prototypes of a slide, K; for purity and agreement", least=1)
    trained: dict[str, Any] = key({}, "the trained rows; {name: {key of pretrain_slpd: value}}")
    seeds: list[int] = key([1, 2, 3], "training seeds; of the pre-training")
    pretrain: list[str] = key([], "further key=value of pretrain_slpd")
    mil_config: str = key("configs/quickstart/mil.yaml", "recipe of the benchmark", path=True)
    mil: list[str] = key([], "further key=value of the benchmark")
    resamples: int = key(2000, "bootstrap resamples of the confidence intervals")
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def check(config: Config) -> None:
    """Refuse what no table can be made of."""
    if "dino" not in config.trained:
        raise UserError(
            "trained: expected a row 'dino' that the others are compared with, found "
            f"{sorted(config.trained)}; take them from configs/slpd/study.yaml"
        )
    check_seeds(config.seeds)


def list_conditions(config: Config) -> Iterator[Condition]:
    """Prepare the cohorts one after the other: their bags and region files."""
    output = Path(config.output)
    if config.cohort:
        folder = Path(config.cohort)
        features = Path(config.features or folder / "features")
        bags = [features / name for name in (config.tile_encoder, *config.baselines)]
        regions = [build_regions(config, path, output / "regions" / path.name) for path in bags]
        baselines = dict(zip(config.baselines, regions[1:], strict=True))
        for scale in ("none", "slide"):
            yield Condition(folder.name, folder, regions[0], scale, True, baselines)
        return
    for nuisance in config.nuisances:
        options = {"region_tiles": config.region_tiles, **config.simulation}
        simulation = RegionSimulation(nuisance=nuisance, **options)
        name = f"nu{nuisance:g}"
        folder = output / "cohorts" / name
        write_simulated_cohort(folder, simulation, config.overwrite)
        regions = build_regions(config, folder / "features", output / "regions" / name)
        yield Condition(name, folder, regions, "none", True, {})
        yield Condition(name, folder, regions, "slide", nuisance in config.standardised, {})


def build_regions(config: Config, bags: Path, output: Path) -> Path:
    """Region files of a folder of bags; their folder, which is named by the bags' encoder."""
    settings = {
        "features": bags,
        "output": output,
        "region_tiles": config.region_tiles,
        "min_regions": config.clusters,  # slides with fewer are named in a warning
        "overwrite": config.overwrite,
    }
    if run_script("build_regions", make_assignments(settings)):
        raise UserError(f"{bags}: expected regions of all slides; see {output}/failures.csv")
    return next(path for path in sorted(output.iterdir()) if path.is_dir())


def list_cells(
    config: Config, condition: Condition, store: RegionStore, zones: np.ndarray
) -> list[Cell]:
    """The rows of a condition, one per seed."""
    rows: list[tuple[str, int, Any]] = [(TILE_MEAN, NO_SEED, {})]
    rows += [(name, NO_SEED, {}) for name in condition.baselines]
    if condition.trained:
        rows += [(RANDOM, seed, {}) for seed in config.seeds]
        rows += [
            (name, seed, keys) for name, keys in config.trained.items() for seed in config.seeds
        ]
    output = Path(config.output)
    cells = []
    for row, seed, keys in rows:
        name = row if seed == NO_SEED else f"{row}_s{seed}"
        settings = {
            "regions": store.digest,
            "standardise": condition.standardise,
            "zones": sha256_bytes(zones.astype("<i8").tobytes()),
            "clusters": config.clusters,
            "keys": dict(keys),
            "pretrain": [] if seed == NO_SEED else list(config.pretrain),
        }
        path = output / "cells" / condition.name / f"{name}.json"
        bags = output / "features" / condition.name / name
        cells.append(Cell(row, seed, path, bags, settings))
    return cells


def open_regions(condition: Condition, regions: Path) -> RegionStore:
    """The regions of a condition, in memory."""
    return open_store(
        RegionKeys(
            regions=str(regions),
            labels=str(condition.labels),
            store="ram",
            standardise=condition.standardise,
        )
    )


def train(config: Config, condition: Condition, row: str, seed: int) -> Path:
    """Pre-train a row, or go on with it; its run directory."""
    run = Path(config.output) / "runs" / condition.name / f"{row}_s{seed}"
    fixed = {
        "regions": condition.regions,
        "labels": condition.labels,
        "output": run,
        "store": "ram",
        "standardise": condition.standardise,
        "seed": seed,
        "keep_start": True,
        "overwrite": config.overwrite,
    }
    own = make_assignments(config.trained[row])
    run_script("pretrain_slpd", [*config.pretrain, *own, *make_assignments(fixed)])
    return run


def embed(config: Config, condition: Condition, cell: Cell, store: RegionStore) -> Any:
    """The embeddings of a cell, whose network is trained first where it has one."""
    if cell.row == TILE_MEAN:
        return average_tiles(store)
    if cell.row in condition.baselines:
        with open_regions(condition, condition.baselines[cell.row]) as other:
            if other.slides != store.slides or (other.counts != store.counts).any():
                raise UserError(f"{cell.row}: expected bags of the same tiles; extract them again")
            return average_tiles(other)
    if cell.row == RANDOM:
        return encode(store, train(config, condition, "dino", cell.seed) / START)
    return encode(store, train(config, condition, cell.row, cell.seed))


def run_condition(
    config: Config, condition: Condition, failures: list[dict[str, str]]
) -> ConditionTable:
    """Make all cells of a condition that are missing, classify its slides, and collect both."""
    done = []
    with open_regions(condition, condition.regions) as store:
        zones = find_zones(store, condition.folder)
        for cell in list_cells(config, condition, store, zones):
            if not cell.is_done(config.overwrite):
                logger.info("%s: %s", condition.name, cell.name)
                try:
                    embeddings = embed(config, condition, cell, store)
                except UserError as error:
                    logger.error("%s: %s failed: %s", condition.name, cell.name, error)
                    place = {"condition": condition.name, "cell": cell.name}
                    failures.append({**place, "error": str(error)})
                    continue
                make_cell(cell, store, zones, embeddings, config.clusters)
            done.append(cell)
    benchmark = Path(config.output) / "mil" / condition.name
    classify(config, condition, done, benchmark)
    return collect_condition(condition, done, benchmark, config.resamples)


def classify(config: Config, condition: Condition, cells: list[Cell], output: Path) -> None:
    """Train slide classifiers on the bags of all cells, as the benchmark does."""
    folders = ",".join(str(cell.bags) for cell in cells)
    arguments = ["--config", config.mil_config, *config.mil, f"features=[{folders}]"]
    arguments += [f"labels={condition.labels}", f"output={output}", "isolated=false"]
    arguments += make_assignments({"overwrite": config.overwrite})
    if run_script("benchmark", arguments):
        raise UserError(f"{output}: expected all trainings to end; see failures.csv there")


def main(config: Config) -> int:
    check(config)
    failures: list[dict[str, str]] = []
    tables = []
    for condition in list_conditions(config):
        tables.append(run_condition(config, condition, failures))
        # a study that is still running has a table, too
        write_tables(Path(config.output), tables)
    header = ["condition", "cell", "error"]
    write_or_remove_csv(Path(config.output) / "failures.csv", header, failures)
    return 1 if failures else 0


if __name__ == "__main__":
    launch(main, Config)
