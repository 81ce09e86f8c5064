"""What a localiser says about the tiles of annotated fields: their scores and maps, the detections
in whole fields, and which of a tile's detections hit an annotated mitosis.

Maps are kept as the network makes them, with a few hundred cells per tile, so that the maps of all
tiles of a data set fit into memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int

from detection_kd.evaluation.peaks import FLOOR, find_candidates, find_peaks, suppress_points
from detection_kd.evaluation.point_matching import RADIUS_UM, count_one_to_one
from detection_kd.evaluation.point_metrics import ScoredField
from detection_kd.fields.field_tiles import FieldTiles
from detection_kd.fields.tile_loader import make_tile_loader
from detection_kd.mitosis_sets.checked_fields import explain_unknown_mpp
from detection_kd.models.cam import WeakLocaliser
from detection_kd.models.cell_grid import CellGrid
from wsi_common.device import autocast
from wsi_common.distributed import World, gather_objects
from wsi_common.metrics.ranking import binary_auc, counts_above
from wsi_common.progress import progress


@dataclass(frozen=True)
class LocaliserPredictions:
    """Predictions for tiles, in their order.

    Attributes:
        scores: probability that the tile holds a mitosis.
        maps: probability of each cell.
        cells: where they lie in a tile, px of it.
    """

    scores: Float[np.ndarray, " n"]
    maps: Float32[np.ndarray, "n h w"]
    cells: CellGrid


@torch.inference_mode()
def predict_tiles(
    model: WeakLocaliser,
    tiles: FieldTiles,
    world: World,
    *,
    batch_size: int,
    precision: str,
    workers: int,
    label: str,
) -> LocaliserPredictions:
    """Predict all tiles; every process predicts its share and gets the predictions of all.

    Args:
        model: the plain network.
        tiles: the tiles.
        world: this process.
        batch_size: tiles at a time over all processes.
        precision, workers: as resolved from the keys of a script.
        label: of the progress bar.
    """
    model.eval()
    steps = -(-len(tiles) // batch_size)
    order = np.arange(len(tiles))
    batches = make_tile_loader(tiles, order, batch_size, world, workers=workers)
    samples, bags, maps = [np.zeros(0, np.int64)], [], []
    for batch in progress(batches, label, steps, "batch", enabled=world.is_main):
        pixels = batch.pixels.to(world.device, memory_format=torch.channels_last)
        with autocast(world.device, precision):
            found = model(pixels.float() / 255)
        samples.append(batch.samples.numpy())
        bags.append(found.bags.double().sigmoid().cpu().numpy())
        maps.append(found.maps[:, 0].sigmoid().cpu().numpy())
    parts: Any = gather_objects((np.concatenate(samples), bags, maps))
    place = np.argsort(np.concatenate([part[0] for part in parts]))
    scores = np.concatenate([bag for part in parts for bag in part[1]])[place]
    found = np.concatenate([m for part in parts for m in part[2]])[place]
    return LocaliserPredictions(scores, found, model.find_cells(tiles.side))


def find_field_detections(
    tiles: FieldTiles, predictions: LocaliserPredictions
) -> list[ScoredField]:
    """Candidates of every field with its annotated mitoses, in um; what neighbouring tiles both
    see counts once.

    Raises:
        UserError: a field of unknown resolution.
    """
    found = []
    for number, field in enumerate(tiles.fields):
        geometry, mpp = tiles.geometries[number], find_mpp(tiles, number)
        places, scores = [np.zeros((0, 2))], [np.zeros(0)]
        for tile in np.flatnonzero(tiles.field == number).tolist():
            radius = RADIUS_UM / find_tile_mpp(tiles, tile)
            own = find_candidates(predictions.maps[tile], FLOOR, predictions.cells, radius)
            places.append(tiles.to_field(tile, own[0]) * mpp)
            scores.append(own[1].astype(np.float64))
        points, values = np.concatenate(places), np.concatenate(scores)
        kept = suppress_points(points, values, RADIUS_UM)
        area = geometry.level0_width * geometry.level0_height * mpp**2 / 1e6
        about = (field.field_id, field.case, field.scanner, area)
        found.append(ScoredField(*about, points[kept], values[kept], field.mitoses * mpp))
    return found


def count_hits(
    tiles: FieldTiles, predictions: LocaliserPredictions, thresholds: Float[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """For each tile, detections on annotated mitoses and detections elsewhere, one to one.

    A detection is the maximum of a connected region of the tile's map from its threshold on.
    """
    counts = np.zeros((2, len(tiles)), np.int64)
    for tile in np.flatnonzero(predictions.maps.max((1, 2)) >= thresholds).tolist():
        mpp = find_tile_mpp(tiles, tile)
        points, _ = find_peaks(predictions.maps[tile], float(thresholds[tile]), predictions.cells)
        found = count_one_to_one(points * mpp, tiles.mitoses(tile) * mpp)
        counts[:, tile] = found.hits, found.false_positives
    return counts[0], counts[1]


def find_mpp(tiles: FieldTiles, number: int) -> float:
    """Um per px of a field; without it there is no tolerance in um."""
    if not tiles.geometries[number].mpp:
        raise explain_unknown_mpp(tiles.fields[number].field_id)
    return tiles.geometries[number].mpp


def find_tile_mpp(tiles: FieldTiles, tile: int) -> float:
    """Um per px of a tile as it is read."""
    number = int(tiles.field[tile])
    return find_mpp(tiles, number) * tiles.geometries[number].patch_size_level0 / tiles.side


def find_common_mpp(tiles: FieldTiles) -> float:
    """Um per px that tiles are read at: the median, where fields are read as they are."""
    scanned = [find_mpp(tiles, number) for number in range(len(tiles.fields))]
    return float(np.median(scanned)) if tiles.mpp is None else tiles.mpp


def measure_bags(
    scores: Float[np.ndarray, " n"], labels: Int[np.ndarray, " n"]
) -> dict[str, float]:
    """How well tiles are told apart: `bag_auc`, the best F1 `bag_f1` of any threshold, and the
    threshold `bag_threshold` that it has, half-way to the next lower score.
    """
    positive = labels == 1
    hits, false = (counts[0] for counts in counts_above(positive, scores))
    f1 = 2 * hits / (hits + false + positive.sum())
    best, ordered = int(f1.argmax()), np.unique(scores)[::-1]
    threshold = ordered[best : best + 2].mean()
    auc = binary_auc(positive, scores)[0]
    return {"bag_auc": float(auc), "bag_f1": float(f1[best]), "bag_threshold": float(threshold)}
