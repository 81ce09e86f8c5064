"""Predict the slides of another cohort with a trained classifier, or all folds of a benchmark.

    python -m mil.predict run=runs/mil features=runs/other/resnet50 output=runs/predicted
    python -m mil.predict run=runs/mil features=runs/other/resnet50 labels=other/labels.csv
    output=runs/predicted draw_heatmaps=true slides=other/slides

Writes predictions.csv (the mean of all models, its spread, the call by the cuts that were chosen on
the validation slides of the training, calibrated probabilities) and members.csv (each model alone);
where the table has labels, validation/ with metrics and their intervals; on request heatmaps/, a
folder of pages as mil.heatmap writes it, and attention/. Started again, it predicts what is
missing. Slides that the training has met are marked in the column `seen` and left out of the
validation.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from mil.datasets.case_bags import UNITS, CaseSlide
from mil.datasets.splits import list_names
from mil.ensembles.classifier import Classifier, load_classifier
from mil.ensembles.heatmaps import draw_predicted
from mil.ensembles.judging import Pending, judge_all, open_subjects
from mil.ensembles.leaks import KnownSlides
from mil.ensembles.prediction_tables import (
    PredictedSubject,
    validate_externally,
    write_tables,
)
from mil.ensembles.subjects import read_subject_covariates, read_subjects
from mil.evaluation.keys import EvaluationKeys
from mil.heatmaps.attention_maps import MapJob, check_maps, write_all_maps
from mil.heatmaps.settings import Drawing, check_drawing
from mil.tasks.keys import SlideKeys
from patch_encoder.bags.paths import list_bags
from patch_encoder.cohort.failures import Failures
from patch_encoder.cohort.labels import parse_mpp, read_rows
from patch_encoder.slides.names import strip_suffix
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, group, key
from wsi_common.errors import UserError
from wsi_common.files import write_json
from wsi_common.metrics.run_bootstrap import format_with_interval
from wsi_common.processes.pool import pick_workers

logger = logging.getLogger(__name__)


@dataclass
class Config(SlideKeys, EvaluationKeys):
    """Keys of a prediction."""

    run: str = key(REQUIRED, "run directory; of mil.train, or folder of mil.benchmark", path=True)
    features: str = key(
        REQUIRED, "folder of feature bags; of the slides to predict, by the same encoder", path=True
    )
    output: str = key(
        REQUIRED, "where the results are written; predictions.csv and more", runtime=True
    )
    labels: str = key(
        "",
        "labels.csv of the cohort; slide_id, and where they are known case_id, labels and mpp; "
        "empty: every slide with a bag",
        path=True,
    )
    covariates: str = key(
        "",
        "table of clinical covariates by slide_id or case_id; for a classifier that was trained "
        "with them",
        path=True,
    )
    feature_set: str = key("", "of a benchmark; empty: the best by its headline metric")
    model: str = key("", "slide classifier; of the benchmark; empty: its headline")
    seed: int | None = key(
        None,
        "seed of everything that is drawn at random; training seed of a benchmark; null: all of "
        "them, as one ensemble",
    )
    unit: str = key(
        "",
        "what one prediction is of; empty: as in the training; case_mean, case_max: a patient, "
        "with the mean of the slides or the one that shows most",
        choices=("", *UNITS),
    )
    unnamed: bool = key(
        False, "take bags that do not say which encoder made them; their width is checked"
    )
    draw_heatmaps: bool = key(
        False, "draw heatmaps/ with a page per slide; of the slides in slides=, or white ones"
    )
    drawing: Drawing = group(Drawing, "how slides are drawn")
    attention_maps: bool = key(
        False, "write attention/<slide>.h5; every map of every model and its raw scores"
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    threads: int = key(1, "CPU threads per process; of the models", runtime=True)
    workers: int | None = key(
        None,
        "worker processes; that draw heatmaps, one slide each; null: one per core, at most 8; 0: "
        "the main process",
        runtime=True,
    )
    read_timeout: float = key(
        300.0,
        "seconds without progress after which a slide is given up (not with workers=0)",
        runtime=True,
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)

    def read_mpps(self) -> dict[str, float | None]:
        """As the table states it, which need not have labels."""
        rows = read_rows(self.labels, ("slide_id",)) if self.labels else []
        return {
            strip_suffix(row["slide_id"]): parse_mpp(row.get("mpp", ""), f"{self.labels} line {n}")
            for n, row in rows
        }


def predict_cohort(
    config: Config, classifier: Classifier, pending: list[Pending], failures: Failures
) -> list[PredictedSubject]:
    """Predict the subjects that are left, and combine the models of all of them."""
    folder = Path(config.output) / "predicted"
    values = judge_all(classifier, pending, folder, failures, overwrite=config.overwrite)
    known, predicted = KnownSlides(classifier), []
    for one in pending:
        name = one.subject.name
        if name in values:
            found, seen = classifier.combine(values[name]), known.describe(one.subject, one.digests)
            predicted.append(PredictedSubject(one.subject, values[name], found, one.tiles, seen))
    if not predicted:
        raise UserError(
            f"expected a slide that can be predicted, found {len(failures.rows)} that failed, the "
            f"first with: {failures.rows[0]['error']}"
        )
    seen_names = [one.subject.name for one in predicted if one.seen]
    if seen_names:
        line = "predict: %d of %d were met by the training (column seen): %s"
        logger.warning(line, len(seen_names), len(predicted), list_names(seen_names))
    return predicted


def write_attention(
    config: Config, classifier: Classifier, pending: list[Pending], failures: Failures
) -> None:
    """The attention maps of every slide that was predicted."""
    checkpoints = [member.checkpoint for member in classifier.members]
    usable = [one for one in pending if one.subject.name not in failures.slides]
    jobs = []
    for one in usable:
        own = [CaseSlide(slide, file) for slide, file in one.files.items()]
        case = own if classifier.unit == "case" else []
        jobs += [MapJob(slide, checkpoints, case) for slide in own]
    models = {member.checkpoint: member.model for member in classifier.members}
    folder, names = Path(config.output) / "attention", classifier.task.names
    load = models.__getitem__
    write_all_maps(folder, jobs, load, names, failures, overwrite=config.overwrite)


def validate(config: Config, classifier: Classifier, predicted: list[PredictedSubject]) -> None:
    """External validation on the labelled subjects that are new to the training."""
    output, task = Path(config.output) / "validation", classifier.task
    labelled = [one for one in predicted if one.subject.label]
    new = [one for one in labelled if not one.seen]
    if not new:
        if labelled:
            line = "predict: no validation: the training has met all %d labelled slides"
            logger.warning(line, len(labelled))
        return
    summary, runs = validate_externally(output, classifier, new, config.resamples, 2024)
    if config.figures:
        from mil.figures.by_task import draw_task  # matplotlib takes a second to load

        drawn = (config.resamples, 2024, config.figure_format)
        draw_task(output / "figures", runs, task, *drawn)
    for metric in task.shown:
        shown = format_with_interval(summary[f"{metric}_mean"], summary[f"{metric}_ci"])
        print(f"{task.title(metric)}: {shown}")
    counts = (len(new), len(labelled) - len(new), output)
    logger.info("predict: validated on %d labelled, new ones; %d seen left out: %s", *counts)


def write_summary(
    config: Config, classifier: Classifier, predicted: list[PredictedSubject]
) -> None:
    """summary.json: which models, with which cuts, on how many slides."""
    carried = {
        name: np.asarray(value).tolist() if value is not None else None
        for name, value in classifier.carried.items()
    }
    content = {
        "classifier": classifier.title,
        "task": classifier.task.kind,
        "names": list(classifier.task.names),
        "unit": classifier.unit,
        "models": [str(member.checkpoint) for member in classifier.members],
        "carried": carried,
        "threshold": config.threshold,
        "predicted": len(predicted),
        "labelled": sum(bool(one.subject.label) for one in predicted),
        "seen": sum(bool(one.seen) for one in predicted),
    }
    write_json(Path(config.output) / "summary.json", content)


def main(config: Config) -> int:
    torch.set_num_threads(config.threads)
    output, failures = Path(config.output), Failures("predict")
    config.workers = pick_workers(config.workers, config.read_timeout)
    bags = list_bags(config.features)
    chosen = (config.feature_set, config.model, config.seed)
    rule = (config.threshold, config.target)
    classifier = load_classifier(config.run, *chosen, config.device, *rule, config.unit)
    subjects = read_subjects(config.labels, bags, classifier.task, classifier.unit)
    logger.info("predict: %s: %d slides or cases", classifier.title, len(subjects))
    cells = read_subject_covariates(config.covariates, subjects, classifier.covariates)
    pending = open_subjects(classifier, subjects, bags, failures, config.unnamed, cells)
    if config.attention_maps:
        check_maps(classifier.members[0].model)
    if config.draw_heatmaps:
        check_drawing(config.drawing, classifier.task)
    predicted = predict_cohort(config, classifier, pending, failures)
    if config.attention_maps:
        write_attention(config, classifier, pending, failures)
    write_tables(output, classifier, predicted)
    validate(config, classifier, predicted)
    if config.draw_heatmaps:
        drawn = (config, config.drawing, config.workers, config.read_timeout, failures)
        data = (classifier, predicted, cells, bags)
        draw_predicted(output / "heatmaps", *data, *drawn, overwrite=config.overwrite)
    write_summary(config, classifier, predicted)
    logger.info("predict: %d predicted: %s", len(predicted), output / "predictions.csv")
    return failures.write(output)


if __name__ == "__main__":
    launch(main, Config)
