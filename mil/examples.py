"""Example slides for the report: which ones to show, and the tiles that the classifier looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.errors import UserError
from mil.engine import Sample, examine, load_classifier
from mil.figures import jpeg_uri, mark_tiles
from mil.results import Finished
from patch_encoder.bags import read_bag
from patch_encoder.coordinates import TileGeometry
from patch_encoder.slides import open_slide
from patch_encoder.slides.overview import read_overview
from patch_encoder.tiling import read_tile

THUMBNAIL_SIDE = 460


@dataclass(frozen=True)
class Choice:
    """A test slide to show: true and predicted class, probability of the predicted one, and the run that says so."""

    slide_id: str
    label: str
    predicted: str
    probability: float
    fold: int

    @property
    def right(self) -> bool:
        """Whether the prediction is the label."""
        return self.label == self.predicted


@dataclass(frozen=True)
class Example:
    """A chosen slide with its pictures as data URIs."""

    choice: Choice
    tiles: int
    overview: str
    top: list[tuple[str, float]]


def choose_slides(runs: Sequence[Finished], classes: Sequence[str], each: int) -> list[Choice]:
    """Up to `each` correctly called slides that are not of the first (negative) class, and up to `each` errors.

    The most confident of both: what the classifier knows best, and what it gets wrong without doubt.
    """
    choices = [
        Choice(row["slide_id"], row["label"], row["predicted"], float(row[f"prob_{row['predicted']}"]), run.test.fold)
        for run in runs
        for row in run.rows
    ]
    choices.sort(key=lambda choice: (-choice.probability, choice.slide_id))
    hits = [choice for choice in choices if choice.right and choice.label != classes[0]]
    errors = [choice for choice in choices if not choice.right]
    return hits[:each] + errors[:each]


def make_example(choice: Choice, checkpoint: Path, bag_file: Path, slide_file: Path, mpp: float | None, top: int) -> Example:
    """Attention of the fold's model over the slide, drawn.

    Raises:
        UserError: bag without coordinates, unreadable slide.
    """
    bag = read_bag(bag_file)
    if bag.coords is None:
        raise UserError(f"{bag_file}: expected coords (N, 2) to draw tiles, found none")
    device = torch.device("cpu")
    model, _ = load_classifier(checkpoint, device)
    sample = Sample(choice.slide_id, torch.from_numpy(bag.features), torch.from_numpy(bag.coords), 0)
    attention = examine(model, sample, device).attention.numpy()
    rows = np.argsort(-attention, kind="stable")[:top]
    geometry = TileGeometry.from_attributes(bag.attributes, str(bag_file))
    with open_slide(slide_file, mpp, geometry.tile_pattern) as slide:
        overview = mark_tiles(read_overview(slide, THUMBNAIL_SIDE).pixels, geometry, slide.width, bag.coords[rows])
        tiles = [(jpeg_uri(read_tile(slide, geometry, *bag.coords[row].tolist())), float(attention[row])) for row in rows]
    return Example(choice, len(bag.features), jpeg_uri(overview), tiles)
