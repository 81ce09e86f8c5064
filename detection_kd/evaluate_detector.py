"""Evaluate a trained detector on annotated images: COCO metrics, FROC, predictions, curves, and
overlays to look at.

    python -m detection_kd.evaluate_detector detector=detector/checkpoint_best.pt
    annotations=test.json images=images output=out

Reads: a checkpoint of `train_detector`, COCO boxes with the categories it was trained on. Writes a
run directory with `results.json`, `predictions.json` (COCO results), `precision_recall.png`,
`froc.png` and `overlays/<image id>.jpg`. Runs under torchrun; sizes and classes are those of the
checkpoint's training, so that its validation set gives the same figures again.
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
from detection_kd.datasets.coco import DetectionSet, read_coco, same_categories
from detection_kd.datasets.detection import DetectionDataset, make_loader
from detection_kd.evaluation.coco_metrics import Prediction, average_precision
from detection_kd.evaluation.coco_results import write_results
from detection_kd.evaluation.froc import compute_froc
from detection_kd.evaluation.operating_point import count_hits, judge_set, resolve_min_score
from detection_kd.models.deformable_detr import DeformableDETR, load_detector
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, identity, key
from wsi_common.device import PRECISIONS, pick_precision
from wsi_common.distributed import World, init_distributed, local_processes
from wsi_common.errors import UserError
from wsi_common.files import sha256_file
from wsi_common.processes.pool import pick_workers
from wsi_common.progress import progress
from wsi_common.run import Run, open_run
from wsi_common.shared_weights import digest_weights_file

logger = logging.getLogger(__name__)
REPORTED = ("AP", "AP50", "AP75", "AR", "FROC")


@dataclass
class Config:
    """Keys of `evaluate_detector`."""

    detector: str = key(REQUIRED, "checkpoint of a detector", path=True)
    annotations: str = key(REQUIRED, "COCO JSON file with the annotated boxes", path=True)
    images: str = key(REQUIRED, "folder of the images that the annotations name", path=True)
    output: str = key(REQUIRED, "where the results are written; a run directory", runtime=True)
    eval_size: int = key(0, "short side of an image, px; 0: as in the detector's training")
    max_size: int = key(0, "most px of the long side; 0: as in the detector's training")
    max_detections: int = key(100, "number of detections that are kept; and counted, per image")
    iou: float = key(
        0.5, "overlap from which on a box has found a lesion, in FROC, counts and overlays"
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


def resolve_sizes(config: Config, training: dict[str, Any]) -> Config:
    """The keys with their values checked, and sizes taken from the checkpoint's training where they
    are 0.
    """
    limits = {"max_detections": 1, "overlays": 0, "batch_size": 1, "eval_size": 0, "max_size": 0}
    for name, least in limits.items():
        if getattr(config, name) < least:
            raise UserError(f"{name}={getattr(config, name)}: expected at least {least}")
    if not 0 < config.iou <= 1:
        raise UserError(f"iou={config.iou}: expected an overlap in (0, 1]")
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


def read_annotated(config: Config, description: dict[str, Any]) -> DetectionSet:
    """Images and boxes, with the detector's categories."""
    agnostic = description.get("training", {}).get("class_agnostic", False)
    annotated = read_coco(config.annotations, config.images, class_agnostic=agnostic)
    same_categories(DetectionSet([], description["categories"]), annotated)
    return annotated


def open_output(config: Config, world: World) -> Run:
    """The run directory, which is never that of a training."""
    if next(Path(config.output).glob("checkpoint_*.pt"), None) is not None:
        raise UserError(
            f"output={config.output}: expected a folder for the evaluation, found a training run; "
            "choose another"
        )
    inputs = {
        "detector": digest_weights_file(config.detector),
        "annotations": sha256_file(config.annotations),
    }
    return open_run(config.output, config, world, inputs=inputs, overwrite=config.overwrite)


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


def summarise(
    annotated: DetectionSet,
    predictions: list[Prediction],
    config: Config,
    min_score: float,
    seconds: float,
) -> dict[str, Any]:
    """Content of results.json but for the digests."""
    metrics = average_precision(annotated, predictions, config.max_detections) | compute_froc(
        annotated, predictions, config.iou
    )
    images = len(annotated.images)
    return metrics | {
        "images": images,
        "boxes": sum(int((~record.crowd).sum()) for record in annotated.images),
        "seconds": round(seconds, 3),
        "images_per_second": round(images / seconds, 3),
        "at_score": count_hits(
            judge_set(annotated, predictions, min_score, config.iou), annotated.categories
        ),
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


def main(config: Config) -> int:
    """Detect, measure, and write figures and overlays to the run directory; finished work is left
    alone.
    """
    from detection_kd.figures.detection import write_detection_figures  # a while to load

    world = init_distributed(config.device)
    if not world.is_main:
        logging.getLogger().setLevel(logging.WARNING)
    model, description = build_model(config)
    training = description.get("training", {})
    config = replace(
        resolve_sizes(config, training),
        precision=resolve_precision(config.precision, description, world.device),
    )
    min_score = resolve_min_score(config.min_score, description)
    annotated = read_annotated(config, description)
    run = open_output(config, world)
    if run.results is not None:
        logger.info("%s: finished evaluation, AP %.3f; nothing to do", run.path, run.results["AP"])
        return 0
    model.to(world.device).backbone.to(memory_format=torch.channels_last)
    begun = time.monotonic()
    predictions = detect(
        model, annotated, config, world, training.get("augmentation", {}).get("pad_to", 0)
    )
    seconds = time.monotonic() - begun
    results = summarise(annotated, predictions, config, min_score, seconds)
    if not world.is_main:
        return 0
    write_results(run.path / "predictions.json", annotated, predictions)
    shown = {
        "max_detections": config.max_detections,
        "iou": config.iou,
        "score": min_score,
        "overlays": config.overlays,
    }
    write_detection_figures(run.path, annotated, predictions, **shown)
    digests = {
        "detector_sha256": digest_weights_file(config.detector),
        "annotations_sha256": sha256_file(config.annotations),
    }
    run.finish(results | digests)  # last: where it is, the evaluation is done
    logger.info("%s: %s", run.path, ", ".join(f"{name} {results[name]:.3f}" for name in REPORTED))
    return 0


if __name__ == "__main__":
    launch(main, Config)
