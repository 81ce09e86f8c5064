"""Augmentation moves pixels and points alike: torchvision's key points, drawn dots, and positives
that stay positive.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import center_of_mass, label
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from detection_kd.fields.augmentation import PointAugmentationKeys, augment_tiles
from detection_kd.fields.tile_loader import FieldBatch
from detection_kd.fields.warps import (
    LARGEST_SCALE,
    LARGEST_SLOPE,
    Warps,
    count_lattice,
    mirror_points,
    turn_points,
    turn_tile,
)
from wsi_common.errors import UserError

SIDE = 96
STRONG = PointAugmentationKeys(rotation=90.0, scale=0.2, elastic=5.0, elastic_spacing=32.0)
ALL = replace(STRONG, stain=0.1, colour=0.2)


def draw_dots(points: np.ndarray) -> np.ndarray:
    """A black tile with a soft white dot at each point, uint8 (S, S, 3)."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    tile = np.zeros((SIDE, SIDE))
    for column, row in points:
        tile += 255 * np.exp(-((x - column) ** 2 + (y - row) ** 2) / 4.5)
    return np.repeat(tile.clip(0, 255)[..., None], 3, -1).round().astype(np.uint8)


def find_dots(tile: torch.Tensor) -> np.ndarray:
    """Centres of the dots of a tile, those that touch its border left out."""
    grey = tile[0].numpy().astype(float)
    blobs, count = label(grey > 25)
    whole = [n for n in range(1, count + 1) if not touches_border(blobs == n)]
    return np.array([center_of_mass(grey, blobs, n)[::-1] for n in whole]).reshape(-1, 2) + 0.5


def touches_border(blob: np.ndarray) -> bool:
    rows, columns = np.nonzero(blob)
    return min(rows.min(), columns.min()) == 0 or max(rows.max(), columns.max()) == SIDE - 1


def make_batch(points: list[np.ndarray], labels: list[int] | None = None) -> FieldBatch:
    count = len(points)
    pixels = np.array([draw_dots(part) for part in points])
    return FieldBatch(
        torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(),
        [torch.from_numpy(part).float() for part in points],
        torch.tensor(labels if labels is not None else [int(len(part) > 0) for part in points]),
        torch.ones(count),
        torch.arange(count),
        torch.zeros(count, dtype=torch.int64),
    )


def scatter(count: int, seed: int = 0) -> list[np.ndarray]:
    """Three points in each tile, 20 px apart."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*[np.arange(14, SIDE, 22)] * 2), -1).reshape(-1, 2)
    return [rng.permutation(places)[:3] + rng.uniform(-3, 3, (3, 2)) for _ in range(count)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("turns", range(4))
def test_symmetries_are_torchvisions(flip: bool, turns: int) -> None:
    (points,) = scatter(1)
    image = tv_tensors.Image(torch.from_numpy(draw_dots(points)).permute(2, 0, 1))
    # its flips count from the centre of the first pixel, its rotations from the corner
    keys = tv_tensors.KeyPoints(torch.from_numpy(points - 0.5), canvas_size=(SIDE, SIDE))
    if flip:
        image, keys = F.horizontal_flip(image), F.horizontal_flip(keys)
    keys = tv_tensors.KeyPoints(keys.as_subclass(torch.Tensor) + 0.5, canvas_size=(SIDE, SIDE))
    image, keys = F.rotate(image, 90.0 * turns), F.rotate(keys, 90.0 * turns)
    tile = torch.from_numpy(draw_dots(points)).permute(2, 0, 1)[None]
    assert torch.equal(turn_tile(tile, flip, turns)[0], image.as_subclass(torch.Tensor))
    assert np.allclose(turn_points(points, SIDE, flip, turns), keys.numpy())


@pytest.mark.parametrize(("angle", "scale"), [(30.0, 1.0), (-77.0, 1.0), (12.0, 1.25)])
def test_rotations_are_torchvisions(angle: float, scale: float) -> None:
    (points,) = scatter(1)
    turned = np.deg2rad(angle)
    matrix = np.array([[np.cos(turned), -np.sin(turned)], [np.sin(turned), np.cos(turned)]]) / scale
    warp = Warps(matrix[None], np.zeros((1, 4, 4, 2)), SIDE, float(SIDE))
    keys = tv_tensors.KeyPoints(torch.from_numpy(points), canvas_size=(SIDE, SIDE))
    image = torch.from_numpy(draw_dots(points)).permute(2, 0, 1)
    map_ = {"angle": -angle, "translate": [0, 0], "scale": scale, "shear": [0.0, 0.0]}
    assert np.allclose(warp.move_points(0, points), F.affine(keys, **map_).numpy(), atol=1e-4)
    expected = F.affine(image, **map_, interpolation=F.InterpolationMode.BILINEAR).int()
    centre = slice(SIDE // 4, -SIDE // 4)  # beyond the border theirs is black
    less = warp.move_pixels(0, image).int() - expected
    assert less[:, centre, centre].abs().max() <= 1


def test_points_follow_their_dots() -> None:
    """Each dot that is to be seen has its point, mirror images as well."""
    batch = make_batch(scatter(12))
    seen = images = 0
    for epoch in range(4):
        out = augment_tiles(batch, STRONG, seed=3, epoch=epoch)
        for tile, points in zip(out.pixels, out.points):
            dots = find_dots(tile)
            apart = np.linalg.norm(dots[:, None] - points.numpy()[None], axis=-1)
            assert (apart.min(1) < 0.7).all(), apart.min(1)
            seen, images = seen + len(dots), images + max(0, len(points) - 3)
    assert seen > 100 and images > 0


def test_positions_are_found_to_a_thousandth_of_a_pixel() -> None:
    rng = np.random.default_rng(0)
    lines = count_lattice(SIDE, 24.0)
    lattice = LARGEST_SLOPE * 24 * rng.uniform(-1, 1, (20, lines, lines, 2))
    turns = [np.linalg.qr(rng.normal(size=(2, 2)))[0] for _ in range(20)]
    warps = Warps(np.array(turns) / (1 + LARGEST_SCALE), lattice, SIDE, 24.0)
    for tile in range(20):
        points = rng.uniform(0, SIDE, (50, 2))
        moved = warps.move_points(tile, points)
        bent = warps.displace(tile, moved)
        shown = SIDE / 2 + (moved - SIDE / 2) @ warps.matrices[tile].T + bent
        assert np.abs(shown - points).max() < 1e-3
        assert 1 < np.abs(bent).max() <= LARGEST_SLOPE * 24


def test_mirror_images_are_those_of_the_pixels() -> None:
    """A warp that only shrinks shows the tile in the middle of its mirror images."""
    points = np.array([[7.0, 30.0]])
    warp = Warps(2 * np.eye(2)[None], np.zeros((1, 4, 4, 2)), SIDE, float(SIDE))
    tile = torch.from_numpy(draw_dots(points)).permute(2, 0, 1)
    dots = find_dots(warp.move_pixels(0, tile))
    moved = warp.move_points(0, np.concatenate([points, mirror_points(points, SIDE)]))
    inside = moved[((moved > 2) & (moved < SIDE - 2)).all(1)]
    assert len(dots) == len(inside) == 4
    apart = np.linalg.norm(dots[:, None] - inside[None], axis=-1)
    assert apart.min(1).max() < 0.6 and apart.min(0).max() < 0.6


def test_a_positive_keeps_a_mitosis() -> None:
    """Corners, from where rotation takes most points out: UTS calls these tiles negative."""
    corners = [np.array([[3.0, 4.0]]), np.array([[SIDE - 2.0, 3.0]])] * 40
    out = augment_tiles(make_batch(corners), STRONG, seed=0, epoch=0)
    assert out.labels.tolist() == [1] * 80 and out.redrawn > 10
    for tile, points in zip(out.pixels, out.points):
        assert len(points) and (points >= 0).all() and (points < SIDE).all()
        row, column = points[0].flip(0).long()
        assert int(tile[0, row, column]) > 60


def test_labels_stay_as_they_were_given() -> None:
    """A teacher's labels as well: one that calls a tile positive without a known point."""
    batch = make_batch([np.empty((0, 2))] * 20 + scatter(20), [1] * 20 + [0] * 20)
    batch.pixels[:20] = torch.randint(0, 256, batch.pixels[:20].shape, dtype=torch.uint8)
    out = augment_tiles(batch, STRONG, seed=0, epoch=0)
    assert torch.equal(out.labels, batch.labels) and torch.equal(out.weights, batch.weights)
    assert out.redrawn == 0  # nothing was known of them that could be lost
    moved = [
        not any(
            torch.equal(new, turn_tile(old[None], flip, turns)[0])
            for flip in (False, True)
            for turns in range(4)
        )
        for new, old in zip(out.pixels, batch.pixels)
    ]
    assert not any(moved[:20])  # nobody could tell whether a warp pushed its mitosis out
    assert any(moved[20:]) and not all(moved[20:])


def test_a_draw_follows_from_seed_epoch_tile_and_turn() -> None:
    batch = make_batch(scatter(6))
    whole = augment_tiles(batch, ALL, seed=5, epoch=1)
    for row in range(6):
        alone = FieldBatch(
            batch.pixels[row : row + 1],
            batch.points[row : row + 1],
            *(
                getattr(batch, name)[row : row + 1]
                for name in ("labels", "weights", "samples", "repeats")
            ),
        )
        single = augment_tiles(alone, ALL, seed=5, epoch=1)
        assert torch.equal(single.pixels[0], whole.pixels[row])
        assert torch.equal(single.points[0], whole.points[row])
    again = replace(batch, repeats=batch.repeats + 1)
    for other in (
        augment_tiles(batch, ALL, seed=6, epoch=1),
        augment_tiles(batch, ALL, seed=5, epoch=2),
        augment_tiles(again, ALL, seed=5, epoch=1),
    ):
        assert (other.pixels != whole.pixels).flatten(1).any(1).all()


def test_nothing_asked_for_changes_nothing() -> None:
    batch = make_batch(scatter(4))
    before = batch.pixels.clone()
    out = augment_tiles(batch, PointAugmentationKeys(symmetries=False), seed=0, epoch=0)
    assert torch.equal(out.pixels, before) and all(map(torch.equal, out.points, batch.points))
    augment_tiles(batch, ALL, seed=0, epoch=0)
    assert torch.equal(batch.pixels, before)  # the batch itself stays


def test_colours_change_within_their_bounds_and_positions_do_not() -> None:
    grey = make_batch([np.empty((0, 2))] * 30)
    grey.pixels[:] = torch.tensor([200, 120, 160], dtype=torch.uint8)[:, None, None]
    for keys in (
        PointAugmentationKeys(symmetries=False, stain=0.1),
        PointAugmentationKeys(symmetries=False, colour=0.1),
    ):
        out = augment_tiles(grey, keys, seed=0, epoch=0).pixels.float()
        assert (out.flatten(2).std(-1) < 0.6).all()  # flat tiles stay flat
        change = (out - grey.pixels).flatten(2).mean(-1)
        assert 4 < float(change.abs().max()) < 60 and len(change[:, 0].unique()) > 15


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (PointAugmentationKeys(rotation=200.0), "rotation <= 180"),
        (PointAugmentationKeys(scale=0.5), r"scale <= 0\.4"),
        (PointAugmentationKeys(elastic=20.0), r"elastic=20: expected at most a sixth"),
        (PointAugmentationKeys(stain=1.0), "0 <= stain < 1"),
    ],
)
def test_values_without_sense_are_refused(keys: PointAugmentationKeys, message: str) -> None:
    with pytest.raises(UserError, match=message):
        keys.check()
    ALL.check()
