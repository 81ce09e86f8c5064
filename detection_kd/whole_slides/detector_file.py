"""A detector from its file, a checkpoint or an ONNX file, and the pixels that it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from detection_kd.models.deformable_detr import load_detector
from detection_kd.models.detector_onnx import OnnxDetector
from patch_encoder.models.encoder_table import IMAGENET


def open_detector(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """A detector and its description from a checkpoint of `train_detector` or a file of
    `export_detector`.

    Raises:
        UserError: neither of both.
    """
    if Path(path).suffix == ".onnx":
        exported = OnnxDetector(path)
        return exported, exported.description
    return load_detector(path)


def normalise_pixels(
    pixels: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"], scale: float = 1.0
) -> Float[Tensor, "b 3 h w"]:
    """Pixels of 0..255 resized by a factor and normalised with ImageNet's mean and standard
    deviation.
    """
    images = pixels.float().div(255)
    if scale != 1.0:
        images = nn.functional.interpolate(
            images, scale_factor=scale, mode="bilinear", antialias=True
        )
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in IMAGENET)
    return ((images - mean) / std).contiguous(memory_format=torch.channels_last)
