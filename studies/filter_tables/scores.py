"""What a trained localiser finds in the test fields of a set, stored beside its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from detection_kd.evaluation.point_metrics import compute_rates, count_fields
from detection_kd.evaluation.tile_predictions import (
    find_field_detections,
    measure_bags,
    predict_tiles,
)
from detection_kd.fields.field_tiles import FieldTiles
from detection_kd.fields.stain import normalise_tiles, restore_field_stain
from detection_kd.mitosis_sets.keys import MitosisSetKeys
from detection_kd.mitosis_sets.splits import read_sides
from detection_kd.models.cam import load_localiser
from wsi_common.device import pick_precision
from wsi_common.distributed import init_distributed
from wsi_common.files import read_json, sha256_file, write_json
from wsi_common.processes.pool import pick_workers
from wsi_common.provenance import can_reuse


@dataclass(frozen=True)
class FieldScores:
    """One network on the test fields, at the threshold that its own validation chose.

    Attributes:
        cases: (F,) slide of each field.
        counts: (F, 3) hits, false positives and misses, matched one to one within 7.5 um.
        bag_auc: area under the ROC curve of fields with and without a mitosis.
    """

    cases: np.ndarray
    counts: Int[np.ndarray, "fields 3"]
    bag_auc: float

    def f1(self, weights: Float[np.ndarray, "b fields"] | None = None) -> Float[np.ndarray, " b"]:
        """F1 of the positions for B weightings of the fields; without weights, (1,)."""
        weights = np.ones((1, len(self.cases))) if weights is None else weights
        return compute_rates(weights @ self.counts)["f1"]


def pool(scores: Sequence[FieldScores]) -> FieldScores:
    """The fields of all seeds together; a slide that several seeds test is one case."""
    return FieldScores(
        np.concatenate([part.cases for part in scores]),
        np.concatenate([part.counts for part in scores]),
        float(np.mean([part.bag_auc for part in scores])),
    )


def score_network(run: Path, data: MitosisSetKeys, batch_size: int, device: str) -> FieldScores:
    """Detect in the test fields, or read what was stored for this checkpoint and these labels."""
    checkpoint, record = run / "checkpoint_best.pt", run / "scores.json"
    wanted = {"checkpoint": sha256_file(checkpoint), "truth": sha256_file(data.annotations)}

    def read() -> dict[str, Any]:
        found = read_json(record, "scores of a network")
        return {name: found.get(name) for name in wanted}

    # a network that was trained again is scored again
    if not can_reuse(record, read, wanted, "scores of another network", overwrite=True):
        write_json(record, wanted | measure_network(checkpoint, data, batch_size, device))
    found = read_json(record, "scores of a network")
    return FieldScores(np.array(found["cases"]), np.array(found["counts"]), found["bag_auc"])


def measure_network(
    checkpoint: Path, data: MitosisSetKeys, batch_size: int, device: str
) -> dict[str, Any]:
    """`cases`, `counts` and `bag_auc` of the test fields."""
    world = init_distributed(device)
    model, described = load_localiser(checkpoint)
    (fields,) = read_sides(data, 0, ("test",))
    tiles = FieldTiles(fields, described["side"], described["mpp"], described["overlap"])
    tiles = normalise_tiles(tiles, restore_field_stain(described["stain"]))
    predictions = predict_tiles(
        model.to(world.device),
        tiles,
        world,
        batch_size=batch_size,
        precision=pick_precision("auto", world.device),
        workers=pick_workers(None),
        label="test",
    )
    detections = find_field_detections(tiles, predictions)
    counts = count_fields(detections, described["threshold"])
    return {
        "cases": [field.case for field in fields.fields],
        "counts": counts.tolist(),
        "bag_auc": measure_bags(predictions.scores, tiles.labels)["bag_auc"],
    }
