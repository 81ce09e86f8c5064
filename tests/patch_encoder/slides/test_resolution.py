"""mpp from every vendor's keys, what is not believed, and what is said about it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from patch_encoder.cohort.labels import read_labels
from patch_encoder.slides import open_slide
from patch_encoder.slides.resolution import announce_resolution, read_resolution
from patch_encoder.tiles.grid import make_tile_geometry
from tests.helpers import draw_slide, write_pyramid
from wsi_common.errors import UserError

SPACING = "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing"


@pytest.fixture(autouse=True)
def _say_again() -> Iterator[None]:
    """Announcements are made once a process; tests want each."""
    announce_resolution.cache_clear()
    yield
    announce_resolution.cache_clear()


@pytest.mark.parametrize(
    ("properties", "mpp"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.252"}, 0.251),
        ({"openslide.mpp-y": "0.5"}, 0.5),
        ({"aperio.MPP": "0.4990"}, 0.499),
        ({"ventana.ScanRes": "0.2325"}, 0.2325),
        ({"sakura.ResolutionMmPerPix": "0.00024"}, 0.24),
        ({f"{SPACING}[0]": ".000499", f"{SPACING}[1]": ".000497"}, 0.498),
        ({"philips.DICOM_PIXEL_SPACING": '"0.000226891" "0.000226907"'}, 0.226899),
        ({"hamamatsu.PhysicalWidth": "2500000", "hamamatsu.PhysicalHeight": "1250000"}, 0.25),
        ({"mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X": "0.233"}, 0.233),
        (
            {
                "tiff.XResolution": "40000",
                "tiff.YResolution": "40000",
                "tiff.ResolutionUnit": "centimeter",
            },
            0.25,
        ),
        (
            {
                "tiff.XResolution": "101600",
                "tiff.YResolution": "101600",
                "tiff.ResolutionUnit": "inch",
            },
            0.25,
        ),
        (
            {
                "tiff.XResolution": "40000",
                "tiff.YResolution": "40000",
                "tiff.ResolutionUnit": "none",
            },
            None,
        ),
        ({"openslide.mpp-x": "0", "openslide.mpp-y": "0", "aperio.MPP": "0.5"}, 0.5),
        ({"openslide.mpp-x": "unknown"}, None),
        ({}, None),
    ],
)
def test_keys_of_the_vendors(
    properties: dict[str, str], mpp: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    found = read_resolution(properties, "S", (10_000, 5_000))
    assert found.mpp == (None if mpp is None else pytest.approx(mpp, rel=1e-5))
    assert (
        found.source in properties
        or found.source.startswith(("none: ", "mirax "))
        or "mpp-x" in found.source
    )
    assert not caplog.records, "nothing doubtful, nothing said"


@pytest.mark.parametrize("value", ["0.027", "1000", "352.778", "nan", "inf"])
def test_what_no_microscope_gives_is_not_believed(
    value: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = read_resolution({"openslide.mpp-x": value, "openslide.mpp-y": value}, "S")
    assert found.mpp is None
    assert f"openslide.mpp-x says {float(value):g} um, outside 0.05 to 10" in found.source
    with caplog.at_level(logging.WARNING):
        found = read_resolution(
            {
                "openslide.mpp-x": value,
                "tiff.XResolution": "40000",
                "tiff.ResolutionUnit": "centimeter",
            },
            "S",
        )
    assert (found.mpp, found.source) == (0.25, "tiff.XResolution")
    assert "outside 0.05 to 10" in caplog.text and "tiff.XResolution is used" in caplog.text


def test_objective_power_is_the_announced_last_resort(caplog: pytest.LogCaptureFixture) -> None:
    for key in (
        "openslide.objective-power",
        "aperio.AppMag",
        "hamamatsu.SourceLens",
        "leica.objective",
        "ventana.Magnification",
    ):
        found = read_resolution({key: "40"}, f"S-{key}")
        assert (found.mpp, found.source, found.power) == (0.25, "objective power", 40.0)
        assert f"S-{key}: no mpp" in caplog.text and "labels.csv" in caplog.text
    assert read_resolution({"aperio.AppMag": "0"}, "S").mpp is None
    assert read_resolution({"aperio.MPP": "0.5", "aperio.AppMag": "20"}, "S").source == "aperio.MPP"


def test_contradictions_are_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        read_resolution({"aperio.MPP": "0.5", "aperio.AppMag": "40"}, "S1")
        read_resolution({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.26"}, "S2")
        read_resolution({"aperio.MPP": "0.5"}, "S3", given=0.25)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "slide S1",
        "slide S2",
        "slide S3",
    ]
    assert "objective is 40x" in caplog.text
    assert "0.25 by 0.26 um, taken as their mean" in caplog.text
    assert "mpp 0.25 as given; the file says 0.5" in caplog.text
    caplog.clear()
    assert (
        read_resolution({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}, "S4").mpp is None
    ), "pixels are not square"


@pytest.mark.parametrize("value", [0.027, 250.0, float("nan"), 0.0, -1.0])
def test_given_nonsense_is_refused(tmp_path: Path, value: float) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(
        UserError, match=r"slide a.png: mpp: expected um per level-0 pixel, 0.05 to 10"
    ):
        open_slide(tmp_path / "a.png", mpp=value)
    (tmp_path / "labels.csv").write_text(f"case_id,slide_id,label,mpp\n1,a,x,{value}\n")
    with pytest.raises(UserError, match=r"line 2: .*expected"):
        read_labels(tmp_path / "labels.csv")


def test_error_names_slide_reason_and_remedy(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "S7.tiff", draw_slide(128), mpp=300.0)
    with (
        open_slide(path) as slide,
        pytest.raises(UserError, match=r"S7.*says 300 um, outside.*mpp column of labels.csv"),
    ):
        make_tile_geometry(slide, 64, 0.5)


def test_a_pictures_density_counts_when_it_is_a_microscopes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "fine.png", dpi=(50800, 50800))
    Image.new("RGB", (8, 8)).save(tmp_path / "screen.png", dpi=(96, 96))
    assert open_slide(tmp_path / "fine.png").mpp == pytest.approx(0.5, rel=1e-3)
    assert open_slide(tmp_path / "screen.png").mpp is None
    assert not caplog.records


def test_real_slides_say_where_their_mpp_is_from(real_data: Path) -> None:
    with open_slide(real_data / "wsi_openslide" / "cmu-1-small-region.svs") as slide:
        assert (slide.resolution.source, slide.resolution.power) == ("openslide.mpp-x", 20.0)
        assert slide.associated == {
            "label": (387, 463),
            "macro": (1280, 431),
            "thumbnail": (574, 768),
        }
    with open_slide(real_data / "wsi_tiny_fixtures" / "boxes.tiff") as slide:
        assert slide.mpp is None
        assert "352.778" in slide.resolution.source
