"""Feature bags: every producer's output is read back, batches cross slides, one bad slide never
stops a cohort.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from patch_encoder import extract_features, tile_slides
from patch_encoder.bags.bag import open_bag, read_bag
from patch_encoder.bags.paths import list_bags
from patch_encoder.bags.writer import write_bag
from patch_encoder.descriptors.mean_colour import mean_colour
from patch_encoder.extraction import loop as engine
from patch_encoder.extraction import onednn_fusion
from patch_encoder.models.encoders import PixelEncoder, ToInputSize, build_encoder, digest_weights
from patch_encoder.slides import open_slide
from tests.helpers import forget_slides
from tests.patch_encoder.extraction.conftest import arguments, extract
from wsi_common.cli import run
from wsi_common.config import load_config
from wsi_common.errors import UserError


def bag_path(root: Path, slide: str = "S001", encoder: str = "mean_colour") -> Path:
    return root / "features" / encoder / "h5_files" / f"{slide}.h5"


@pytest.mark.parametrize("workers", [0, 2])
def test_features_belong_to_their_tiles(cohort: Path, workers: int) -> None:
    assert extract(cohort, f"workers={workers}", "pt=true") == 0
    for slide_id in ("S000", "S001", "S002"):
        bag = read_bag(bag_path(cohort, slide_id))
        assert bag.coords is not None
        with open_slide(cohort / "slides" / f"{slide_id}.tiff") as slide:
            expected = np.stack(
                [mean_colour(slide.read(int(x), int(y), 64)) for x, y in bag.coords.tolist()]
            )
        assert np.allclose(bag.features, expected, atol=1e-6)
        assert bag.attributes["patch_size_level0"] == 64
        assert bag.attributes["encoder"] == "mean_colour"
        as_pt = read_bag(cohort / "features" / "mean_colour" / "pt_files" / f"{slide_id}.pt")
        assert np.array_equal(as_pt.features, bag.features)
    assert list(list_bags(cohort / "features" / "mean_colour")) == ["S000", "S001", "S002"]


def test_batch_size_and_workers_do_not_change_a_bag(cohort: Path) -> None:
    digests = []
    for index, keys in enumerate((["batch_size=1"], ["batch_size=64", "workers=2"])):
        assert extract(cohort, f"output={cohort}/f{index}", *keys) == 0
        digests.append(
            [
                open_bag(file).digest()
                for file in list_bags(cohort / f"f{index}" / "mean_colour").values()
            ]
        )
    assert digests[0] == digests[1]


def test_finished_slides_are_skipped_and_stale_ones_refused(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert extract(cohort) == 0
    before = bag_path(cohort).stat().st_mtime_ns
    assert extract(cohort, "batch_size=3", "workers=2") == 0
    assert bag_path(cohort).stat().st_mtime_ns == before
    assert extract(cohort, "dtype=float16") == 2
    assert "dtype 'float32' -> 'float16'" in capsys.readouterr().err
    assert extract(cohort, "dtype=float16", "overwrite=true") == 0
    with h5py.File(bag_path(cohort)) as file:
        assert file["features"].dtype == np.float16


@pytest.mark.parametrize(
    ("mpp", "tile", "said"),
    [(0.5, 64, False), (1.0, 64, True), (0.5, 256, True), (None, None, False)],
)
def test_tiles_that_do_not_suit_the_encoder_are_said(
    cohort: Path, mpp: float | None, tile: int | None, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    encoder = replace(build_encoder("mean_colour"), mpp=mpp, tile=tile)
    places = [f"{cohort}/slides", f"{cohort}/tiles", "", f"{cohort}/features"]
    config = load_config(extract_features.Config, arguments(cohort))
    with caplog.at_level("WARNING"):
        assert engine.extract(encoder, *places, config.settings()) == 0
    found = [record.getMessage() for record in caplog.records]
    assert any("was trained on tiles of" in message for message in found) == said
    if said:
        assert f"{tile} px at {mpp:g} um per pixel" in found[0]
        assert "3 of 3 slides are cut as 64 px at 0.5" in found[0]


def test_one_bad_slide_never_stops_the_cohort(cohort: Path) -> None:
    slide = cohort / "slides" / "S001.tiff"
    whole = slide.read_bytes()
    forget_slides(cohort / "tiles")
    slide.write_bytes(whole[:3000])
    assert extract(cohort) == 1
    assert (
        "S001,extract_features"
        in (cohort / "features" / "mean_colour" / "failures.csv").read_text()
    )
    assert sorted(list_bags(cohort / "features" / "mean_colour")) == ["S000", "S002"]
    slide.write_bytes(whole)
    assert extract(cohort) == 0
    assert sorted(list_bags(cohort / "features" / "mean_colour")) == ["S000", "S001", "S002"]


def test_a_tile_that_does_not_decode_fails_its_slide_only(
    tile_folder: Path, tmp_path: Path
) -> None:
    other = tile_folder.parent / "008"
    other.mkdir()
    Image.new("RGB", (64, 64), (9, 9, 9)).save(other / "0_0.png")
    (tile_folder / "1_0.png").write_bytes(b"broken")
    tiling = [
        f"slides={tmp_path}/slides",
        f"output={tmp_path}/tiles",
        "tile_size=64",
        "target_mpp=null",
        "workers=1",
    ]
    assert (
        run(tile_slides.main, tile_slides.Config, tiling) == 1
    )  # its overview cannot be drawn either
    Image.new("RGB", (64, 64)).save(tile_folder / "1_0.png")
    assert run(tile_slides.main, tile_slides.Config, tiling) == 0
    forget_slides(tmp_path / "tiles")
    (tile_folder / "1_0.png").write_bytes(b"broken")
    keys = [
        f"slides={tmp_path}/slides",
        f"coords={tmp_path}/tiles",
        f"output={tmp_path}/features",
        "encoder=mean_colour",
        "workers=0",
    ]
    assert run(extract_features.main, extract_features.Config, keys) == 1
    assert sorted(list_bags(tmp_path / "features" / "mean_colour")) == ["008"]
    assert "1_0.png" in (tmp_path / "features" / "mean_colour" / "failures.csv").read_text()


def test_slide_without_tissue_or_coordinates_is_listed(cohort: Path) -> None:
    (cohort / "tiles" / "coords" / "S000.h5").unlink()
    with h5py.File(cohort / "tiles" / "coords" / "S002.h5", "a") as file:
        attributes = dict(file["coords"].attrs)
        del file["coords"]
        file.create_dataset("coords", data=np.empty((0, 2), np.int64)).attrs.update(attributes)
    assert extract(cohort) == 1
    failures = (cohort / "features" / "mean_colour" / "failures.csv").read_text()
    assert "S000" in failures
    assert "no tissue: 0 tiles" in failures
    assert sorted(list_bags(cohort / "features" / "mean_colour")) == ["S001"]


def test_a_cohort_keeps_the_kernels_of_its_first_bags(
    cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def again(*keys: str) -> int:
        torch.manual_seed(0)  # the same weights
        return extract(cohort, "encoder=resnet18", "weights=random", *keys)

    monkeypatch.setattr(onednn_fusion, "choose_fastest", lambda ways: "plain")
    assert again() == 0
    paths = [bag_path(cohort, name, "resnet18") for name in ("S000", "S001", "S002")]
    before = [open_bag(path).digest() for path in paths]
    assert [open_bag(path).attributes["kernels"] for path in paths] == ["plain"] * 3
    paths[1].unlink()
    monkeypatch.setattr(onednn_fusion, "choose_fastest", lambda ways: "fused")
    assert again() == 0
    assert open_bag(paths[1]).attributes["kernels"] == "plain"
    assert [open_bag(path).digest() for path in paths] == before
    assert again("overwrite=true") == 0
    assert not any("kernels" in open_bag(path).attributes for path in paths)
    paths[1].unlink()
    monkeypatch.setattr(onednn_fusion, "choose_fastest", lambda ways: "plain")
    assert again() == 0
    assert "kernels" not in open_bag(paths[1]).attributes


def test_several_processes_over_one_cohort_do_not_measure(
    cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn_fusion, "choose_fastest", lambda ways: "plain")
    assert extract(cohort, "encoder=resnet18", "weights=random", "shard=1/2") == 0
    bags = list_bags(cohort / "features" / "resnet18").values()
    assert bags and not any("kernels" in open_bag(path).attributes for path in bags)


def test_nan_features_are_never_written(cohort: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from patch_encoder.models import encoders

    monkeypatch.setitem(
        encoders.CLASSICAL, "mean_colour", (3, lambda tile: np.full(3, np.nan, np.float32))
    )
    assert extract(cohort) == 1
    assert not bag_path(cohort).exists()
    assert "NaN or infinity" in (cohort / "features" / "mean_colour" / "failures.csv").read_text()


def write(path: Path, features: np.ndarray, coords: np.ndarray | None = None) -> Path:
    with h5py.File(path, "w") as file:
        file["features"] = features
        if coords is not None:
            file["coords"] = coords
    return path


def test_bad_bags_are_named(tmp_path: Path) -> None:
    nan = np.ones((3, 4))
    nan[1, 2] = np.nan
    cases = {
        "nan.h5": (nan, None, "NaN or infinity in 1 of 3 tiles"),
        "empty.h5": (np.ones((0, 4)), None, "empty bag"),
        "cube.h5": (np.ones((2, 3, 4)), None, "expected features"),
        "coords.h5": (np.ones((3, 4)), np.ones((2, 2)), r"expected coords \(3, 2\)"),
    }
    for name, (features, coords, expected) in cases.items():
        with pytest.raises(UserError, match=f"{name}.*{expected}"):
            read_bag(write(tmp_path / name, features, coords))
    (tmp_path / "cut.h5").write_bytes(write(tmp_path / "x.h5", np.ones((50, 4))).read_bytes()[:900])
    for reader in (read_bag, open_bag):
        with pytest.raises(UserError, match="cannot be read"):
            reader(tmp_path / "cut.h5")
    torch.save({"weights": torch.ones(2, 2)}, tmp_path / "dict.pt")
    with pytest.raises(UserError, match="expected one tensor"):
        read_bag(tmp_path / "dict.pt")
    with pytest.raises(UserError, match="found none"):
        list_bags(tmp_path / "nowhere")


def test_foreign_bags_are_read(tmp_path: Path, real_data: Path) -> None:
    trident = write(tmp_path / "trident.h5", np.ones((1, 5, 4), np.float32), np.zeros((5, 2)))
    assert read_bag(trident).features.shape == (5, 4)
    (tmp_path / "pt").mkdir()
    torch.save(torch.ones(6, 4, dtype=torch.float16), tmp_path / "pt" / "a.pt")  # TS2G-KD's layout
    assert (
        read_bag(
            list_bags(tmp_path)["a" if "a" in list_bags(tmp_path) else "trident"]
        ).features.dtype
        == torch.float32
    )
    assert list_bags(tmp_path / "pt")["a"].name == "a.pt"
    found = {
        read_bag(file).features.shape
        for file in sorted((real_data / "mopadi_features").rglob("features.h5"))
    }
    assert found == {(777, 512), (180, 512)}


def test_bag_round_trip_and_digest(tmp_path: Path) -> None:
    features, coords = (
        np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32),
        np.arange(8).reshape(4, 2),
    )
    write_bag(tmp_path / "a.h5", features, coords, {"patch_size": 64}, {"encoder": "x"})
    bag = read_bag(tmp_path / "a.h5")
    assert np.array_equal(bag.features, features)
    assert np.array_equal(bag.coords, coords)  # type: ignore[arg-type]
    assert (bag.attributes["patch_size"], bag.attributes["encoder"]) == (64, "x")
    assert open_bag(tmp_path / "a.h5").shape == (4, 3)
    features[0, 0] += 1
    write_bag(tmp_path / "b.h5", features, coords, {"patch_size": 64}, {"encoder": "x"})
    assert open_bag(tmp_path / "a.h5").digest() != open_bag(tmp_path / "b.h5").digest()


def test_transform_and_normalisation_match_torchvision() -> None:
    from torchvision.transforms import v2

    tile = np.random.default_rng(0).integers(0, 255, (96, 96, 3), dtype=np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    pipeline = v2.Compose(
        [
            v2.Resize(64, v2.InterpolationMode.BICUBIC),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    expected = v2.Normalize(mean, std)(pipeline(Image.fromarray(tile)))
    found = PixelEncoder(nn.Flatten(), (mean, std))(ToInputSize(64)(tile)[None])[0]
    assert torch.allclose(found, expected.flatten(), atol=1e-5)
    assert ToInputSize(None)(tile).shape == (3, 96, 96)


def test_timm_encoder_from_a_local_file(cohort: Path, tmp_path: Path) -> None:
    encoder = build_encoder("timm:test_vit", weights="random")
    torch.save(encoder.model.network.state_dict(), tmp_path / "w.pt")
    again = build_encoder("timm:test_vit", weights=str(tmp_path / "w.pt"))
    assert again.provenance == encoder.provenance
    assert again.name == "timm_test_vit"
    assert extract(cohort, "encoder=timm:test_vit", f"weights={tmp_path}/w.pt") == 0
    bag = read_bag(bag_path(cohort, "S000", "timm_test_vit"))
    with open_slide(cohort / "slides" / "S000.tiff") as slide:
        x, y = bag.coords[2].tolist()  # type: ignore[index]
        with torch.no_grad():
            expected = encoder.model(encoder.transform(slide.read(int(x), int(y), 64))[None])[
                0
            ].numpy()
    assert np.allclose(bag.features[2], expected, atol=1e-5)
    assert bag.features.shape[1] == encoder.dim


def test_weights_of_another_encoder_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "w.pt")
    with pytest.raises(UserError, match="another architecture"):
        build_encoder("resnet18", weights=str(tmp_path / "w.pt"))
    with pytest.raises(UserError, match="found none"):
        build_encoder("resnet18", weights=str(tmp_path / "none.pt"))
    with pytest.raises(UserError, match="did you mean 'resnet18'"):
        build_encoder("resnet8")
    with pytest.raises(UserError, match="no such model"):
        build_encoder("timm:resnet1")


def test_digest_follows_the_weights() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    before = digest_weights(layer)
    assert digest_weights(layer) == before
    with torch.no_grad():
        layer.bias[0] += 1e-6
    assert digest_weights(layer) != before


def test_unreachable_hub_says_what_to_fetch_and_where_to_put_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import huggingface_hub

    def offline(*args: object, **kwargs: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(UserError, match=r"fetch 'timm/resnet18.tv_in1k'.*weights="):
        build_encoder("resnet18")


def test_truncated_resnet_is_the_first_three_stages() -> None:
    import timm

    torch.manual_seed(0)
    encoder = build_encoder("resnet50", weights="random")
    whole = timm.create_model(
        "resnet50", pretrained=False, num_classes=0, features_only=True, out_indices=(3,)
    ).eval()
    whole.load_state_dict(
        {
            key.removeprefix("trunk."): value
            for key, value in encoder.model.network.state_dict().items()
        },
        strict=False,
    )
    pixels = torch.randint(0, 255, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        scaled = (pixels.float() - encoder.model.mean) / encoder.model.std
        assert torch.allclose(encoder.model(pixels), whole(scaled)[0].mean(dim=(2, 3)), atol=1e-4)
        assert encoder.model(pixels).shape == (1, 1024)
