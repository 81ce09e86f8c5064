"""Probe encoders on labelled tiles: k-NN, linear and fine-tuning, always beside controls.

    python -m patch_encoder.probe_tiles tile_set=tiles output=runs/probe
    encoders='[resnet50, dino=runs/pretrain/backbone.pt]' probes='[knn, linear]'

Writes probe.csv and probe.md (a row per probe and encoder, with 95 % intervals by group and the
difference to a reference), predictions.csv, probe.png and results.json. Features are computed once
and stored in features/. Started again, it does nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from patch_encoder.probing.encoders import ProbedEncoder, choose_encoders
from patch_encoder.probing.feature_sets import (
    FeatureSet,
    load_or_make,
    name_file,
    open_bag_sets,
    open_encoders,
)
from patch_encoder.probing.fine_tune import fine_tune_probe
from patch_encoder.probing.folds import Fold, make_folds
from patch_encoder.probing.knn import knn_probe
from patch_encoder.probing.linear import linear_probe
from patch_encoder.probing.pictures import Pictures, encode_pictures
from patch_encoder.probing.probe_keys import ProbeKeys
from patch_encoder.probing.report import (
    ProbeResult,
    make_rows,
    write_figure,
    write_predictions,
    write_tables,
)
from patch_encoder.probing.scores import TilePredictions, score_runs
from patch_encoder.probing.tile_sets import TileSet
from wsi_common.cli import launch
from wsi_common.device import pick_device, pick_precision
from wsi_common.distributed import World, require_one_process
from wsi_common.errors import UserError, did_you_mean
from wsi_common.processes.pool import pick_workers
from wsi_common.run import Run, open_run

logger = logging.getLogger(__name__)


@dataclass
class Config(ProbeKeys):
    """Keys of the probes."""


@dataclass
class ProbeStudy:
    """What all probes of one run have in common."""

    config: Config
    tiles: TileSet
    digest: str
    folds: list[Fold]
    device: torch.device
    precision: str
    workers: int
    targets: np.ndarray = field(init=False)
    groups: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.targets, self.groups = self.tiles.targets, self.tiles.groups

    def predict(
        self, fold: Fold, probabilities: np.ndarray, start: int, seed: int = 0
    ) -> TilePredictions:
        """Probabilities of a fold's test tiles with what is known of these."""
        cases, targets = self.groups[fold.test], self.targets[fold.test]
        return TilePredictions(fold.number, cases, targets, probabilities, fold.test, start, seed)


def open_study(config: Config) -> ProbeStudy:
    """Read the tiles, draw the folds, choose the device."""
    tiles = config.read_tiles()
    given = (tiles.targets, tiles.groups, tiles.splits)
    folds = make_folds(*given, config.folds, config.seed, tiles.classes)
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    workers = pick_workers(config.workers)
    return ProbeStudy(config, tiles, tiles.digest(), folds, device, precision, workers)


def open_feature_sets(study: ProbeStudy) -> list[FeatureSet]:
    """The rows of the table: encoders of pictures, or folders of bags."""
    config = study.config
    beside = {"tiles": study.digest, "precision": study.precision}
    if config.features:
        return open_bag_sets(config.features, config.coords, study.tiles, beside)
    if not study.tiles.pictures:
        raise UserError(
            f"{study.tiles.source}: expected features=[...] beside places on slides, found none"
        )
    chosen = choose_encoders(config.encoders, config.random_starts)
    return open_encoders(chosen, Path(config.output) / "features", beside, encode_with(study))


def encode_with(study: ProbeStudy) -> Callable[[ProbedEncoder, int], np.ndarray]:
    """What computes the features of an encoder's network."""
    options = (study.device, study.precision, study.config.batch_size, study.workers)
    return lambda probed, seed: encode_pictures(study.tiles.pictures, probed.build(seed), *options)


def probe_knn(
    study: ProbeStudy, rows: FeatureSet, features: np.ndarray, start: int
) -> Iterator[TilePredictions]:
    """Predictions of the k-NN probe, fold by fold."""
    settings, targets = study.config.knn, study.targets
    for fold in study.folds:
        given = (features[fold.train], targets[fold.train], features[fold.test])
        classes = len(study.tiles.classes)
        shares = knn_probe(*given, classes, **asdict(settings), device=study.device)
        yield study.predict(fold, shares, start)


def probe_linear(
    study: ProbeStudy, rows: FeatureSet, features: np.ndarray, start: int
) -> Iterator[TilePredictions]:
    """Predictions of the linear probe, fold by fold."""
    for fold in study.folds:
        given = (features[fold.train], study.targets[fold.train], features[fold.test])
        groups = study.groups[fold.train]
        probabilities, strength = linear_probe(*given, groups, study.config.seed)
        logger.info("%s, fold %d: C=%g", rows.label, fold.number, strength)
        yield study.predict(fold, probabilities, start)


def probe_fine_tune(
    study: ProbeStudy, rows: FeatureSet, features: np.ndarray, start: int
) -> Iterator[TilePredictions]:
    """Predictions of the fine-tuning probe, fold by fold and seed by seed; each is stored."""
    folder, settings = Path(study.config.output) / "fine_tuned", study.config.fine_tune
    for fold, seed in product(study.folds, settings.seeds):
        split = {"train": fold.train, "test": fold.test, "seed": seed}
        probabilities = load_or_make(
            name_file(folder, rows.label, start, seed, fold.number),
            rows.made_from[start] | asdict(settings) | split,
            partial(tune_network, study, rows, start, fold, seed),
        )
        yield study.predict(fold, probabilities, start, seed)


def tune_network(
    study: ProbeStudy, rows: FeatureSet, start: int, fold: Fold, seed: int
) -> np.ndarray:
    """Fine-tune a network anew on one fold; probabilities (T, C) of the test tiles."""
    assert rows.encoder is not None
    encoder = rows.encoder.build(rows.encoder.seeds[start])
    pictures = Pictures(study.tiles.pictures, encoder.transform)
    sides, classes = (fold.train, fold.test), len(study.tiles.classes)
    where = (study.device, study.precision, study.workers)
    given = (study.targets, *sides, classes, study.config.fine_tune, *where)
    return fine_tune_probe(encoder, pictures, *given, seed)


PROBES = {"knn": probe_knn, "linear": probe_linear, "fine_tune": probe_fine_tune}


def probe_all(study: ProbeStudy, sets: list[FeatureSet]) -> list[ProbeResult]:
    """Every probe on every feature set; fine-tuning on those with a network."""
    results = []
    for rows in sets:
        networks = [rows.read(start) for start in range(len(rows.made_from))]
        for probe in study.config.probes:
            if probe == "fine_tune" and not (rows.encoder and rows.encoder.has_network):
                continue
            logger.info("%s: %s", probe, rows.label)
            runs = [
                run
                for start, features in enumerate(networks)
                for run in PROBES[probe](study, rows, features, start)
            ]
            dim = networks[0].shape[1]
            results.append(ProbeResult(rows.label, rows.control, probe, dim, runs))
    order = study.config.probes
    return sorted(results, key=lambda result: order.index(result.probe))


def choose_reference(config: Config, sets: list[FeatureSet]) -> str:
    """The row that the others are compared with."""
    labels = [rows.label for rows in sets]
    if config.reference and config.reference not in labels:
        raise UserError(
            f"reference={config.reference}: expected a row of the table, "
            f"{did_you_mean(config.reference, labels)}"
        )
    return config.reference or labels[0]


def write_results(study: ProbeStudy, run: Run, results: list[ProbeResult], reference: str) -> None:
    """Score the predictions and write all tables and the figure."""
    config, tiles = study.config, study.tiles
    scores = [score_runs(result.runs, config.resamples, config.seed) for result in results]
    rows = make_rows(results, scores, reference)
    groups = len(set(study.groups.tolist()))
    split = (
        f"{len(study.folds)} folds"
        if len(study.folds) > 1
        else f"{len(study.folds[0].train)} trained on, {len(study.folds[0].test)} tested"
    )
    counts = ", ".join(
        f"{name} {count}" for name, count in zip(tiles.classes, np.bincount(study.targets))
    )
    positive = f"; positive: {tiles.classes[1]}" if len(tiles.classes) == 2 else ""
    note = f"{len(tiles)} tiles ({counts}{positive}) of {groups} groups, {split}."
    text = write_tables(run.path, rows, note, reference)
    write_predictions(run.path, results, tiles)
    write_figure(run.path, rows)
    summary = {"tiles": len(tiles), "groups": groups, "classes": list(tiles.classes)}
    run.finish({**summary, "folds": len(study.folds), "reference": reference, "rows": rows})
    print(text)


def main(config: Config) -> None:
    require_one_process("patch_encoder.probe_tiles", "on one device")
    config.check()
    study = open_study(config)
    sets = open_feature_sets(study)
    reference = choose_reference(config, sets)
    inputs = {"tiles": study.digest} | {f"features of {one.label}": one.digest for one in sets}
    world = World(0, 1, study.device)
    run = open_run(config.output, config, world, inputs=inputs, overwrite=config.overwrite)
    if run.results is not None:
        logger.info("probe_tiles: %s is finished; nothing to do", run.path)
        return
    write_results(study, run, probe_all(study, sets), reference)


if __name__ == "__main__":
    launch(main, Config)
