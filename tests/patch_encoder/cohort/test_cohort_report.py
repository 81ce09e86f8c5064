"""The cohort page: right numbers, whole in itself, and usable with a thousand slides in a real
browser.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patch_encoder import cohort_report
from patch_encoder.bags.writer import write_bag
from patch_encoder.cohort.summary import compute_bin_edges, histogram, read_rows
from patch_encoder.cohort_report import Config, draw_bars, main, shorten
from patch_encoder.tiles.coordinates import Coordinates, TileGeometry, write_coordinates
from patch_encoder.tissue.quality import MEASURES, write_tiles
from wsi_common.cli import run
from wsi_common.files import write_csv


def geometry(name: str, mpp: float = 0.25) -> TileGeometry:
    return TileGeometry(name, 256, 512, 0, 256, 0.5, mpp, 0.0, 8000, 4000)


def add_slide(
    folder: Path, name: str, tiles: int, seed: int = 0, measured: bool = True, mpp: float = 0.25
) -> None:
    rng = np.random.default_rng(seed)
    coords = np.stack(np.divmod(np.arange(tiles), 7), axis=1) * 512
    values = {
        "blur": rng.lognormal(6, 1, tiles),
        **{name: rng.random(tiles) for name in ("pen", "background", "saturation", "darkness")},
    }
    quality = {name: values[name].astype(np.float32) for name in MEASURES} if measured else {}
    extra = {"tissue_share": "0.2500", "dropped": '{"blur": 2}'}
    write_tiles(
        folder / "coords" / f"{name}.h5", Coordinates(coords, geometry(name, mpp)), extra, quality
    )


def add_picture(folder: Path, name: str, shade: int) -> None:
    (folder / "thumbnails").mkdir(parents=True, exist_ok=True)
    gradient = np.add.outer(np.arange(192), np.arange(256)).astype(np.uint8) // 2 + shade % 60
    Image.fromarray(np.stack([gradient] * 3, axis=-1)).save(folder / "thumbnails" / f"{name}.jpg")


@pytest.fixture
def tiling(tmp_path: Path) -> Path:
    folder = tmp_path / "tiles"
    for index, tiles in enumerate((30, 200, 0)):
        add_slide(folder, f"S{index}", tiles, index)
        add_picture(folder, f"S{index}", index)
    write_coordinates(
        folder / "coords" / "plain.h5",
        Coordinates(np.zeros((4, 2), np.int64), geometry("plain", 0.0)),
    )
    (folder / "coords" / "broken.h5").write_bytes(b"none")
    lines = [{"slide": "bad", "stage": "tile_slides", "error": 'cannot <b>decode</b> it, "at all"'}]
    write_csv(folder / "failures.csv", ["slide", "stage", "error"], lines)
    return folder


def test_rows_are_what_lies_on_disk(tiling: Path, tmp_path: Path) -> None:
    bags = tmp_path / "features" / "uni"
    for name, count in (("S0", 30), ("S1", 199)):
        write_bag(
            bags / "h5_files" / f"{name}.h5",
            np.zeros((count, 4), np.float32),
            np.zeros((count, 2), np.int64),
            {},
        )
    rows = {
        row.slide: row for row in read_rows(tiling, [str(bags)], {"S0": "tumour", "lost": "normal"})
    }
    assert {slide: row.status for slide, row in rows.items()} == {
        "S0": "ok",
        "S1": "no bag",
        "S2": "no tiles",
        "plain": "no bag",
        "broken": "failed",
        "bad": "failed",
        "lost": "failed",
    }
    first = rows["S0"]
    assert (first.tiles, first.lost, first.mpp, first.label, first.bags) == (
        30,
        2,
        0.25,
        "tumour",
        {"uni": 30},
    )
    assert first.tissue_mm2 == pytest.approx(8000 * 4000 * 0.25**2 / 1e6 * 0.25)
    assert rows["S1"].errors == ["uni: a bag of 199 tiles, 200 were cut"]
    assert (
        rows["plain"].tissue_mm2 is None
        and rows["plain"].mpp is None
        and rows["plain"].errors == ["uni: no bag"]
    )
    assert rows["lost"].errors == ["in labels.csv, but not tiled"]
    assert rows["bad"].errors == ['tile_slides: cannot <b>decode</b> it, "at all"']


def test_histograms() -> None:
    edges = np.linspace(0.0, 1.0, 5)
    assert histogram(np.array([-3, 0.1, 0.3, 0.3, 1.0, 9.0]), edges) == [2, 2, 0, 2]
    assert (
        draw_bars([2, 4, 0], 30.0, 8.0) == "M0 8V4.0H10.0V0.0H20.0V8.0H30.0V8Z"
        and draw_bars([0, 0], 1.0, 1.0) == ""
    )
    assert [shorten(v) for v in (None, 0.123456, 12.34, 1234.5)] == ["–", "0.123", "12.3", "1,234"]
    assert compute_bin_edges([], "blur", True) is None


class Page(HTMLParser):
    """Collects what a browser would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        self.sources += [
            values[name] for name in ("src", "srcset", "data", "poster") if values.get(name)
        ]
        self.links += [values["href"]] if values.get("href") else []
        assert tag not in {"link", "iframe", "object", "embed"}

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_in_itself(tiling: Path, tmp_path: Path) -> None:
    assert (
        run(main, Config, [f"tiling={tiling}", f"output={tmp_path}/report", "title=My <cohort>"])
        == 0
    )
    html = (tmp_path / "report" / "cohort.html").read_text()
    page = Page()
    page.feed(html)
    assert len(page.sources) == 3 and all(
        source.startswith("data:image/jpeg;base64,") for source in page.sources
    )
    assert not re.search(r"https?://|//cdn|@import|url\(", html), "nothing comes from elsewhere"
    assert "My <cohort>" in page.text and "<cohort>" not in html
    assert 'cannot <b>decode</b> it, "at all"' in page.text and "<b>decode" not in html
    assert not (tmp_path / "report" / "thumbnails").exists()
    assert run(main, Config, [f"tiling={tiling}", f"output={tmp_path}/report", "embed=false"]) == 0
    page = Page()
    page.feed((tmp_path / "report" / "cohort.html").read_text())
    assert page.sources == ["thumbnails/S0.jpg", "thumbnails/S1.jpg", "thumbnails/S2.jpg"]
    assert all((tmp_path / "report" / source).is_file() for source in page.sources)


def test_older_tilings_lead_to_their_overlays(tiling: Path, tmp_path: Path) -> None:
    (tiling / "thumbnails").rename(tiling / "overlays")
    assert run(main, Config, [f"tiling={tiling}", f"output={tiling}/report"]) == 0
    page = Page()
    page.feed((tiling / "report" / "cohort.html").read_text())
    assert (
        page.links == [f"../overlays/S{index}.jpg" for index in range(3)] and len(page.sources) == 3
    )


def test_bad_input_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, Config, [f"tiling={tmp_path}", f"output={tmp_path}/r"]) == 2
    assert "expected coords/*.h5 of tile_slides, found none" in capsys.readouterr().err
    add_slide(tmp_path, "S0", 3)
    assert (
        run(main, Config, [f"tiling={tmp_path}", f"output={tmp_path}/r", f"features=[{tmp_path}]"])
        == 2
    )
    assert not (tmp_path / "r").exists()


@pytest.fixture(scope="module")
def thousand(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of 1,000 slides."""
    folder = tmp_path_factory.mktemp("thousand")
    add_slide(folder / "tiles", "S0", 400)
    add_picture(folder / "tiles", "S0", 0)
    for index in range(1, 1000):
        shutil.copy(
            folder / "tiles" / "thumbnails" / "S0.jpg",
            folder / "tiles" / "thumbnails" / f"S{index}.jpg",
        )
        if index % 100:
            shutil.copy(
                folder / "tiles" / "coords" / "S0.h5", folder / "tiles" / "coords" / f"S{index}.h5"
            )
        else:
            add_slide(folder / "tiles", f"S{index}", index, index)
    (folder / "tiles" / "coords" / "S7.h5").write_bytes(b"cut short")
    assert run(main, Config, [f"tiling={folder}/tiles", f"output={folder}/report"]) == 0
    return folder / "report" / "cohort.html"


def browse(page: Path, *options: str, view: str = "") -> str:
    """What Chromium makes of the page, its script having run."""
    chromium = (
        shutil.which("chromium")
        or shutil.which("chromium-browser")
        or shutil.which("google-chrome")
    )
    if not chromium:
        pytest.skip("chromium is not installed")
    profile = page.parent / "profile"
    command = [
        chromium,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        "--dump-dom",
    ]
    started = time.monotonic()
    done = subprocess.run(
        [*command, *options, f"file://{page}#{view}"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert time.monotonic() - started < 60
    return done.stdout


def dump(page: Path, view: str) -> tuple[list[str], list[str], str]:
    """(slides in the order of the table, those shown, what stands beside the filter)."""
    dom = browse(page, view=view)
    rows = re.findall(r'<tr data-slide="([^"]+)"([^>]*)>', dom)
    sorted_by = re.search(r'data-key="(\w+)"[^>]*aria-sort="(\w+)"', dom)
    assert sorted_by
    shown = [slide for slide, rest in rows if not re.search(r'\shidden=""', rest)]
    return [slide for slide, _ in rows], shown, " ".join(sorted_by.groups())


@pytest.mark.process
def test_a_thousand_slides_sort_and_filter_in_a_browser(thousand: Path) -> None:
    assert thousand.stat().st_size < 20e6
    order, shown, how = dump(thousand, "sort=-tiles")
    assert how == "tiles descending" and len(order) == len(shown) == 1000
    assert order[:6] == ["S900", "S800", "S700", "S600", "S500", "S0"] and order[-1] == "S7"
    order, shown, how = dump(thousand, "sort=slide&find=tile+again&status=failed")
    assert how == "slide ascending" and order[:3] == ["S0", "S1", "S2"] and order[-1] == "S999", (
        "numbers as numbers"
    )
    assert shown == ["S7"]


@pytest.mark.process
def test_wide_tables_scroll_and_the_page_does_not(tiling: Path, tmp_path: Path) -> None:
    features = []
    for index in range(8):
        folder = tmp_path / "features" / f"an_encoder_with_a_long_name_{index}"
        write_bag(folder / "h5_files" / "S0.h5", np.ones((1, 2), np.float32), [[0, 0]], {})
        features.append(str(folder))
    keys = [f"tiling={tiling}", f"output={tmp_path}/wide", f"features=[{','.join(features)}]"]
    assert run(main, Config, keys) == 0
    page = tmp_path / "wide" / "cohort.html"
    ask = "document.title = document.documentElement.scrollWidth - innerWidth"
    page.write_text(page.read_text().replace("</body>", f"<script>{ask}</script></body>"))
    title = re.search(r"<title>(-?\d+)</title>", browse(page, "--window-size=1200,900"))
    assert title and int(title[1]) <= 0


def test_thumbnails_are_small(tiling: Path) -> None:
    content = cohort_report.make_thumbnail(tiling, "S0")
    assert (
        content is not None
        and len(content) < 8000
        and cohort_report.make_thumbnail(tiling, "none") is None
    )
