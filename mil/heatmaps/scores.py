"""What a slide classifier thinks of each tile of a bag: attention, and the class probability of the tile alone.

Attention is the model's own (README, "Slide classifiers"): non-negative, sums to 1 over the slide. The probability is that
of a bag with this one tile, softmax over the model's logits; for Mean-MIL and Max-MIL it is the tile's own classification,
for attention models it asks what the classifier would say of nothing but this tile, and need not agree with attention.
Percentile ranks are CLAM's (ties share their mean rank), 100 for the highest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import nn

from common.errors import UserError
from common.files import write_csv
from mil.datasets.bags import placed
from mil.engine import Sample, examine
from mil.metrics import predict_class
from mil.models import forward_bags
from patch_encoder.bags import read_bag
from patch_encoder.coordinates import Coordinates, TileGeometry

VALUES = ("auto", "attention", "probability")
BLOCK = 1024  # tiles whose bags of one go through the model together


@dataclass(frozen=True)
class TileScores:
    """A judged bag.

    Attributes:
        coordinates: N tiles and how they are read.
        attention: (N,), sums to 1.
        probability: (N,) of class `class_name` for the tile alone, None when not asked for.
        shown: "attention" or "probability", what the heatmap is of.
        class_name: the class that `probability` is of.
        slide: (C,) class probabilities of the whole bag.
    """

    coordinates: Coordinates
    attention: Float[np.ndarray, " n"]
    probability: Float[np.ndarray, " n"] | None
    shown: str
    class_name: str
    slide: Float[np.ndarray, " c"]

    @property
    def values(self) -> Float[np.ndarray, " n"]:
        """What the heatmap is of."""
        return self.attention if self.shown == "attention" or self.probability is None else self.probability

    def columns(self) -> dict[str, np.ndarray]:
        """Name -> (N,): every score, and the percentile rank of the shown one."""
        named = {"attention": self.attention}
        if self.probability is not None:
            named[f"probability {self.class_name}"] = self.probability
        return named | {"percentile": percentile_ranks(self.values)}


def percentile_ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """100 * rank / N, ranks from 1, equal values share the mean of their ranks."""
    return 100.0 * rankdata(values, method="average") / len(values)


def score_bag(
    model: nn.Module,
    bag_file: Path,
    slide_id: str,
    classes: Sequence[str],
    value: str,
    class_name: str,
    threshold: float | None,
    device: torch.device,
) -> TileScores:
    """Judge one bag.

    Args:
        model: a trained classifier on the device.
        bag_file: the slide's bag, with coords.
        classes: names in the order of the logits.
        value: one of VALUES; auto takes attention unless it is the same for every tile (Mean-MIL).
        class_name: class of `probability`; empty: the second of two, else the one that is called.
        threshold: cut on the second of two classes.

    Raises:
        UserError: unreadable bag, no coords or geometry, scores that are not finite.
    """
    bag = read_bag(bag_file)
    if bag.coords is None:
        raise UserError(f"{bag_file}: expected coords (N, 2) to place tiles, found none; extract the slide again")
    geometry = TileGeometry.from_attributes(bag.attributes, str(bag_file))
    sample = Sample(slide_id, torch.from_numpy(bag.features), placed(torch.from_numpy(bag.coords), bag.attributes), 0)
    output = examine(model, sample, device)
    attention, slide = output.attention.double().numpy(), output.logits.double().softmax(0).numpy()
    if not (np.isfinite(attention).all() and np.isfinite(slide).all()):
        raise UserError(f"{bag_file}: expected finite attention and logits, found others; check the bag's encoder")
    shown = value
    if value == "auto":
        shown = "probability" if len(attention) > 1 and np.ptp(attention) < 1e-9 / len(attention) else "attention"
    called = classes[int(predict_class(slide[None], threshold)[0])]
    name = class_name or (classes[1] if len(classes) == 2 else called)
    probability = tile_probabilities(model, sample, device)[:, classes.index(name)] if shown == "probability" else None
    return TileScores(Coordinates(bag.coords, geometry), attention, probability, shown, name, slide)


@torch.inference_mode()
def tile_probabilities(model: nn.Module, sample: Sample, device: torch.device) -> Float[np.ndarray, "n c"]:
    """Class probabilities of each tile as a bag of its own."""
    features, coords = sample.to(device)
    places = None if coords is None else list(coords.split(1))
    found = []
    for start in range(0, len(features), BLOCK):
        bags = list(features[start : start + BLOCK].split(1))
        logits = forward_bags(model, bags, None if places is None else places[start : start + BLOCK]).logits
        found.append(logits.double().softmax(1).cpu().numpy())
    return np.concatenate(found)


def ranking(values: Float[np.ndarray, " n"]) -> np.ndarray:
    """Rows from the highest value to the lowest; equal ones in the order of the bag."""
    return np.argsort(-values, kind="stable")


def write_scores(path: Path, scores: TileScores) -> None:
    """CSV: one row a tile, in the order of the bag; numbers are read back exactly."""
    columns = scores.columns()
    header = ["tile", "x", "y", *(name.replace(" ", "_") for name in columns)]
    rows = [
        dict(zip(header, (index, x, y, *(repr(float(column[index])) for column in columns.values())), strict=True))
        for index, (x, y) in enumerate(scores.coordinates.coords.tolist())
    ]
    write_csv(path, header, rows)
