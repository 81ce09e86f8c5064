"""Encode every tile of a cohort with a D2VFM student: the extraction loop of patch_encoder, one more encoder.

    python -m detection_kd.extract_student slides=... coords=... student=runs/d2vfm/checkpoint_best.pt output=runs/features

Tiles keep their native size (no resize), as TS2G-KD extracts.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.cli import launch
from common.config import REQUIRED, key
from common.files import safe_id
from detection_kd.models.student import student_encoder
from patch_encoder.engine import extract
from patch_encoder.extraction_keys import FeatureKeys
from patch_encoder.models.encoders import Encoder


@dataclass
class Config(FeatureKeys):
    """Keys of student extraction (published: batches of 16, fp32)."""

    student: str = key(REQUIRED, "checkpoint of train_d2vfm", path=True)
    name: str = key("student", "folder name of the student's bags", runtime=True)


def build_model(config: Config) -> Encoder:
    """The student of this configuration."""
    return student_encoder(config.student, safe_id(config.name, "name"))


def main(config: Config) -> int:
    return extract(build_model(config), config.slides, config.coords, config.labels, config.output, config.settings())


if __name__ == "__main__":
    launch(main, Config)
