"""Export a trained detector to ONNX, and compare the file with the PyTorch detector on pictures.

    python -m detection_kd.export_detector detector=runs/detector/checkpoint_best.pt
    images=detection/images output=runs/export_detector

Writes `detector.onnx` and `export_detector.json` (digests, versions, how well the detections
agree). A file whose detections are not the detector's is an error, and nothing is written.
`detect_slide` takes the file as `detector=`.
"""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from detection_kd.box_sets.boxed_pictures import PictureFolder
from detection_kd.engine import post_process
from detection_kd.evaluation.froc import find_overlaps
from detection_kd.models.deformable_detr import DeformableDETR, load_detector
from detection_kd.models.deformable_transformer import Detections
from detection_kd.models.detector_onnx import OnnxDetector, export_detector
from detection_kd.models.export_files import is_exported, publish_export
from detection_kd.models.onnx_export import OPSET, import_onnx
from detection_kd.whole_slides.detector_file import normalise_pixels
from patch_encoder.models.onnx_network import import_onnxruntime
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes
from wsi_common.shared_weights import digest_weights_file

logger = logging.getLogger(__name__)
FILE, RECORD = "detector.onnx", "export_detector.json"
COMPARED = 50  # detections per picture
BARS = {"iou": 0.99, "score": 0.002}  # least overlap, largest difference


@dataclass
class Config:
    """Keys of the export."""

    detector: str = key(REQUIRED, "checkpoint of a detector", path=True)
    images: str = key(
        REQUIRED,
        "folder of the images that the annotations name; the file is compared on some of them",
        path=True,
    )
    output: str = key(
        REQUIRED, "where the results are written; detector.onnx and a record", runtime=True
    )
    height: int = key(0, "height of the pictures that the file takes, px; 0: eval_size", least=0)
    width: int = key(0, "width of the pictures that the file takes, px; 0: as height", least=0)
    check_images: int = key(
        8, "number of images on which the file is compared with PyTorch", least=2
    )
    seed: int = key(0, "seed of everything that is drawn at random")
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def find_size(config: Config, description: dict[str, Any]) -> tuple[int, int]:
    """Height and width that the file takes."""
    trained = description.get("training", {}).get("augmentation", {}).get("eval_size", 0)
    height = config.height or trained
    if height < 32 or 0 < config.width < 32:
        raise UserError(
            f"height={config.height} width={config.width}: expected at least 32 px, or a "
            "checkpoint that states the eval_size of its training"
        )
    return height, config.width or height


def read_pixels(config: Config, size: tuple[int, int]) -> UInt8[Tensor, "n 3 h w"]:
    """Pictures drawn at random, at the size that the file takes."""
    pictures = list(PictureFolder(Path(config.images)).files.values())
    if len(pictures) < config.check_images:
        raise UserError(
            f"check_images={config.check_images}: expected so many pictures, found {len(pictures)}"
        )
    order = np.random.default_rng(config.seed).permutation(len(pictures))
    found = []
    for index in order[: config.check_images]:
        try:
            with Image.open(pictures[index]) as picture:
                found.append(np.asarray(picture.convert("RGB").resize(size[::-1])))
        except OSError as error:
            raise UserError(f"{pictures[index]}: expected a picture: {error}") from None
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def compare_detections(
    model: DeformableDETR, exported: OnnxDetector, pixels: UInt8[Tensor, "n 3 h w"]
) -> dict[str, float]:
    """How well the file's best detections agree with PyTorch's: for each of these the file's
    detection of its class that overlaps it most.

    Returns:
        `iou`, the least overlap, and `score`, the largest difference.

    Raises:
        UserError: one of them misses its bar.
    """
    least, apart = 1.0, 0.0
    for part in pixels.split(2):
        images = normalise_pixels(part)
        padding = torch.zeros_like(part[:, 0], dtype=torch.bool)
        ours, theirs = (_best(network(images, padding), part) for network in (model, exported))
        for (boxes, scores, labels), (others, other_scores, other_labels) in zip(
            ours, theirs, strict=True
        ):
            overlaps = find_overlaps(boxes, others)[0] * (labels[:, None] == other_labels)
            # the file's detections that lie on it; of several, the one of the same score
            near = overlaps >= np.minimum(overlaps.max(1), BARS["iou"])[:, None]
            gaps = np.where(near, np.abs(scores[:, None] - other_scores), np.inf).min(1)
            least = min(least, float(overlaps.max(1).min()))
            apart = max(apart, float(gaps.max()))
    if not (least >= BARS["iou"] and apart <= BARS["score"]):
        raise UserError(
            f"export: {FILE}: expected detections that overlap PyTorch's by {BARS['iou']} with "
            f"scores within {BARS['score']}, found {least:.4f} and {apart:.4f} on "
            f"{len(pixels)} pictures; nothing was written; report the detector's architecture"
        )
    return {"iou": least, "score": apart}


def _best(
    detections: Detections, pixels: Tensor
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    sizes = [(pixels.shape[3], pixels.shape[2])] * len(pixels)
    return post_process(detections, sizes, COMPARED)


def main(config: Config) -> int:
    """Export, compare, and leave the file with its record; a finished export is left alone."""
    import_onnx()
    import_onnxruntime()
    model, description = load_detector(config.detector)
    model, output = model.eval(), Path(config.output)
    size = find_size(config, description)
    pixels = read_pixels(config, size)
    wanted = {
        "detector_sha256": digest_weights_file(config.detector),
        "size": list(size),
        "pictures": {"count": len(pixels), "sha256": sha256_bytes(pixels.numpy().tobytes())},
        "opset": OPSET,
    }
    if is_exported(output / RECORD, wanted, "export_detector", config.overwrite):
        logger.info("export_detector: %s is there", output)
        return 0
    note = {**description, "size": list(size), "detector_sha256": wanted["detector_sha256"]}
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export.", dir=output) as folder:
        path = Path(folder) / FILE
        export_detector(model, pixels[:1], path, note)
        agreement = compare_detections(model, OnnxDetector(path), pixels)
        content = wanted | {"agreement": agreement, "bars": BARS}
        publish_export(Path(folder), output / RECORD, [FILE], [FILE], content)
    logger.info("export_detector: %s: IoU %.4f, scores within %.5f", FILE, *agreement.values())
    return 0


if __name__ == "__main__":
    launch(main, Config)
