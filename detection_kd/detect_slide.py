"""Run a trained detector over whole slides or tile folders: every slide's lesions as COCO JSON and
as GeoJSON for QuPath.

    python -m detection_kd.detect_slide slides=cohort/slides coords=tiles
    detector=detector/checkpoint_best.pt output=found

Reads: slides, coordinates of `tile_slides` (overlap=0.25 keeps lesions on seams whole), a
checkpoint of `train_detector` or a file of `export_detector`.
Writes: `<output>/coco/<slide_id>.json`, `<output>/geojson/<slide_id>.geojson`, `failures.csv`. A
slide is the unit of resuming.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from detection_kd.datasets.training_field import choose_scale
from detection_kd.engine import post_process
from detection_kd.evaluation.operating_point import resolve_min_score
from detection_kd.whole_slides.detector_file import normalise_pixels, open_detector
from detection_kd.whole_slides.slide_detections import (
    BoxCollector,
    FoundBoxes,
    make_detections_document,
    write_geojson,
)
from detection_kd.whole_slides.tile_pass import (
    find_in_slides,
    find_unfinished,
    to_tensor,
)
from patch_encoder.cohort.failures import Failures
from patch_encoder.extraction.keys import ExtractionKeys
from patch_encoder.extraction.loop import ExtractSettings, cohort_jobs
from patch_encoder.extraction.tile_batches import TileSequence
from patch_encoder.tiles.coordinates import SlideJob
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.device import autocast
from wsi_common.files import write_json
from wsi_common.shared_weights import digest_weights_file

logger = logging.getLogger(__name__)
STAGE = "detect_slide"


@dataclass
class Config(ExtractionKeys):
    """Keys of detection on slides (`dtype` and `pt` do not matter here)."""

    detector: str = key(
        REQUIRED, "checkpoint of a detector; or a file of export_detector (.onnx)", path=True
    )
    scale: str = key(
        "auto",
        "factor on a tile's side before the detector; auto: to the resolution of its training",
    )
    min_score: str = key(
        "auto",
        "detections below this score are dropped; auto: the checkpoint's, which its validation "
        "chose",
    )
    max_detections: int = key(300, "number of detections that are kept; per tile")
    nms_iou: float = key(0.5, "overlap above which the weaker of two boxes of a class goes")


class Limits(NamedTuple):
    """What decides which detections a tile has, with `auto` resolved."""

    scale: float
    min_score: float
    max_detections: int
    nms_iou: float


def resolve(config: Config, description: dict[str, Any], jobs: list[SlideJob]) -> Limits:
    """The keys' values for these slides, from the checkpoint where they are `auto`."""
    tiles = [job.coordinates.geometry for job in jobs]
    scale = choose_scale(config.scale, description.get("field"), tiles)
    min_score = resolve_min_score(config.min_score, description)
    return Limits(scale, min_score, config.max_detections, config.nms_iou)


@torch.inference_mode()
def detect_tiles(
    model: nn.Module,
    limits: Limits,
    settings: ExtractSettings,
    tiles: Tensor,
    jobs: Sequence[SlideJob],
) -> list[FoundBoxes]:
    """Detections of a batch of tiles uint8 (B, 3, H, W) of these slides, in level-0 px of each
    tile.
    """
    sides = [job.coordinates.geometry.patch_size_level0 for job in jobs]
    images = normalise_pixels(tiles.to(settings.device, non_blocking=True), limits.scale)
    padding = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool, device=images.device)
    with autocast(settings.device, settings.precision):
        detections = model(images, padding)
    found = (
        FoundBoxes(*item)
        for item in post_process(
            detections, [(side, side) for side in sides], limits.max_detections
        )
    )
    return [
        FoundBoxes(*(values[item.scores >= limits.min_score] for values in item)) for item in found
    ]


def main(config: Config) -> int:
    """Detect on every slide that has no document yet; 1 when slides failed."""
    settings = config.settings()
    model, description = open_detector(config.detector)
    model = model.to(settings.device).eval()
    output, failures = Path(config.output), Failures(STAGE, settings.shard.name)
    jobs = cohort_jobs(
        config.slides, config.coords, config.labels, failures, settings.shard, settings.selection
    )
    limits = resolve(config, description, jobs)
    weights = {"detector_sha256": digest_weights_file(config.detector)}
    documents = {job.slide_id: output / "coco" / f"{job.slide_id}.json" for job in jobs}
    wanted = find_unfinished(jobs, limits._asdict(), weights, settings, documents.__getitem__)
    todo = [job for job in jobs if job.slide_id in wanted]
    logger.info("%s: %d slides, %d already done", STAGE, len(jobs), len(jobs) - len(todo))
    categories = description["categories"]
    detect = partial(detect_tiles, model, limits, settings)
    sequence = TileSequence(todo, to_tensor)

    def collect(job: SlideJob) -> BoxCollector:
        return BoxCollector(job.coordinates, limits.nms_iou)

    for job, found in find_in_slides(sequence, detect, collect, settings, failures):
        path = output / "geojson" / f"{job.slide_id}.geojson"
        write_geojson(path, found, categories, job.coordinates.geometry.bounds)
        # last: where it is, the slide is done
        document = make_detections_document(
            found, job.coordinates, job.path.name, categories, wanted[job.slide_id]
        )
        write_json(documents[job.slide_id], document, lines=True)
        logger.info("%s: %d detections", job.slide_id, len(found.scores))
    return failures.write(output)


if __name__ == "__main__":
    launch(main, Config)
