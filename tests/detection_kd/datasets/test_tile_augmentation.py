"""Augmentation of tiles: repeatable, what each option changes, sizes of a step, and the teacher on
augmented views.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from skimage.color import rgb_from_hed
from torch import nn

from detection_kd import train_d2vfm
from detection_kd.datasets.distillation import DistillationTiles, read_pairs
from detection_kd.datasets.tile_augmentation import (
    TileAugmentation,
    random_blur,
    random_crop,
    rescale,
)
from detection_kd.models.online_teacher import OnlineTeacher, build_online_teacher
from patch_encoder.models import encoder_table
from patch_encoder.models.encoder_table import IMAGENET, EncoderRow
from patch_encoder.models.encoders import Encoder, PixelEncoder, build_encoder
from patch_encoder.models.transforms import Fit, ToInputSize
from patch_encoder.stain.augment import HedJitter
from tests.detection_kd.d2vfm_runs import write_backbone
from tests.detection_kd.distillation_sets import SIDE, write_set
from wsi_common.cli import run
from wsi_common.errors import UserError

ALL = {"crop": True, "stain": HedJitter(0.1, 0.1), "colour": 0.2, "blur": 1.5}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def picture() -> torch.Tensor:
    """A stained tile: smooth pink and violet, uint8 (3, 48, 48)."""
    y, x = np.mgrid[:48, :48] / 48
    pixels = np.stack([200 - 60 * x, 120 + 60 * y, 190 - 30 * x * y], axis=0)
    return torch.from_numpy(pixels.round().astype(np.uint8))


@pytest.mark.parametrize("option", [{}, *({name: value} for name, value in ALL.items()), ALL])
def test_augmentation_follows_seed_epoch_and_index(option: dict, picture: torch.Tensor) -> None:
    augment, tile = TileAugmentation(**option), picture.permute(1, 2, 0).numpy()
    first = [augment(tile, np.random.default_rng((3, 0, index))) for index in range(12)]
    again = [augment(tile, np.random.default_rng((3, 0, index))) for index in range(12)]
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert all(a.dtype == np.uint8 and a.shape == tile.shape for a in first)
    assert len({a.tobytes() for a in first}) > (6 if option else 3)


def test_options_leave_flips_and_turns_as_they_were(picture: torch.Tensor) -> None:
    """The published augmentation draws first: switching stain on does not change how a tile is
    turned.
    """
    tile = picture.permute(1, 2, 0).numpy()
    for index in range(8):
        turns, flip = np.random.default_rng((1, 2, index)).integers((4, 2))
        expected = np.rot90(tile[:, ::-1] if flip else tile, turns)
        assert np.array_equal(
            TileAugmentation()(tile, np.random.default_rng((1, 2, index))), expected
        )
        still = TileAugmentation(stain=lambda pixels, _: pixels)
        assert np.array_equal(still(tile, np.random.default_rng((1, 2, index))), expected)


def test_hed_jitter_scales_and_shifts_the_amounts_of_three_stains(picture: torch.Tensor) -> None:
    """By hand with scikit-image's matrix; its own rgb2hed cuts negative amounts off, which no
    inverse brings back.
    """
    jittered = HedJitter(0.1, 0.1)(picture, generator(4))
    drawn = (torch.rand(3, 2, generator=generator(4)) * 2 - 1).double().numpy() * 0.1
    for y, x in ((0, 0), (20, 31), (47, 5)):
        density = -np.log((picture[:, y, x].double().numpy() + 1) / 256)
        amounts = np.linalg.solve(rgb_from_hed.T, density) * (1 + drawn[:, 0]) + drawn[:, 1]
        expected = np.exp(-(rgb_from_hed.T @ amounts)) * 256 - 1
        assert np.abs(jittered[:, y, x].numpy() - np.clip(expected, 0, 255)).max() <= 0.51
    assert (jittered.int() - picture.int()).abs().float().mean() > 1
    assert torch.equal(HedJitter(0.0, 0.0)(picture, generator()), picture)


def test_crops_keep_the_size_and_show_a_part() -> None:
    ramp = torch.arange(96, dtype=torch.uint8).expand(3, 96, 96).contiguous()
    spans, untouched = [], 0
    for seed in range(60):
        tile = random_crop(ramp, generator(seed))
        assert tile.shape == ramp.shape
        if torch.equal(tile, ramp):
            untouched += 1
        else:
            spans.append((int(tile.max()) - int(tile.min())) / 95)
    assert 18 <= untouched <= 42, "half of the tiles"
    assert min(spans) >= 384 / 600 - 0.06 and max(spans) <= 1, "384 to 600 of 400, 500 or 600 px"
    assert len({round(span, 1) for span in spans}) >= 3


def test_blur_smooths_half_of_the_tiles(picture: torch.Tensor) -> None:
    noise = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8, generator=generator())
    rough = [float(random_blur(noise, generator(seed), 2.0).float().std()) for seed in range(40)]
    same = sum(abs(value - float(noise.float().std())) < 1e-4 for value in rough)
    assert 10 <= same <= 30 and min(rough) < 0.5 * float(noise.float().std())


def test_steps_are_resized_to_the_sizes_asked_for() -> None:
    tiles = torch.randint(0, 255, (2, 3, 40, 40), dtype=torch.uint8)
    sides = {rescale(tiles, [1.0], [32, 48, 64], 1, 0, step).shape[-1] for step in range(30)}
    assert sides == {32, 48, 64}
    assert rescale(tiles, [1.5], [], 1, 0, 0).shape[-1] == 60
    assert rescale(tiles, [1.0], [], 1, 0, 0) is tiles


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_set(tmp_path / "set")


def keys(folder: Path, output: Path, *more: str) -> list[str]:
    backbone = output.parent / "backbone.pt"
    if not backbone.exists():
        write_backbone(backbone)
    base = [
        f"dataset={folder}",
        f"backbone={backbone}",
        f"output={output}",
        "device=cpu",
        "workers=0",
        "precision=fp32",
        "figures=false",
    ]
    return [*base, "epochs=1", "batch_size=4", "val_fraction=0.3", *more]


def train(folder: Path, output: Path, *more: str) -> int:
    return run(train_d2vfm.main, train_d2vfm.Config, keys(folder, output, *more))


def model(output: Path) -> dict[str, torch.Tensor]:
    return torch.load(output / "checkpoint_last.pt", weights_only=True)["model"]


def losses(output: Path) -> list[float]:
    return [
        json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()
    ]


@pytest.mark.process
def test_online_teacher_without_augmentation_is_the_stored_one(
    folder: Path, tmp_path: Path
) -> None:
    assert train(folder, tmp_path / "stored", "augment=false") == 0
    assert train(folder, tmp_path / "online", "augment=false", "online_teacher=stain_texture") == 0
    stored, online = model(tmp_path / "stored"), model(tmp_path / "online")
    assert all(torch.allclose(stored[name], online[name], atol=1e-5) for name in stored)
    every = [f"augmentation.{name}={value}" for name, value in (ALL | {"stain": 0.1}).items()]
    assert (
        train(
            folder,
            tmp_path / "views",
            "online_teacher=stain_texture",
            "augmentation.sizes=[32,40]",
            *every,
        )
        == 0
    )
    assert train(folder, tmp_path / "plain", "augmentation.sizes=[32,40]", *every) == 0
    views, plain = model(tmp_path / "views"), model(tmp_path / "plain")
    assert not all(torch.equal(views[name], plain[name]) for name in views), (
        "the teacher saw what the student saw"
    )


def test_the_teacher_is_shown_the_augmented_tile(folder: Path) -> None:
    teacher = build_online_teacher("stain_texture", "", True, torch.device("cpu"), "fp32")
    options = {"augment": True, "seed": 3, "augmentation": TileAugmentation(**ALL)}
    tiles = DistillationTiles(read_pairs(folder), **options, teacher_view=teacher.transform)
    encoder = build_encoder("stain_texture")
    for index in range(4):
        tile, item = tiles[index]
        assert torch.equal(teacher(item[None])[0], encoder.transform(tile.permute(1, 2, 0).numpy()))
        assert not torch.allclose(item, tiles.pairs[index].feature)


@pytest.fixture
def tiny_torch(monkeypatch: pytest.MonkeyPatch) -> str:
    """A small torch encoder with a resizing transform in the table."""
    monkeypatch.setitem(
        encoder_table.ENCODERS, "tiny", EncoderRow("timm", "test_vit", "", 64, Fit(160, 160))
    )
    return "tiny"


def write_teacher(folder: Path, name: str, weights: Path) -> None:
    """Random weights of timm's test_vit, and their features of the plain tiles as the stored
    ones.
    """
    torch.manual_seed(0)
    torch.save(timm.create_model("test_vit", num_classes=0).state_dict(), weights)
    encoder = build_encoder(name, str(weights))
    pairs = read_pairs(folder)
    plain = DistillationTiles(pairs, augment=False, seed=0)
    with torch.no_grad():
        for index, pair in enumerate(pairs):
            item = encoder.transform(plain[index][0].permute(1, 2, 0).numpy())
            torch.save(encoder.model(item[None])[0], pair.image.with_suffix(".pt"))


def test_a_torch_teacher_gives_its_stored_features(
    folder: Path, tmp_path: Path, tiny_torch: str
) -> None:
    weights = tmp_path / "vit.pth"
    write_teacher(folder, tiny_torch, weights)
    online = ["augment=false", f"online_teacher={tiny_torch}", f"teacher_weights={weights}"]
    assert train(folder, tmp_path / "stored", "augment=false") == 0
    assert train(folder, tmp_path / "online", *online) == 0
    stored, found = model(tmp_path / "stored"), model(tmp_path / "online")
    assert all(torch.allclose(stored[name], found[name], atol=1e-4) for name in stored)
    assert train(folder, tmp_path / "online", *online[1:], "scales=[1.0]") == 2, "another run"


@pytest.mark.process
def test_the_teacher_is_asked_about_augmented_tiles(folder: Path, tmp_path: Path) -> None:
    weights = tmp_path / "vit.pth"
    write_teacher(folder, "timm:test_vit", weights)
    online = ["online_teacher=timm:test_vit", f"teacher_weights={weights}"]
    augmented = ["augmentation.crop=true", "augmentation.colour=0.8"]
    assert train(folder, tmp_path / "online", *online, *augmented) == 0
    assert train(folder, tmp_path / "stored", *augmented) == 0
    asked, stored = (losses(tmp_path / name)[0] for name in ("online", "stored"))
    assert abs(stored / asked - 1) > 1e-3


def test_a_teacher_gets_no_gradient() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
    encoder = Encoder(
        "e",
        5,
        ToInputSize(None),
        PixelEncoder(network, IMAGENET),
        {"weights_sha256": "", "transform": ""},
    )
    teacher = OnlineTeacher(encoder, torch.device("cpu"), "fp32")
    assert not teacher(torch.zeros(2, 3, 4, 4, dtype=torch.uint8)).requires_grad
    assert not any(parameter.requires_grad for parameter in network.parameters())


def test_wrong_teachers_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, expected in (
        (
            ["online_teacher=mean_colour"],
            "expected a teacher of width 151 as the stored features, found 3",
        ),
        (["online_teacher=stain_texture", "cache=true", "augment=false"], "no online_teacher"),
        (["cache=true", "augment=false", "augmentation.sizes=[64]"], "no augmentation.sizes"),
        (["augmentation.sizes=[64]", "scales=[0.5]"], "scales=[1.0] with them"),
        (["augmentation.stain=1.5"], "0 <= stain < 1"),
        (["augmentation.crop=true", "augment=false"], "expected augment=true with them"),
        (["scales=[]"], "expected factors above 0"),
        (["online_teacher=stain_textur"], "did you mean 'stain_texture'"),
    ):
        assert train(folder, tmp_path / "run", *arguments) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()
    teacher = build_online_teacher("stain_texture", "", True, torch.device("cpu"), "fp32")
    tile = np.full((SIDE, SIDE, 3), 128, np.uint8)
    with pytest.raises(UserError, match="found a cosine of"):
        teacher.check([tile], -torch.ones(1, 151))
