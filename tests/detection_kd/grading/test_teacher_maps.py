"""Maps of a teacher that are kept for all epochs, and turned along with their patches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detection_kd.graded_patches.labelled_tiles import read_labelled_tiles
from detection_kd.graded_patches.patch_augmentation import PatchAugmentationKeys, augment_patches
from detection_kd.graded_patches.patch_loader import make_patch_loader
from detection_kd.graded_patches.patch_pixels import PatchPixels
from detection_kd.grading.teacher_maps import TeacherMaps, check_kept_maps
from detection_kd.models.low_resolution import GradingKeys, GradingNetwork, PatchScale
from tests.detection_kd.grading_runs import GRADES, SIDE, write_graded_set
from wsi_common.distributed import World
from wsi_common.errors import UserError
from wsi_common.sampling import balance_epoch

ONE = World(0, 1, torch.device("cpu"))
SYMMETRIES = PatchAugmentationKeys(stain=0.0)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> PatchPixels:
    """36 patches of 32 px."""
    folder = tmp_path_factory.mktemp("patches")
    write_graded_set(folder, per_grade=1)
    return PatchPixels(read_labelled_tiles(folder / "patches.csv", GRADES), SIDE)


@pytest.fixture(scope="module")
def teacher() -> GradingNetwork:
    """A network whose map turns exactly with its patch: averages of squares of 8 px, mixed."""
    torch.manual_seed(0)
    network = GradingNetwork(GradingKeys("small", "random"), GRADES, PatchScale(SIDE))
    network.trunk = nn.Sequential(nn.AvgPool2d(8), nn.Conv2d(3, network.head.in_features, 1))
    return network.freeze()


def test_kept_maps_are_those_of_the_view(pixels: PatchPixels, teacher: GradingNetwork) -> None:
    """For all eight symmetries, and for patches that come more than once in an epoch."""
    kept = TeacherMaps(teacher, pixels, ONE, 7, "fp32")
    order = balance_epoch(pixels.patches.labels, seed=4, epoch=1, multiple=4)
    seen = set()
    for batch in make_patch_loader(pixels, order, 4, ONE, seed=4, epoch=1):
        expected = teacher(augment_patches(batch.pixels, batch.draws, SYMMETRIES))
        found = kept.read(batch.draws, SYMMETRIES)
        for name in ("maps", "vectors", "logits"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)
        plain = kept.read(batch.draws, PatchAugmentationKeys(symmetry=False, stain=0.0))
        seen.add(torch.equal(plain.maps, found.maps))
    assert seen == {False}


def test_kept_maps_have_half_precision_and_no_graph(
    pixels: PatchPixels, teacher: GradingNetwork
) -> None:
    kept = TeacherMaps(teacher, pixels, ONE, 7, "fp32")
    assert kept.maps.dtype == torch.float16 and kept.maps.shape[0] == len(pixels.patches)
    batch = next(iter(make_patch_loader(pixels, [3, 1], 2, ONE)))
    assert kept.read(batch.draws, SYMMETRIES).logits.grad_fn is None


@pytest.mark.parametrize(
    ("changes", "inner", "message"),
    [
        ({"rotation": 5.0}, False, r"found augmentation.rotation=5; set"),
        ({"colour": 0.1, "scale": 0.2}, False, r"augmentation.scale=0.2, augmentation.colour=0.1"),
        ({"stain": 0.05}, False, "augmentation.stain=0.05"),
        ({"shift": 0.1}, False, "augmentation.shift=0.1"),
        ({}, True, "an earlier terms.level"),
    ],
)
def test_views_that_maps_cannot_follow_are_refused(
    changes: dict[str, float], inner: bool, message: str
) -> None:
    check_kept_maps(SYMMETRIES, inner=False)
    with pytest.raises(UserError, match=message):
        check_kept_maps(PatchAugmentationKeys(**{"stain": 0.0, **changes}), inner)
