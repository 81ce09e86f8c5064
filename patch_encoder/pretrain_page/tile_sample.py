"""The tiles that a page shows: the first ones of the run's plan, and their features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64, UInt8
from torch import Tensor

from patch_encoder.descriptors.mean_colour import mean_colour
from patch_encoder.extraction.network import Network
from patch_encoder.models.encoders import PixelEncoder
from patch_encoder.models.transforms import ToInputSize
from patch_encoder.pretraining.keys import TileViewKeys
from patch_encoder.tile_stream.sources import TileSource
from patch_encoder.tile_stream.stream import TileStream

BATCH = 64  # tiles that are read, and encoded, at a time


@dataclass(frozen=True)
class TileSample:
    """Tiles of a plan.

    Attributes:
        tiles: RGB.
        context: the surroundings of each, where the run has a pyramid view.
        indices: number of each tile in the training.
        slides: name of each tile's slide in the corpus.
        ids: slide id of each.
    """

    tiles: UInt8[Tensor, "n 3 s s"]
    context: UInt8[Tensor, "n 3 s s"] | None
    indices: Int64[Tensor, " n"]
    slides: list[str]
    ids: list[str]

    def pictures(self) -> UInt8[np.ndarray, "n s s 3"]:
        """The tiles with their channels last."""
        return self.tiles.permute(0, 2, 3, 1).contiguous().numpy()


def read_sample(
    settings: TileViewKeys,
    sources: Sequence[TileSource],
    count: int,
    *,
    workers: int,
    with_context: bool = False,
) -> TileSample:
    """Read the first `count` tiles of a run, as its training saw them; `workers` processes read."""
    size = min(count, BATCH)
    stream = TileStream(
        settings.plan(sources, settings.seed),
        size,
        workers=workers,
        read_timeout=settings.read_timeout,
        context_factor=settings.pyramid.factor if with_context else 0,
        align=settings.align,
    )
    batches = list(stream.batches(0, -(-count // size)))
    wide = [batch.context for batch in batches if batch.context is not None]
    places = [sources[slide] for batch in batches for slide in batch.slides][:count]
    return TileSample(
        torch.cat([batch.tiles for batch in batches])[:count],
        torch.cat(wide)[:count] if wide else None,
        torch.cat([batch.indices for batch in batches])[:count],
        [source.name for source in places],
        [source.slide_id for source in places],
    )


def resize_tiles(
    pictures: UInt8[np.ndarray, "n h w 3"], side: int
) -> UInt8[Tensor, "n 3 side side"]:
    """Tiles as the network takes them, of the side of its global views."""
    resize = ToInputSize(side)
    return torch.stack([resize(picture) for picture in pictures])


def encode_tiles(
    encoder: PixelEncoder,
    pictures: UInt8[np.ndarray, "n h w 3"],
    side: int,
    device: torch.device,
    precision: str,
) -> Float32[np.ndarray, "n d"]:
    """Features of whole tiles, resized to the side of the global views."""
    network = Network(encoder, device, precision, BATCH)
    parts = [
        network.launch(resize_tiles(pictures[start : start + BATCH], side)).features()
        for start in range(0, len(pictures), BATCH)
    ]
    return torch.cat(parts).float().numpy()


def measure_colours(pictures: UInt8[np.ndarray, "n h w 3"]) -> Float64[np.ndarray, "n 3"]:
    """Mean colour of each tile: the control of everything that the features show."""
    return np.stack([mean_colour(picture) for picture in pictures]).astype(np.float64)
