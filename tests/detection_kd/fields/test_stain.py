"""Stain normalisation of fields: the procedure of UTS to one grey level, statistics that follow
from the field alone, blank tiles, and a description that needs no picture.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.exposure import match_histograms
from torchstain.torch.normalizers.macenko import TorchMacenkoNormalizer

from detection_kd.fields.field_tiles import FieldTiles
from detection_kd.fields.stain import (
    STAINS,
    FieldStain,
    FieldStainKeys,
    build_field_stain,
    normalise_tiles,
    restore_field_stain,
)
from tests.detection_kd.fields.drawn_fields import make_set, write_field
from tests.patch_encoder.stain.stain_fixture import draw_tile, picture
from wsi_common.errors import UserError

KINDS = STAINS[1:]


def as_array(tile: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(tile.permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture of H&E in other colours than those of the fields."""
    path = tmp_path_factory.mktemp("target") / "target.png"
    pixels = draw_tile(((0.6, 0.1), (0.7, 0.95), (0.4, 0.3)), (1.1, 0.7), side=200, seed=9)
    Image.fromarray(as_array(pixels)).save(path)
    return path


def build(kind: str, target: Path, scope: str = "slide") -> FieldStain:
    stain = build_field_stain(FieldStainKeys(kind, str(target), scope))
    assert stain is not None
    return stain


def describe_colours(pixels: np.ndarray) -> np.ndarray:
    """Mean and spread of each colour channel."""
    return np.concatenate([pixels.mean((0, 1)), pixels.std((0, 1))])


@pytest.fixture
def tiles(tmp_path: Path) -> FieldTiles:
    """A field of tissue beside glass, and a field of glass alone."""
    pixels = as_array(draw_tile(side=160))
    glass = np.random.default_rng(0).integers(236, 251, (160, 160, 3)).astype(np.uint8)
    half = np.concatenate([pixels, glass[:, :80]], axis=1)
    return FieldTiles(
        make_set(
            write_field(tmp_path, "half", half, []), write_field(tmp_path, "blank", glass, [])
        ),
        80,
        None,
    )


def test_tile_by_tile_it_is_the_procedure_of_uts(real_data: Path) -> None:
    """Histogram matching by scikit-image, then Macenko by torchstain, on real pictures."""
    folder = real_data / "stain_targets"
    reference = picture(folder / "tiatoolbox_target.png")
    theirs = TorchMacenkoNormalizer()
    theirs.fit(reference)
    ours = build("histogram_macenko", folder / "tiatoolbox_target.png", "tile")
    for name in ("torchstain_source.png", "torchstain_target.png"):
        tile = as_array(picture(folder / name)[:, 40:340, 50:350])
        matched = match_histograms(tile, as_array(reference), channel_axis=-1)
        expected, _, _ = theirs.normalize(torch.from_numpy(matched).permute(2, 0, 1), stains=False)
        assert np.abs(ours.apply(tile).astype(int) - expected.numpy()).max() <= 1


@pytest.mark.parametrize("kind", KINDS)
def test_fields_get_the_colours_of_the_target(tiles: FieldTiles, target: Path, kind: str) -> None:
    stained = normalise_tiles(tiles, build(kind, target))
    goal = describe_colours(as_array(picture(target)))
    before, after = (describe_colours(some.read(0)) for some in (tiles, stained))
    assert np.abs(after - goal).mean() < 0.5 * np.abs(before - goal).mean()
    assert stained.sample_ids == tiles.sample_ids and tiles.stain is None


@pytest.mark.parametrize("scope", ["slide", "tile"])
@pytest.mark.parametrize("kind", KINDS)
def test_glass_stays_glass(tiles: FieldTiles, target: Path, kind: str, scope: str) -> None:
    stained = normalise_tiles(tiles, build(kind, target, scope))
    blank = [n for n, name in enumerate(tiles.sample_ids) if name.startswith("blank")]
    for tile in blank:
        assert np.array_equal(stained.read(tile), tiles.read(tile))
    glass = tiles.sample_ids.index("half_160_0")
    assert np.array_equal(stained.read(glass), tiles.read(glass))


@pytest.mark.parametrize("kind", KINDS)
def test_a_field_has_the_same_colours_whichever_of_its_tiles_are_read(
    tiles: FieldTiles, target: Path, kind: str
) -> None:
    stain = build(kind, target)
    whole = normalise_tiles(tiles, stain)
    some = normalise_tiles(tiles.select(np.array([3, 1])), stain)
    assert np.array_equal(some.read(0), whole.read(3))
    again = pickle.loads(pickle.dumps(whole))  # as for a worker
    assert np.array_equal(again.read(3), whole.read(3))
    assert np.array_equal(whole.select(np.array([3])).read(0), whole.read(3))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_needs_no_picture(
    tiles: FieldTiles, target: Path, kind: str, tmp_path: Path
) -> None:
    stain = build(kind, target)
    torch.save(stain.describe(), tmp_path / "stain.pt")
    restored = restore_field_stain(torch.load(tmp_path / "stain.pt", weights_only=True))
    first, second = (normalise_tiles(tiles, one).read(0) for one in (stain, restored))
    assert np.array_equal(first, second)
    assert restore_field_stain(None) is None and build_field_stain(FieldStainKeys()) is None


def test_a_field_smaller_than_a_tile_is_measured_without_the_white_beyond(
    tmp_path: Path, target: Path
) -> None:
    pixels = as_array(draw_tile(side=60))
    alone, wide = (
        FieldTiles(make_set(write_field(tmp_path, "small", pixels, [])), side, None)
        for side in (60, 90)
    )
    small, padded = (
        normalise_tiles(some, build("histogram", target)).read(0) for some in (alone, wide)
    )
    assert np.array_equal(small, padded[:60, :60])


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("histogram", False, "stain=histogram: expected stain_target=<a picture of H&E> with it"),
        ("histogram_macenko", False, "expected stain_target="),
        ("none", True, "stain=none: expected no stain_target with it"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(
    target: Path, kind: str, given: bool, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build_field_stain(FieldStainKeys(kind, str(target) if given else ""))


def test_a_target_without_tissue_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (50, 50), "white").save(tmp_path / "white.png")
    with pytest.raises(UserError, match="expected a picture with haematoxylin and eosin"):
        build_field_stain(FieldStainKeys("macenko", str(tmp_path / "white.png")))
