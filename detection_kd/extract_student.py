"""Encode every tile of a cohort with a D2VFM student: the extraction loop of patch_encoder, one
more encoder.

    python -m detection_kd.extract_student slides=... coords=...
    student=runs/d2vfm/checkpoint_best.pt output=runs/features

Tiles keep their native size (no resize), as TS2G-KD extracts. A student that `export_student` wrote
(`.onnx`, float32 or int8) is run by onnxruntime, in the precision of its file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from common.cli import launch
from common.config import REQUIRED, key
from common.device import pick_device
from common.errors import UserError
from common.files import safe_id
from detection_kd.models.student_onnx import any_student_encoder
from patch_encoder.extraction.keys import FeatureKeys
from patch_encoder.extraction.loop import ExtractSettings, extract
from patch_encoder.models.encoders import Encoder


@dataclass
class Config(FeatureKeys):
    """Keys of student extraction (published: batches of 16, fp32)."""

    student: str = key(
        REQUIRED, "checkpoint of train_d2vfm, or an .onnx file of export_student", path=True
    )
    name: str = key(
        "", "folder name of the bags; empty: student, student_onnx or student_int8", runtime=True
    )

    def settings(self) -> ExtractSettings:
        """The same, where an exported student decides its precision itself."""
        if Path(self.student).suffix != ".onnx":
            return super().settings()
        if self.compile:
            raise UserError(
                f"compile=true: {self.student} is run by onnxruntime, not compiled; set "
                "compile=false"
            )
        if self.precision not in ("auto", "fp32"):
            raise UserError(
                f"precision={self.precision}: {self.student} has its own; set precision=auto"
            )
        return replace(super().settings(), precision="fp32")


def build_model(config: Config) -> Encoder:
    """The student of this configuration."""
    return any_student_encoder(
        config.student,
        safe_id(config.name, "name") if config.name else "",
        pick_device(config.device),
    )


def main(config: Config) -> int:
    settings = config.settings()  # refuses before the student is loaded
    return extract(
        build_model(config), config.slides, config.coords, config.labels, config.output, settings
    )


if __name__ == "__main__":
    launch(main, Config)
