"""Encode every tile of a cohort with one encoder: one feature bag a slide.

    python -m patch_encoder.extract_features slides=cohort/slides coords=runs/tiles
    output=runs/features encoder=stain_texture

Writes `<output>/<encoder>/h5_files/<slide_id>.h5` (and `pt_files/<slide_id>.pt` on request).
Finished slides are skipped; slides that fail are listed in `<output>/<encoder>/failures.csv` and
the exit status is 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from patch_encoder.extraction.keys import CoordsKeys, FeatureKeys, NamedEncoderKeys
from patch_encoder.extraction.loop import extract
from patch_encoder.models.encoders import Encoder
from wsi_common.cli import launch


@dataclass
class Config(NamedEncoderKeys, CoordsKeys, FeatureKeys):
    """Keys of feature extraction."""


def build_model(config: Config) -> Encoder:
    """The encoder of this configuration."""
    return config.load_encoder()


def main(config: Config) -> int:
    return extract(
        build_model(config),
        config.slides,
        config.coords,
        config.labels,
        config.output,
        replace(config.settings(), kernels="auto"),
    )


if __name__ == "__main__":
    launch(main, Config)
