"""Batches of tiles: every sample with its own label and points; workers and processes change
nothing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from detection_kd.fields.field_tiles import FieldTiles
from detection_kd.fields.tile_loader import FieldBatch, make_tile_loader
from tests.detection_kd.fields.drawn_fields import draw_field, make_set, write_field
from wsi_common.distributed import World
from wsi_common.sampling import balance_epoch

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)


@pytest.fixture
def tiles(tmp_path: Path) -> FieldTiles:
    """24 tiles of two fields, 3 of them with a mitosis, one of these with two."""
    return FieldTiles(
        make_set(
            write_field(tmp_path, "a", draw_field(60, 60), [(1, 1), (2, 2), (25, 30)]),
            write_field(tmp_path, "b", draw_field(100, 60, seed=1), [(99, 59)]),
        ),
        20,
        None,
    )


def check(batch: FieldBatch, tiles: FieldTiles) -> None:
    for row, tile in enumerate(batch.samples.tolist()):
        assert np.array_equal(batch.pixels[row].permute(1, 2, 0).numpy(), tiles.read(tile))
        assert np.allclose(batch.points[row].numpy(), tiles.mitoses(tile))
        assert batch.labels[row] == tiles.labels[tile] and batch.weights[row] == 1


def test_batches_are_the_tiles_in_order(tiles: FieldTiles) -> None:
    batches = list(make_tile_loader(tiles, range(len(tiles)), 10, ALONE))
    assert [len(batch.samples) for batch in batches] == [10, 10, 4]
    assert torch.cat([batch.samples for batch in batches]).tolist() == list(range(24))
    for batch in batches:
        assert batch.pixels.dtype == torch.uint8 and batch.pixels.shape[1:] == (3, 20, 20)
        check(batch, tiles)


def test_workers_change_nothing(tiles: FieldTiles) -> None:
    order = balance_epoch(tiles.labels, seed=1, epoch=2, multiple=6)
    plain, read_ahead = (
        list(make_tile_loader(tiles, order, 6, ALONE, workers=workers)) for workers in (0, 2)
    )
    for one, other in zip(plain, read_ahead, strict=True):
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.repeats, other.repeats)
        assert all(map(torch.equal, one.points, other.points))
        check(other, tiles)


def test_two_processes_share_each_step_of_one(tiles: FieldTiles) -> None:
    order = balance_epoch(tiles.labels, seed=0, epoch=0, multiple=6)
    whole = list(make_tile_loader(tiles, order, 6, ALONE))
    parts = [list(make_tile_loader(tiles, order, 6, World(rank, 2, CPU))) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        shares = [part[step] for part in parts]
        assert [len(share.samples) for share in shares] == [3, 3]
        for name in ("samples", "repeats", "labels"):
            merged = torch.stack([getattr(share, name) for share in shares], 1).flatten()
            assert torch.equal(merged, getattr(batch, name))


def test_repeats_tell_the_turns_of_a_tile_apart(tiles: FieldTiles) -> None:
    order = balance_epoch(tiles.labels, seed=0, epoch=0)
    batches = list(make_tile_loader(tiles, order, 8, ALONE))
    turns = {
        (sample, repeat)
        for batch in batches
        for sample, repeat in zip(batch.samples.tolist(), batch.repeats.tolist())
    }
    assert len(turns) == len(order) == 42
    assert {repeat for sample, repeat in turns if tiles.labels[sample]} == set(range(7))


def test_loading_leaves_the_generators_of_the_run_alone(tiles: FieldTiles) -> None:
    before = torch.get_rng_state()
    list(make_tile_loader(tiles, range(8), 4, ALONE, workers=1, seed=3, epoch=1))
    assert torch.equal(torch.get_rng_state(), before)
