"""Evaluate a trained detector on annotated images: COCO metrics, FROC, predictions, curves, and
overlays to look at.

    python -m detection_kd.evaluate_detector detector=detector/checkpoint_best.pt
    annotations=test.json images=images output=out

Reads: a checkpoint of `train_detector`, COCO boxes with the categories it was trained on; or, in
place of a checkpoint, `results=`, the COCO results of any detector. Writes a run directory with
`results.json`, `predictions.json` (COCO results), `precision_recall.png`, `froc.png`,
`confusion.png` and `overlays/<image id>.jpg`. Runs under torchrun; sizes and classes are those of
the checkpoint's training, so that its validation set gives the same figures again.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from detection_kd import engine
from detection_kd.box_sets.image_groups import group_images
from detection_kd.datasets.class_map import check_class_map, relabel_table
from detection_kd.datasets.coco import (
    DetectionSet,
    read_category_names,
    read_coco,
    same_categories,
)
from detection_kd.datasets.detection import DetectionDataset, make_loader
from detection_kd.evaluation.coco_metrics import Prediction, average_precision, find_intervals
from detection_kd.evaluation.coco_results import read_results, write_results
from detection_kd.evaluation.froc import compute_froc
from detection_kd.evaluation.operating_point import (
    BACKGROUND,
    count_confusions,
    count_hits,
    judge_set,
    resolve_min_score,
)
from detection_kd.models.deformable_detr import DeformableDETR, load_detector
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, identity, key
from wsi_common.device import PRECISIONS, pick_precision
from wsi_common.distributed import World, init_distributed, local_processes
from wsi_common.errors import UserError
from wsi_common.files import sha256_file
from wsi_common.metrics.run_bootstrap import format_with_interval
from wsi_common.processes.pool import pick_workers
from wsi_common.progress import progress
from wsi_common.run import Run, open_run
from wsi_common.shared_weights import digest_weights_file

logger = logging.getLogger(__name__)
REPORTED = ("AP", "AP50", "AP75", "AR", "FROC")


@dataclass
class Config:
    """Keys of `evaluate_detector`."""

    detector: str = key("", "checkpoint of a detector", path=True)
    results: str = key(
        "", "COCO results (JSON) of any detector; evaluated in place of a checkpoint", path=True
    )
    class_map: dict[str, Any] = key(
        {},
        "categories to merge, rename or leave out; in the annotations and in what was detected; "
        "empty: as in the detector's training",
    )
    annotations: str = key(REQUIRED, "COCO JSON file with the annotated boxes", path=True)
    images: str = key(REQUIRED, "folder of the images that the annotations name", path=True)
    output: str = key(REQUIRED, "where the results are written; a run directory", runtime=True)
    eval_size: int = key(0, "short side of an image, px; 0: as in the detector's training")
    max_size: int = key(0, "most px of the long side; 0: as in the detector's training")
    max_detections: int = key(100, "number of detections that are kept; and counted, per image")
    iou: float = key(
        0.5,
        "overlap from which on a box has found a lesion, in FROC, counts and overlays; and in the "
        "confusion matrix",
    )
    min_score: str = key(
        "auto",
        "detections below this score are dropped; neither in the overlays nor in the counts; auto: "
        "the checkpoint's, which its validation chose",
    )
    overlays: int = key(
        12,
        "number of images to draw with their boxes; half of them those with most "
        "errors, the others at random",
    )
    resamples: int = key(
        1000,
        "bootstrap resamples of the confidence intervals; of AP and AP50; 0: no intervals",
        least=0,
    )
    group: str = key(
        "",
        "regular expression; images whose names match alike stay together, as ^[^_]+, in the "
        "resamples; empty: each on its own",
    )
    batch_size: int = key(
        1,
        "items per step over all processes; images; above 1, smaller images are padded, "
        "which moves scores a little",
    )
    precision: str = key(
        "auto",
        "number format of the computation; auto: that of the checkpoint's training; boxes are "
        "always fp32",
        choices=PRECISIONS,
    )
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    workers: int | None = key(
        None,
        "worker processes; they load images, per process; null: one per core, at most 8",
        runtime=True,
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def check_limits(config: Config) -> None:
    """Numbers that cannot be."""
    limits = {"max_detections": 1, "overlays": 0, "batch_size": 1, "eval_size": 0, "max_size": 0}
    for name, least in limits.items():
        if getattr(config, name) < least:
            raise UserError(f"{name}={getattr(config, name)}: expected at least {least}")
    if not 0 < config.iou <= 1:
        raise UserError(f"iou={config.iou}: expected an overlap in (0, 1]")


def resolve_sizes(config: Config, training: dict[str, Any]) -> Config:
    """The keys with their values checked, and sizes taken from the checkpoint's training where they
    are 0.
    """
    check_limits(config)
    sizes = {
        name: getattr(config, name) or training.get("augmentation", {}).get(name, 0)
        for name in ("eval_size", "max_size")
    }
    if not all(sizes.values()):
        raise UserError(
            f"{config.detector}: holds no training settings to take sizes from; give eval_size= "
            "and max_size="
        )
    return replace(config, **sizes)


def build_model(config: Config) -> tuple[DeformableDETR, dict[str, Any]]:
    """The detector and its description from the checkpoint alone."""
    return load_detector(config.detector)


def read_annotated(config: Config, description: dict[str, Any]) -> tuple[DetectionSet, list[int]]:
    """Images and boxes, and which of their classes each of the detector's is (-1: none)."""
    training = description.get("training", {})
    class_map = config.class_map or training.get("class_map", {})
    agnostic, names = training.get("class_agnostic", False), description["categories"]
    if config.class_map:
        known = [*read_category_names(config.annotations), *names]
        check_class_map(known, config.class_map, f"{config.annotations} or the detector")
    options = {"class_agnostic": agnostic, "class_map": class_map}
    annotated = read_coco(config.annotations, config.images, **options)
    if agnostic or not class_map:
        same_categories(DetectionSet([], names), annotated)
        return annotated, list(range(len(names)))
    return annotated, relabel_table(names, class_map, annotated.categories)


def relabel(predictions: list[Prediction], table: list[int]) -> list[Prediction]:
    """Detections with the annotated classes; those that are left out go."""
    found = []
    for p in predictions:
        labels = np.array(table)[p.labels]
        kept = labels >= 0
        found.append(Prediction(p.index, p.boxes[kept], p.scores[kept], labels[kept]))
    return found


def open_output(config: Config, world: World) -> Run:
    """The run directory, which is never that of a training."""
    if next(Path(config.output).glob("checkpoint_*.pt"), None) is not None:
        raise UserError(
            f"output={config.output}: expected a folder for the evaluation, found a training run; "
            "choose another"
        )
    inputs = {name.removesuffix("_sha256"): value for name, value in digest_inputs(config).items()}
    return open_run(config.output, config, world, inputs=inputs, overwrite=config.overwrite)


def digest_inputs(config: Config) -> dict[str, str]:
    """Digests of the files that decide the figures."""
    found = {"annotations_sha256": sha256_file(config.annotations)}
    if config.detector:
        found["detector_sha256"] = digest_weights_file(config.detector)
    if config.results:
        found["results_sha256"] = sha256_file(config.results)
    return found


def detect(
    model: nn.Module, annotated: DetectionSet, config: Config, world: World, pad_to: int
) -> list[Prediction]:
    """Detections of every image, found by all processes together."""
    from detection_kd.datasets.transforms import make_eval_transform  # a while to load

    dataset = DetectionDataset(
        annotated.images, make_eval_transform(config.eval_size, config.max_size)
    )
    indices = range(len(dataset))[world.rank :: world.size]
    pin = world.device.type == "cuda"
    batches = make_loader(
        dataset,
        indices,
        config.batch_size,
        workers=pick_workers(config.workers, share=local_processes()),
        pad_to=pad_to,
        pin=pin,
    )
    shown = progress(batches, "evaluation", len(batches), "batch", enabled=world.is_main)
    predictions = engine.detect(
        model, shown, annotated.images, config.max_detections, config.precision
    )
    for prediction in predictions:
        if not (np.isfinite(prediction.boxes).all() and np.isfinite(prediction.scores).all()):
            image = annotated.images[prediction.index].path
            raise UserError(
                f"{image}: expected finite boxes and scores, found NaN; set precision=fp32 or "
                "check the detector"
            )
    return predictions


@dataclass
class Evaluated:
    """What is measured: detections of annotated images, the slide or patient of each image, from
    which score on detections count, and how long finding them took (0: found elsewhere).
    """

    annotated: DetectionSet
    predictions: list[Prediction]
    groups: np.ndarray
    min_score: float
    seconds: float


def summarise(found: Evaluated, config: Config) -> dict[str, Any]:
    """Content of results.json but for the digests."""
    annotated, predictions, min_score = found.annotated, found.predictions, found.min_score
    speed = {}
    if found.seconds:
        rate = len(annotated.images) / found.seconds
        speed = {"seconds": round(found.seconds, 3), "images_per_second": round(rate, 3)}
    metrics: dict[str, Any] = average_precision(annotated, predictions, config.max_detections)
    metrics |= compute_froc(annotated, predictions, config.iou)
    if config.resamples:
        options = (found.groups, config.resamples, config.max_detections)
        metrics |= find_intervals(annotated, predictions, *options)
    images = len(annotated.images)
    judged = judge_set(annotated, predictions, min_score, config.iou)
    confusions = count_confusions(judged, annotated.categories, config.iou)
    return metrics | {
        "images": images,
        "boxes": sum(int((~record.crowd).sum()) for record in annotated.images),
        **speed,
        "at_score": count_hits(judged, annotated.categories),
        "confusion": {
            "classes": [*annotated.categories, BACKGROUND],
            "annotated_by_detected": confusions.tolist(),
        },
        "min_score": min_score,
        "settings": identity(config),
    }


def resolve_precision(asked: str, description: dict[str, Any], device: torch.device) -> str:
    """The precision that is asked for; `auto`: that of the detector's training, or the device's own
    where it cannot compute in that one.
    """
    trained = description.get("precision", "auto")
    if asked != "auto" or (trained == "fp16" and device.type == "cpu"):
        return pick_precision(asked, device)
    return pick_precision(trained, device)


def evaluate_checkpoint(config: Config, world: World) -> tuple[Run, Config, Evaluated | None]:
    """Detect on the annotated images; None where the evaluation is finished already.

    Returns:
        The run directory, the keys with `auto` resolved, and what was found.
    """
    model, description = build_model(config)
    training = description.get("training", {})
    config = replace(
        resolve_sizes(config, training),
        precision=resolve_precision(config.precision, description, world.device),
    )
    min_score = resolve_min_score(config.min_score, description)
    annotated, table = read_annotated(config, description)
    groups = group_images(annotated, config.images, config.group)
    run = open_output(config, world)
    if run.results is not None:
        return run, config, None
    model.to(world.device).backbone.to(memory_format=torch.channels_last)
    begun = time.monotonic()
    pad_to = training.get("augmentation", {}).get("pad_to", 0)
    predictions = relabel(detect(model, annotated, config, world, pad_to), table)
    seconds = time.monotonic() - begun
    return run, config, Evaluated(annotated, predictions, groups, min_score, seconds)


def evaluate_results(config: Config, world: World) -> tuple[Run, Config, Evaluated | None]:
    """Read the detections of another detector; as `evaluate_checkpoint`."""
    check_limits(config)
    min_score = resolve_min_score(config.min_score, {})
    if config.class_map:
        names = read_category_names(config.annotations)
        check_class_map(names, config.class_map, config.annotations)
    annotated = read_coco(config.annotations, config.images, class_map=config.class_map)
    groups = group_images(annotated, config.images, config.group)
    run = open_output(config, world)
    if run.results is not None:
        return run, config, None
    predictions = read_results(config.results, annotated)
    return run, config, Evaluated(annotated, predictions, groups, min_score, 0)


def main(config: Config) -> int:
    """Detect, measure, and write figures and overlays to the run directory; finished work is left
    alone.
    """
    from detection_kd.figures.detection import write_detection_figures  # a while to load

    world = init_distributed(config.device)
    if not world.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    if bool(config.detector) == bool(config.results):
        raise UserError(
            "expected detector=<checkpoint> or results=<COCO results>, found "
            f"{'both' if config.detector else 'none'}; give one of them"
        )
    evaluate = evaluate_checkpoint if config.detector else evaluate_results
    run, config, found = evaluate(config, world)
    if found is None:
        assert run.results is not None
        logger.info("%s: finished evaluation, AP %.3f; nothing to do", run.path, run.results["AP"])
        return 0
    if not world.is_main:
        return 0
    results = summarise(found, config)
    write_results(run.path / "predictions.json", found.annotated, found.predictions)
    shown = {
        "max_detections": config.max_detections,
        "iou": config.iou,
        "score": found.min_score,
        "overlays": config.overlays,
    }
    write_detection_figures(run.path, found.annotated, found.predictions, **shown)
    run.finish(results | digest_inputs(config))  # last: where it is, the evaluation is done
    shown_values = (
        f"{name} {format_with_interval(results[name], results.get(f'{name}_ci'))}"
        for name in REPORTED
    )
    logger.info("%s: %s", run.path, ", ".join(shown_values))
    return 0


if __name__ == "__main__":
    launch(main, Config)
