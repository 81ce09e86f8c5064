"""Encode every tile of a cohort with a D2VFM student: the extraction loop of patch_encoder, one more encoder.

    python -m detection_kd.extract_student slides=... coords=... student=runs/d2vfm/checkpoint_best.pt output=runs/features

Tiles keep their native size (no resize), as TS2G-KD extracts.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.cli import launch
from common.config import REQUIRED, key
from common.device import PRECISIONS, pick_device, pick_precision
from common.files import safe_id
from detection_kd.models.student import student_encoder
from patch_encoder.engine import ExtractSettings, extract
from patch_encoder.models.encoders import Encoder


@dataclass
class Config:
    """Keys of student extraction."""

    slides: str = key(REQUIRED, "folder of slides, any tree", path=True)
    coords: str = key(REQUIRED, "folder of coordinates files, as tile_slides wrote it", path=True)
    student: str = key(REQUIRED, "checkpoint of train_d2vfm", path=True)
    output: str = key(REQUIRED, "features folder; bags go to <output>/<name>/h5_files", runtime=True)
    name: str = key("student", "folder name of the student's bags", runtime=True)
    labels: str = key("", "labels.csv: encode only its slides, and take mpp from it", path=True)
    batch_size: int = key(64, "tiles a batch (published: 16)", runtime=True)
    workers: int = key(2, "decoding processes; 0 decodes in the main process", runtime=True)
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    precision: str = key("auto", "auto: bf16 where the device has it (published: fp32)", choices=PRECISIONS)
    dtype: str = key("float32", "type of the stored features", choices=("float16", "float32"))
    pt: bool = key(False, "also write pt_files/<slide_id>.pt")
    overwrite: bool = key(False, "replace bags of another provenance", runtime=True)


def build_model(config: Config) -> Encoder:
    """The student of this configuration."""
    return student_encoder(config.student, safe_id(config.name, "name"))


def main(config: Config) -> int:
    device = pick_device(config.device)
    settings = ExtractSettings(
        device,
        pick_precision(config.precision, device),
        config.batch_size,
        config.workers,
        config.dtype,
        config.pt,
        config.overwrite,
    )
    return extract(build_model(config), config.slides, config.coords, config.labels, config.output, settings)


if __name__ == "__main__":
    launch(main, Config)
