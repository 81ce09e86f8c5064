"""A probe of the teacher while it trains: k-NN over regions and over slides, patients apart.

It watches the run and decides nothing. Slides that the probe is measured on are slides that the
network was trained on, without their labels.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from patch_encoder.cohort.labels import read_labels, read_rows
from patch_encoder.probing.knn import probe_features
from patch_encoder.regions.store import RegionStore
from wsi_common.config import key
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
SCORES = ("zone_knn_balanced_accuracy", "slide_knn_balanced_accuracy")
KIND = ("balanced_accuracy", "auc")  # scores of probe_features that are logged


@dataclass
class RegionProbeKeys:
    """Labels that the teacher is probed on; those of slides are in labels.csv."""

    zones: str = key(
        "",
        "CSV of labelled regions (slide_id,x,y,label), with the corners that the regions have; "
        "empty: regions are not probed",
        path=True,
    )
    every: int = key(1, "epochs between probes; the last one is always probed", least=1)


@dataclass(frozen=True)
class RegionProbe:
    """The labels of a store's regions and slides; empty text where there is none.

    Attributes:
        zones: of each region.
        labels: of each slide.
        slide: of each region.
        cases: patient of each slide.
    """

    zones: np.ndarray
    labels: np.ndarray
    slide: np.ndarray
    cases: np.ndarray

    def score(self, features: Float[Tensor, "m w"]) -> dict[str, float]:
        """AUC and balanced accuracy by k-NN of regions and of the mean vectors of slides.

        Raises:
            UserError: fewer than five patients of a class.
        """
        means = np.zeros((len(self.labels), features.shape[1]), dtype=np.float32)
        vectors = features.float().cpu().numpy()
        np.add.at(means, self.slide, vectors)
        means /= np.maximum(np.bincount(self.slide, minlength=len(means)), 1)[:, None]
        found: dict[str, float] = {}
        for name, rows, targets, groups in (
            ("zone", vectors, self.zones, self.cases[self.slide]),
            ("slide", means, self.labels, self.cases),
        ):
            known = targets != ""
            if known.any():
                scores = probe_features(rows[known], targets[known], groups[known], balanced=True)
                found |= {f"{name}_knn_{kind}": scores[f"knn_{kind}"] for kind in KIND}
        return found


def make_region_probe(keys: RegionProbeKeys, labels: str, store: RegionStore) -> RegionProbe | None:
    """The probe of labelled regions and of slides; None where neither has labels to probe.

    Args:
        keys: names the table of regions.
        labels: labels.csv; empty: there is none. Slides are probed where two classes or more have
            five patients each.
        store: the regions.

    Raises:
        UserError: a table that cannot be read or names none of the store's regions, or fewer than
            five patients of a zone.
    """
    table = {record.slide_id: record.label for record in read_labels(labels)} if labels else {}
    probe = RegionProbe(
        read_zones(keys.zones, store) if keys.zones else np.full(len(store), "", dtype=object),
        np.array([table.get(name, "") for name in store.slides], dtype=object),
        store.regions.slide_of,
        np.array(store.cases),
    )
    try:
        probe.score(torch.zeros(len(store), 1))  # says before the training what is too little
    except UserError as error:
        if keys.zones:
            raise
        logger.info("slides are not probed: %s", error)
        return None
    return probe if keys.zones or table else None


def read_zones(path: str, store: RegionStore) -> np.ndarray:
    """The label of each region of a store, empty text where the table has none, (M,).

    Raises:
        UserError: a corner that is no whole number, or a table of none of the regions.
    """
    table = {}
    for line, row in read_rows(path, ("slide_id", "x", "y", "label")):
        try:
            table[row["slide_id"], int(row["x"]), int(row["y"])] = row["label"]
        except ValueError:
            raise UserError(
                f"{path} line {line}: expected the corner of a region in whole pixels, found "
                f"x={row['x']!r} and y={row['y']!r}; write them as build_regions has them"
            ) from None
    places = [
        (name, int(x), int(y))
        for number, name in enumerate(store.slides)
        for x, y in store.corners(number)
    ]
    zones = np.array([table.get(place, "") for place in places], dtype=object)
    if not (zones != "").any():
        raise UserError(
            f"{path}: expected labels of the {len(places)} regions, such as {places[0]}, found "
            "none; give the table of this cohort, with the corners of its regions"
        )
    return zones
