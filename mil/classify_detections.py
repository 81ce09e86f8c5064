"""From detector to slide: what `detect_slide` found becomes a slide-level score, and a channel
beside tile features.

    python -m mil.classify_detections detections=runs/detections labels=cohort/labels.csv
    output=runs/mil_detections

Two models a fold: `topk`, the mean of the k highest confidences behind a logistic curve, and
`logistic`, all features of a slide (mil/datasets/detections.py) in a logistic regression that is
calibrated (Platt 1999) on training slides it was not fitted to. Run directories, results.csv,
predictions.csv and summary.csv are those of `mil.benchmark`; with `benchmark=` the splits and the
order of the classes are the benchmark's and its rows stand in the same tables; `splits=<folder>`
takes splits from files. `channel=<features>` also writes bags with two more columns.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mil.datasets.bags import find_bags
from mil.datasets.detections import find_detections, make_slide_vector, read_all, write_channels
from mil.datasets.labels import LabelledSlides, read_labelled_slides
from mil.datasets.splits import (
    SETS,
    Split,
    list_split_values,
    make_splits,
    read_stored_splits,
    select_known_slides,
    write_splits,
)
from mil.datasets.stored_splits import check_splits
from mil.evaluation.benchmark_folder import belonging, read_task
from mil.evaluation.runs import (
    COST_KEYS,
    FinishedRun,
    add_headline,
    read_benchmark_runs,
    read_finished,
    text_table,
    write_predictions,
)
from mil.evaluation.tables import write_evaluation
from mil.tasks.classification import Classification, Predictions
from mil.tasks.keys import SplitKeys
from mil.tasks.prediction_table import write_predictions as write_run_predictions
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.distributed import World
from wsi_common.errors import UserError
from wsi_common.files import read_json, safe_id, sha256_bytes, sha256_file, write_csv, write_json
from wsi_common.metrics.classification import auc, youden_threshold
from wsi_common.run import Run, open_run

logger = logging.getLogger(__name__)
MODELS = ("topk", "logistic")


@dataclass
class Config(SplitKeys):
    """Keys of slide scores from detections."""

    detections: str = key(
        REQUIRED, "what was found; output of detect_slide (coco/<slide_id>.json)", path=True
    )
    labels: str = key(
        REQUIRED, "labels.csv of the cohort; case_id,slide_id,label (and split)", path=True
    )
    output: str = key(REQUIRED, "where the results are written; the tables", runtime=True)
    benchmark: str = key(
        "",
        "folder that mil.benchmark wrote; its splits, classes and rows are taken; "
        "empty: splits by the keys below",
        path=True,
    )
    name: str = key("detections", "name of the feature set in the tables")
    top_k: int = key(5, "number of highest scores that are taken per slide; and pooled")
    thresholds: list[float] = key([0.3, 0.5, 0.7], "confidences above which detections are counted")
    c: float = key(0.1, "inverse strength of the logistic model's L2 penalty")
    split_seed: int = key(2024, "seed of the folds; and of those of the calibration")
    positive: str | None = key(
        None, "label of the positive class; null: the benchmark's, or the last one by alphabet"
    )
    channel: str = key(
        "",
        "folder of feature bags; they are written anew with detections as two more columns",
        path=True,
    )
    channel_output: str = key(
        "",
        "folder of the new bags; empty: <output>/features/<name of channel>_detections",
        runtime=True,
    )
    resamples: int = key(2000, "bootstrap resamples of the confidence intervals")


@dataclass
class DetectionSettings:
    """What decides a model besides its data."""

    model: str
    top_k: int
    thresholds: list[float] = field(default_factory=list)
    c: float = 0.1
    seed: int = 0


def fit(
    settings: DetectionSettings, vectors: np.ndarray, targets: np.ndarray, cases: np.ndarray
) -> Any:
    """A calibrated classifier of the training slides.

    Args:
        settings: `topk` takes the first column alone and needs no calibration: it is Platt's curve
            itself.
        vectors: (S, F) features.
        targets: (S,) class indices.
        cases: (S,) patients; those a calibration is made on are not those that the model was fitted
            to.
    """
    from sklearn.calibration import CalibratedClassifierCV  # a while to load
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    c = 1e3 if settings.model == "topk" else settings.c
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=2000))
    if settings.model == "topk":
        return model.fit(vectors[:, :1], targets)
    patients = min(len(set(cases[targets == label])) for label in np.unique(targets))
    if patients < 2:
        raise UserError(
            f"calibration: expected 2 training patients or more per class, found {patients}; "
            "lower folds"
        )
    folds = StratifiedGroupKFold(min(5, patients), shuffle=True, random_state=settings.seed)
    inner = list(folds.split(vectors, targets, cases))
    calibrated = CalibratedClassifierCV(model, method="sigmoid", cv=inner, ensemble=False)
    return calibrated.fit(vectors, targets)


def open_fold(
    output: Path,
    settings: DetectionSettings,
    slides: LabelledSlides,
    split: Split,
    digest: str,
    again: bool,
) -> Run:
    """The run directory of one model on one fold; `results` is set when it is finished.

    Raises:
        UserError: the directory holds a run with other settings, detections, labels or split.
    """
    labels = repr((slides.classes, [(r.slide_id, r.case_id, r.label) for r in slides.records]))
    inputs = {"detections": digest, "labels": sha256_bytes(labels.encode())}
    inputs |= {"split": split.digest()}
    world = World(0, 1, torch.device("cpu"))
    return open_run(output, settings, world, inputs=inputs, overwrite=again)


def run_fold(
    run: Run,
    settings: DetectionSettings,
    slides: LabelledSlides,
    split: Split,
    vectors: dict[str, np.ndarray],
) -> None:
    """Fit one model on one fold and write its predictions."""
    ids = {name: list(getattr(split, name)) for name in SETS}
    rows = {name: np.stack([vectors[slide] for slide in ids[name]]) for name in SETS}
    target_of = slides.target_of()
    targets = {name: np.array([target_of[slide] for slide in ids[name]]) for name in SETS}
    case_of = {record.slide_id: record.case_id for record in slides.records}
    cases = {name: np.array([case_of[slide] for slide in ids[name]]) for name in SETS}
    model = fit(settings, rows["train"], targets["train"], cases["train"])
    width = 1 if settings.model == "topk" else None
    predicted = {name: model.predict_proba(rows[name][:, :width]) for name in ("val", "test")}
    threshold = None
    if len(slides.classes) == 2:
        threshold = youden_threshold(targets["val"] == 1, predicted["val"][:, 1])
    results: dict[str, Any] = {
        "model": settings.model,
        "seed": settings.seed,
        "fold": split.fold,
        "threshold": threshold,
        "best_epoch": None,
        "epochs": None,
        "val_auc": float(auc(targets["val"], predicted["val"])[0]),
    }
    task, parts = Classification(slides.classes), {}
    for name, values in predicted.items():
        parts[name] = Predictions(split.fold, cases[name], targets[name], values, threshold)
        metrics = task.evaluate(parts[name]).items()
        results[name] = {metric: float(value[0]) for metric, value in metrics}
    write_run_predictions(run.path / "predictions.csv", task, ids, parts)
    run.finish(results)


def read_benchmark(config: Config) -> dict[str, Any]:
    """The summary of the benchmark that the rows stand beside, empty without one.

    Raises:
        UserError: not finished, of another task, or with another positive class than `positive`.
    """
    if not config.benchmark:
        return {}
    summary = read_json(Path(config.benchmark) / "summary.json", "a finished benchmark's summary")
    task, classes = summary.get("task", "classes"), summary["classes"]
    if task != Classification.kind:
        raise UserError(
            f"{config.benchmark}: expected a benchmark of task=classes, found task={task}; leave "
            "benchmark out"
        )
    if config.positive not in (None, classes[-1]):
        raise UserError(
            f"positive={config.positive}: expected '{classes[-1]}', the positive class of "
            f"{config.benchmark}, whose cuts and "
            "probabilities are of that class; leave positive out"
        )
    return summary


def read_cohort(config: Config, summary: dict[str, Any]) -> tuple[LabelledSlides, list[Split]]:
    """The slides and their splits: the benchmark's, with its classes; those of `splits`; or new
    ones by the same rules.
    """
    values = list_split_values(config.subset)
    slides = read_labelled_slides(config.labels, values, config.positive)
    folder = config.splits or (f"{config.benchmark}/splits" if summary else "")
    if not folder:
        drawn = (config.protocol, config.folds, config.val_fraction, config.split_seed)
        splits = make_splits(slides, *drawn)
        return select_known_slides("", splits, slides), splits
    folds = belonging(summary)[1]
    splits = [split for split in read_stored_splits(folder) if folds is None or split.fold in folds]
    slides = select_known_slides(folder, splits, slides)
    if summary:
        classes = tuple(summary["classes"])
        other = next((record for record in slides.records if record.label not in classes), None)
        if other is not None:
            raise UserError(
                f"{config.labels}: slide {other.slide_id}: expected a class of "
                f"{config.benchmark}, {', '.join(classes)}, found "
                f"'{other.label}'; give the benchmark's labels"
            )
        slides = LabelledSlides(slides.records, classes)
    return slides, check_splits(splits, slides, slides.slide_ids, config.shared_patients)


def read_benchmark_rows(
    folder: Path, summary: dict[str, Any], splits: Sequence[Split]
) -> tuple[list[FinishedRun], dict[str, dict[str, Any]]]:
    """The finished runs of a benchmark, its feature sets in the order of its summary, and what
    their encoders cost.

    Raises:
        UserError: a run that was not tested on the benchmark's splits.
    """
    finished = read_benchmark_runs(folder, summary, summary["models"], read_task(summary))
    tested = {split.fold: set(split.test) for split in splits}
    for run in finished:
        if set(run.slides) != tested.get(run.test.fold):
            raise UserError(
                f"{folder}: expected runs on the splits in {folder}/splits, found other test "
                f"slides in fold {run.test.fold} of "
                f"{run.feature_set}/{run.model}; start mil.benchmark on it again, with the keys "
                "that these runs were made with"
            )
    sets = summary["feature_sets"].items()
    return finished, {name: {cost: entry.get(cost) for cost in COST_KEYS} for name, entry in sets}


def open_all(
    config: Config, slides: LabelledSlides, splits: Sequence[Split], digest: str
) -> list[tuple[DetectionSettings, Split, Run]]:
    """Every model on every fold with its run directory; one that holds another run is refused
    before anything is written.
    """
    output, decided = Path(config.output), (config.top_k, config.thresholds, config.c)
    if config.overwrite:
        # the runs it speaks of are fitted again
        (output / "summary.json").unlink(missing_ok=True)
    runs = []
    for model in MODELS:
        settings = DetectionSettings(model, *decided, config.split_seed)
        for split in splits:
            place = f"{config.name}/{model}/seed{settings.seed}_fold{split.fold}"
            data = (settings, slides, split, digest, config.overwrite)
            runs.append((settings, split, open_fold(output / "runs" / place, *data)))
    return runs


def write_all(
    config: Config,
    classes: Sequence[str],
    finished: list[FinishedRun],
    costs: dict[str, dict[str, Any]],
    splits: Sequence[Split],
) -> None:
    """results.csv, predictions.csv, summary.csv and summary.json, and the table on the screen."""
    output, task = Path(config.output), Classification(tuple(classes))
    own = {"seeds": [config.split_seed], "folds": [split.fold for split in splits]}
    write_predictions(output, finished)
    summary = write_evaluation(output, finished, task, config.resamples, config.split_seed)
    # the table's headline columns: of a benchmark's own sets they are in its summary
    sets = add_headline(summary, costs, "logistic", task.headline)
    models = list(dict.fromkeys(run.model for run in finished))
    content = {"runs": own, "feature_sets": sets, "models": models, "classes": list(classes)}
    write_json(output / "summary.json", content)
    print(text_table(sets, models, task))


def check(config: Config) -> None:
    """Numbers that cannot be."""
    if config.top_k < 1:
        raise UserError(f"top_k={config.top_k}: expected at least 1")
    if not config.thresholds or not all(0 <= t <= 1 for t in config.thresholds):
        raise UserError(
            f"thresholds={config.thresholds}: expected confidences in 0..1, at least one"
        )
    if config.c <= 0:
        raise UserError(f"c={config.c}: expected a number above 0")
    safe_id(config.name, "feature set")
    if config.benchmark and config.splits:
        raise UserError(
            "expected either benchmark=<folder>, whose splits are taken, or splits=<folder>; give "
            "one of them"
        )
    if config.benchmark and Path(config.benchmark).resolve() == Path(config.output).resolve():
        raise UserError(
            f"output={config.output}: expected another folder than the benchmark's, whose tables "
            "stay; set output="
        )
    if config.benchmark and (Path(config.benchmark) / "runs" / config.name).is_dir():
        raise UserError(
            f"name={config.name}: the benchmark has a feature set of that name; set name="
        )


def main(config: Config) -> int:
    check(config)
    output = Path(config.output)
    summary = read_benchmark(config)
    slides, splits = read_cohort(config, summary)
    files = find_detections(config.detections, slides.slide_ids)
    bags = find_bags(Path(config.channel), slides.slide_ids) if config.channel else {}
    benchmark = Path(config.benchmark)
    finished, costs = read_benchmark_rows(benchmark, summary, splits) if summary else ([], {})
    found = read_all(files)
    lines = (f"{slide}:{sha256_file(path)}\n".encode() for slide, path in sorted(files.items()))
    runs = open_all(config, slides, splits, sha256_bytes(*lines))
    features = {
        slide: make_slide_vector(found[slide], config.top_k, config.thresholds)
        for slide in slides.slide_ids
    }
    rows = [{"slide_id": slide, **row} for slide, row in features.items()]
    write_csv(output / "slide_features.csv", list(rows[0]), rows)
    write_splits(output / "splits", splits)
    vectors = {slide: np.array(list(row.values())) for slide, row in features.items()}
    for settings, split, run in runs:
        if run.results is None:
            run_fold(run, settings, slides, split, vectors)
        finished.append(read_finished(run.path, config.name, Classification(slides.classes)))
    write_all(config, slides.classes, finished, costs, splits)
    if config.channel:
        place = output / "features" / f"{Path(config.channel).name}_detections"
        target = Path(config.channel_output or place)
        count = write_channels(bags, found, files, target, config.overwrite)
        logger.info("%s: %d bags written, %d there already", target, count, len(bags) - count)
    return 0


if __name__ == "__main__":
    launch(main, Config)
