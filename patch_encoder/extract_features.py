"""Encode every tile of a cohort with one encoder: one feature bag a slide.

    python -m patch_encoder.extract_features slides=cohort/slides coords=runs/tiles
    output=runs/features encoder=stain_texture

Writes `<output>/<encoder>/h5_files/<slide_id>.h5` (and `pt_files/<slide_id>.pt` on request).
Finished slides are skipped; slides that fail are listed in `<output>/<encoder>/failures.csv` and
the exit status is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.cli import launch
from common.config import key
from patch_encoder.extraction.keys import FeatureKeys
from patch_encoder.extraction.loop import extract
from patch_encoder.models.encoders import Encoder, build_encoder
from patch_encoder.models.pooling import POOLS


@dataclass
class Config(FeatureKeys):
    """Keys of feature extraction."""

    encoder: str = key(
        "stain_texture",
        "encoder: a name that list_encoders prints, timm:<model>, "
        "open_clip:<model>/<tag>, hf:<repo> or dino",
    )
    weights: str = key(
        "", "weights file or folder; empty: from the encoder's hub; random: untrained"
    )
    pool: str = key(
        "published",
        "features of a transformer: class token, mean of the patch tokens, or both",
        choices=POOLS,
    )
    layer: int = key(0, "stage of a ResNet that is pooled, 1 to 4; 0: as the encoder table says")
    crop: bool = key(
        True,
        "centre crop where the encoder's own processor has one; false: the whole tile, resized",
    )


def build_model(config: Config) -> Encoder:
    """The encoder of this configuration."""
    return build_encoder(config.encoder, config.weights, config.pool, config.layer, config.crop)


def main(config: Config) -> int:
    return extract(
        build_model(config),
        config.slides,
        config.coords,
        config.labels,
        config.output,
        config.settings(),
    )


if __name__ == "__main__":
    launch(main, Config)
