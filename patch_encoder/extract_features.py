"""Encode every tile of a cohort with one encoder: one feature bag a slide.

    python -m patch_encoder.extract_features slides=cohort/slides coords=runs/tiles output=runs/features encoder=stain_texture

Writes `<output>/<encoder>/h5_files/<slide_id>.h5` (and `pt_files/<slide_id>.pt` on request). Finished slides are
skipped; slides that fail are listed in `<output>/<encoder>/failures.csv` and the exit status is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.cli import launch
from common.config import REQUIRED, key
from common.device import PRECISIONS, pick_device, pick_precision
from patch_encoder.engine import ExtractSettings, extract
from patch_encoder.models.encoders import Encoder, build_encoder


@dataclass
class Config:
    """Keys of feature extraction."""

    slides: str = key(REQUIRED, "folder of slides, any tree", path=True)
    coords: str = key(REQUIRED, "folder of coordinates files, as tile_slides wrote it", path=True)
    output: str = key(REQUIRED, "features folder; bags go to <output>/<encoder>/h5_files", runtime=True)
    labels: str = key("", "labels.csv: encode only its slides, and take mpp from it", path=True)
    encoder: str = key("stain_texture", "name in patch_encoder/models/encoder_table.py, or timm:<model>")
    weights: str = key("", "local weights file or folder; empty: from the encoder's hub; random: untrained")
    batch_size: int = key(64, "tiles a batch", runtime=True)
    workers: int = key(2, "decoding processes; 0 decodes in the main process", runtime=True)
    device: str = key("auto", "auto, cpu, cuda or cuda:N", runtime=True)
    precision: str = key("auto", "auto: bf16 where the device has it", choices=PRECISIONS)
    dtype: str = key("float32", "type of the stored features", choices=("float16", "float32"))
    pt: bool = key(False, "also write pt_files/<slide_id>.pt")
    overwrite: bool = key(False, "replace bags of another provenance", runtime=True)


def build_model(config: Config) -> Encoder:
    """The encoder of this configuration."""
    return build_encoder(config.encoder, config.weights)


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
