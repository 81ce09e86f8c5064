"""A detector as an ONNX file, and such a file as a detector.

The file takes uint8 pixels (B, 3, H, W) of one size, in batches of any size (of one picture, where
torch cannot leave that free for a detector), and gives `scores` (B,
queries, classes) in 0..1 and `boxes` (B, queries, 4), xyxy as fractions of the picture. The
normalisation is part of the graph; the deformable attention is exported in the form of
`ops.gather`. What `build_detector` needs stands in the file's metadata. Height and width are fixed:
with free ones torch's exporter wrote graphs that onnxruntime refused.
"""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from detection_kd.losses.boxes import cxcywh_to_xyxy
from detection_kd.models.deformable_detr import DeformableDETR
from detection_kd.models.deformable_layers import MSDeformAttn
from detection_kd.models.deformable_transformer import Detections
from detection_kd.models.onnx_export import (
    export_error,
    export_program,
    import_onnx,
    read_note,
    save_with_note,
)
from detection_kd.ops.gather import ms_deform_attn_gather
from patch_encoder.models.encoder_table import IMAGENET
from patch_encoder.models.onnx_network import open_session
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
TRACED = 2  # pictures for a free batch: torch takes a single one for a constant
KEY = "detector"  # metadata of the file: what it is, as JSON


class DetectorGraph(nn.Module):
    """What is exported: pixels in, probabilities and corners out.

    Args:
        model: the detector; it is copied.
    """

    def __init__(self, model: DeformableDETR) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).float().eval().requires_grad_(False)
        for module in self.model.modules():
            if isinstance(module, MSDeformAttn):
                module.attend = ms_deform_attn_gather
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
        # under no name of an operator, which the exporter gives to constants that it folds
        self.register_buffer("pixel_mean", mean)
        self.register_buffer("pixel_std", std)

    def forward(
        self, pixels: UInt8[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b q classes"], Float[Tensor, "b q 4"]]:
        """Scores and boxes of every query of the last decoder layer."""
        images = (pixels.float() / 255 - self.pixel_mean) / self.pixel_std
        padding = torch.zeros_like(pixels[:, 0], dtype=torch.bool)
        found = self.model(images, padding)
        return found.logits[-1].sigmoid(), cxcywh_to_xyxy(found.boxes[-1]).clamp(0, 1)


def export_detector(
    model: DeformableDETR, pixels: UInt8[Tensor, "b 3 h w"], path: Path, note: dict[str, Any]
) -> None:
    """Write a detector as an ONNX file.

    Args:
        model: the detector.
        pixels: one picture or more of the size that the file will take.
        path: file to write.
        note: what the file is: the description in the checkpoint, and digests.

    Raises:
        UserError: packages missing, or a trunk that torch cannot export.
    """
    import_onnx()
    graph, outputs = DetectorGraph(model), ("scores", "boxes")
    try:
        traced = pixels[:1].repeat(TRACED, 1, 1, 1)
        exported, batch = export_program(graph, traced, (0,), outputs), 0
    except torch.onnx.OnnxExporterError:
        logger.info(
            "export: torch cannot leave the batch free; the file takes one picture at a time"
        )
        try:
            exported, batch = export_program(graph, pixels[:1], (), outputs), 1
        except torch.onnx.OnnxExporterError as error:
            raise export_error(error, "detector") from None
    save_with_note(exported, path, KEY, note | {"batch": batch})


class OnnxDetector(nn.Module):
    """An exported file as a detector.

    Args:
        path: the file.

    Attributes:
        description: that of the checkpoint, with `size` (H, W) in px and `batch`, pictures at a
            time (0: any).

    Raises:
        UserError: no file of `export_detector`.
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        description = read_note(path, KEY)
        if description is None:
            raise UserError(f"{path}: expected a file of export_detector, found another ONNX file")
        self.path, self.description = str(path), description
        self._sessions: dict[torch.device, Any] = {}

    def forward(
        self, images: Float[Tensor, "b 3 h w"], padding: Bool[Tensor, "b h w"]
    ) -> Detections:
        """As the detector itself, but for its other layers: one decoder layer.

        Args:
            images: normalised; they are taken back to bytes, which the file wants.
            padding: of no pixel.

        Raises:
            UserError: pictures of another size than the file's.
        """
        size = tuple(self.description["size"])
        if tuple(images.shape[2:]) != size:
            raise UserError(
                f"{self.path}: expected pictures of {size[1]} x {size[0]} px, for which it was "
                f"exported, found {images.shape[3]} x {images.shape[2]}; export it with "
                "height= and width= of these"
            )
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in IMAGENET)
        pixels = ((images * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        scores, boxes = self.run(pixels)
        low, high = boxes[..., :2], boxes[..., 2:]
        return Detections(
            torch.logit(scores)[None], torch.cat(((low + high) / 2, high - low), -1)[None]
        )

    def run(self, pixels: UInt8[Tensor, "b 3 h w"]) -> tuple[Tensor, Tensor]:
        """Scores (B, queries, classes) and boxes (B, queries, 4), xyxy fractions."""
        device = pixels.device
        if device not in self._sessions:
            self._sessions[device] = open_session(self.path, device)
        found = [
            self._sessions[device].run(["scores", "boxes"], {"pixels": part.cpu().numpy()})
            for part in pixels.contiguous().split(self.description["batch"] or len(pixels))
        ]
        scores, boxes = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*found))
        return scores.to(device), boxes.to(device)
