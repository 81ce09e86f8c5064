"""Scores each tile of a bag by a slide classifier: its attention, and the prediction for the tile
alone.

Attention is the model's own: non-negative, sums to 1 over the slide, or over all slides of a case
that the model sees as one bag. The probability (survival: the
risk; regression: the value) is that of a bag with this one tile; for Mean-MIL and Max-MIL
it is the tile's own classification, for attention models it asks what the classifier would say of
nothing but this tile, and need not agree with attention. Percentile ranks are CLAM's (ties share
their mean rank), 100 for the highest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from mil.datasets.bags import Sample
from mil.datasets.case_bags import CaseSlide, open_in_case
from mil.models.batch import forward_bags
from mil.tasks.base import Task
from mil.training.engine import examine
from patch_encoder.tiles.coordinates import Coordinates
from wsi_common.errors import UserError
from wsi_common.files import write_csv

VALUES = ("auto", "attention", "probability", "risk", "value")
BLOCK = 1024  # tiles whose bags of one go through the model together


@dataclass(frozen=True)
class TileScores:
    """A judged bag.

    Attributes:
        coordinates: N tiles and how they are read.
        attention: (N,), sums to 1 over the slides of the bag that the model sees.
        alone: (N,) prediction for the tile alone, a probability that of `class_name`; None when
            not asked for.
        shown: what the heatmap is of: one of VALUES, but not auto.
        class_name: the class, label or grade that a probability belongs to.
        slide: (V,) prediction for the whole bag, in the order of the task's `value_names`.
        whole: (M,) attention over all slides of the case that the model sees as one bag; None: it
            sees this slide alone.
        together: slides in the whole bag.
    """

    coordinates: Coordinates
    attention: Float[np.ndarray, " n"]
    alone: Float[np.ndarray, " n"] | None
    shown: str
    class_name: str
    slide: Float[np.ndarray, " c"]
    whole: Float[np.ndarray, " m"] | None = None
    together: int = 1

    @property
    def values(self) -> Float[np.ndarray, " n"]:
        """What the heatmap is of."""
        return self.attention if self.alone is None else self.alone

    @property
    def most(self) -> float:
        """The highest attention that the model gives to a tile of the slide or of its case."""
        return float((self.attention if self.whole is None else self.whole).max())

    def columns(self) -> dict[str, np.ndarray]:
        """Name -> (N,): every score, and the percentile rank of the shown one."""
        named = {"attention": self.attention}
        if self.alone is not None:
            of_class = f" {self.class_name}" if self.shown == "probability" else ""
            named[self.shown + of_class] = self.alone
        return named | {"percentile": compute_percentile_ranks(self.values)}


def compute_percentile_ranks(values: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Compute 100 * rank / N with ranks from 1, equal values share the mean of their ranks."""
    from scipy.stats import rankdata  # a while to load

    return 100.0 * rankdata(values, method="average") / len(values)


def score_bag(
    model: nn.Module,
    task: Task,
    slide: CaseSlide,
    value: str,
    class_name: str,
    device: torch.device,
    covariates: Tensor | None = None,
    case: Sequence[CaseSlide] = (),
) -> TileScores:
    """Score one bag; features are read block by block where the model allows it
    (mil/training/prediction.py).

    Args:
        model: a trained classifier on the device.
        task: what it was trained for.
        slide: the slide, its bag, and where its tiles lie, for a bag that does not say.
        value: one of VALUES; auto takes attention unless it is the same for every tile (Mean-MIL).
        class_name: class, label or grade of a probability; empty: the second of two classes, else
            the likeliest one.
        device: of the model.
        covariates: of the slide, encoded, for a model that is fused with them.
        case: all slides that the model sees as one bag, in its order; empty: this one alone.

    Raises:
        UserError: unreadable bag, no coords or geometry, features or scores that are not finite.
    """
    seen = open_in_case(slide, case)
    coordinates = seen.own.coordinates()
    seen.check_finite()
    sample = Sample(slide.slide_id, seen.own, 0, covariates=covariates)
    output = examine(model, replace(sample, bag=seen.whole), device)
    attention = output.attention.double().numpy()
    predicted = task.predict(output.logits.double()[None])[0].numpy()
    if not (np.isfinite(attention).all() and np.isfinite(predicted).all()):
        raise UserError(
            f"{slide.bag}: expected finite attention and logits, found others; check the bag's "
            "encoder"
        )
    shown, name, alone = value, class_name or task.likeliest(predicted), None
    if value == "auto":
        uniform = len(attention) > 1 and np.ptp(attention) < 1e-9 / len(attention)
        shown = task.alone if uniform else "attention"
    if shown != "attention":
        column = task.names.index(name) if task.names else 0
        alone = score_tiles_alone(model, task, sample, device)[:, column]
    return TileScores(
        coordinates,
        attention[seen.rows],
        alone,
        shown,
        name,
        slide=predicted,
        whole=attention if case else None,
        together=len(seen.parts),
    )


@torch.inference_mode()
def score_tiles_alone(
    model: nn.Module, task: Task, sample: Sample, device: torch.device
) -> Float[np.ndarray, "n c"]:
    """Predict each tile as a bag of its own; takes the memory of one block of the stored bag."""
    found, start = [], 0
    coords = sample.bag.coords
    for block in sample.bag.blocks(BLOCK):
        bags, places = list(block.to(device).float().split(1)), None
        if coords is not None:
            places = list(coords[start : start + len(block)].to(device).split(1))
        logits = forward_bags(model, bags, places, sample.covariates).logits.double()
        found.append(task.predict(logits).cpu().numpy())
        start += len(block)
    return np.concatenate(found)


def write_scores(path: Path, scores: TileScores) -> None:
    """Write a CSV with one row per tile, in the order of the bag; numbers are read back exactly."""
    columns = scores.columns()
    header = ["tile", "x", "y", *(name.replace(" ", "_") for name in columns)]
    numbers = ([repr(float(value)) for value in column] for column in columns.values())
    places = scores.coordinates.coords.T.tolist()
    cells = zip(range(len(scores.values)), *places, *numbers, strict=True)
    write_csv(path, header, [dict(zip(header, row, strict=True)) for row in cells])
