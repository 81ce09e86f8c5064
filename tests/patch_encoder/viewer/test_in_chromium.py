"""The pages in a real browser, from the disk: tiles come, layers are drawn where they belong, and
keys, pointer and addresses work.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.chromium import Chromium, find_chromium
from patch_encoder.slide_page import Config, main
from tests.helpers import draw_slide
from tests.patch_encoder.viewer.results import BOXES, FIGURES, SIDE, SLIDE_IDS, write_results

pytestmark = pytest.mark.process
WINDOW = (1200, 800)
READY = "document.documentElement.dataset.ready"


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pages of two slides with every layer, made once."""
    root = tmp_path_factory.mktemp("pages")
    keys = write_results(root)
    assert main(Config(**keys, output=str(root / "out"), workers=0, title="Looked at")) == 0
    return root / "out"


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium is installed: pages cannot be opened")
    with Chromium(program, WINDOW, timeout=240) as chromium:
        yield chromium


def open_page(browser: Chromium, pages: Path, slide_id: str = "S1", fragment: str = "") -> None:
    browser.open(pages / "slides" / f"{slide_id}.html", fragment)
    browser.wait_for(READY)


def take_picture(browser: Chromium) -> np.ndarray:
    """The window as it is once the layers are drawn, (h, w, 3)."""
    browser.evaluate(
        "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )
    return np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"), dtype=int)


def find_pixel(browser: Chromium, x: float, y: float) -> tuple[int, int]:
    """(column, row) of a place of the slide, level-0 px, in the window."""
    found = browser.evaluate(f"(v => [v.x + v.scale * {x}, v.y + v.scale * {y}])(place())")
    return round(found[0]), round(found[1])


def colour_at(picture: np.ndarray, place: tuple[int, int]) -> np.ndarray:
    """Mean colour of 5 x 5 px around a place."""
    column, row = place
    return picture[row - 2 : row + 3, column - 2 : column + 3].mean((0, 1))


def show_only(browser: Chromium, *layers: str) -> None:
    browser.evaluate(f"layers.forEach(layer => layer.set({list(layers)}.includes(layer.id)))")


@pytest.mark.parametrize("slide_id", SLIDE_IDS)
def test_tiles_come_from_the_disk_and_show_the_slide(
    browser: Chromium, pages: Path, slide_id: str
) -> None:
    """Also where the name of the slide has to be escaped in addresses."""
    open_page(browser, pages, slide_id, "layers=")
    assert browser.evaluate("document.documentElement.dataset.failed") == "0"
    assert int(browser.evaluate("document.documentElement.dataset.tiles")) >= 4
    assert browser.problems() == []
    picture, slide = take_picture(browser), draw_slide(SIDE)
    for x, y in ((390, 390), (910, 780), (390, 1100), (100, 100), (760, 160)):
        expected = slide[y - 10 : y + 10, x - 10 : x + 10].mean((0, 1))
        found = colour_at(picture, find_pixel(browser, x, y))
        np.testing.assert_allclose(found, expected, atol=8, err_msg=f"at {x}, {y}")


def test_every_layer_is_drawn_where_it_belongs(browser: Chromium, pages: Path) -> None:
    """Against the same view without layers: what a layer covers changes, and nothing else."""
    view = f"x={SIDE // 2}&y={SIDE // 2}&side={SIDE}"
    open_page(browser, pages, "S1", f"{view}&layers=")
    plain = take_picture(browser)
    places = {
        "outlines": (100, 400),
        "detections": ((BOXES[0, 0]), (BOXES[0, 1] + BOXES[0, 3]) / 2),
        "mitoses": (FIGURES[0, 0], FIGURES[0, 1]),
        "heat": (1150, 1150),
        "grade_maps": (1150, 50),
    }
    nowhere = [(600, 900), (60, 60), (1050, 400)]
    for layer in places:
        show_only(browser, layer)
        changed = np.abs(take_picture(browser) - plain).sum(2) > 60
        for name, (x, y) in places.items():
            column, row = find_pixel(browser, float(x), float(y))
            # a mark of a mitosis is a ring around it
            near = changed[row - 12 : row + 13, column - 12 : column + 13].any()
            assert near == (name == layer), f"{layer} at the place of {name}"
        for x, y in nowhere:
            column, row = find_pixel(browser, x, y)
            assert not changed[row - 3 : row + 4, column - 3 : column + 4].any(), layer


def test_heat_has_the_colours_of_its_scores(browser: Chromium, pages: Path) -> None:
    """The highest tile is the yellow end of viridis, the lowest one the violet end."""
    open_page(browser, pages, "S1", "x=650&y=650&side=1300&layers=heat")
    browser.evaluate("layers.find(l => l.id === 'heat').opacity = 1, redraw()")
    picture = take_picture(browser)
    for place, colour in (((1150, 1150), (253, 231, 37)), ((750, 750), (70, 8, 91))):
        found = colour_at(picture, find_pixel(browser, *place))
        np.testing.assert_allclose(found, colour, atol=12)


def test_pointer_tells_scores(browser: Chromium, pages: Path) -> None:
    open_page(
        browser, pages, "S1", "x=650&y=650&side=1300&layers=heat.detections.mitoses.grade_maps"
    )
    browser.evaluate(
        "layers.find(l => l.id === 'heat').on || layers.find(l => l.id === 'heat').set(true)"
    )
    said = {}
    places = {"box": (320, 360), "figure": FIGURES[0], "tile": (1150, 1150), "grade": (1150, 50)}
    places["glass"] = (60, 60)
    for name, place in places.items():
        browser.point(*find_pixel(browser, *map(float, place)))
        said[name] = browser.evaluate("document.getElementById('tip').textContent")
    assert said["box"] == "lesion\nscore 0.9"
    assert said["figure"].startswith("mitotic figure\nscore 0.8")
    assert said["tile"].split("\n")[1] == "percentile 100"
    assert "G3" in said["grade"] and "Area mm^2" in said["grade"]
    assert said["glass"] == ""


def test_keys_do_what_the_pointer_does(browser: Chromium, pages: Path) -> None:
    open_page(browser, pages)
    shown = "layers.map(layer => layer.on ? layer.id : '').join(' ').trim()"
    assert browser.evaluate(shown) == "grade_maps  outlines detections mitoses"
    browser.press("4")
    assert browser.evaluate(shown) == "grade_maps  outlines  mitoses"
    assert not browser.evaluate("document.querySelector('#layer-detections input').checked")
    browser.press("4")
    browser.press("n")
    assert browser.evaluate("document.getElementById('finding').textContent").startswith(
        "1 of 4: lesion, score 0.9"
    )
    middle = "(c => [c.x, c.y].map(v => Math.round(v * SLIDE.width)))(viewer.viewport.getCenter())"
    assert browser.evaluate(middle) == [320, 360]
    browser.press("p")
    assert browser.evaluate("document.getElementById('finding').textContent").startswith("4 of 4")
    before = browser.evaluate("viewer.viewport.getZoom()")
    browser.press("+")
    assert browser.evaluate("viewer.viewport.getZoom()") > before
    browser.press("ArrowRight")
    assert browser.evaluate(middle)[0] > FIGURES[1][0]
    browser.press("0")
    assert browser.evaluate("viewer.viewport.getZoom() === viewer.viewport.getHomeZoom()")


def test_score_and_class_filters_hide_marks(browser: Chromium, pages: Path) -> None:
    open_page(browser, pages)
    count = "document.querySelector('#layer-detections > span').textContent"
    assert browser.evaluate(count) == "2 found"
    slide = "(i => {{ i.value = {}; i.oninput(); }})([...document.querySelectorAll('#layer-detections input[type=range]')][1])"
    browser.evaluate(slide.format(50))
    assert browser.evaluate(count) == "1 of 2"
    browser.evaluate(slide.format(0))
    browser.evaluate("document.querySelectorAll('#layer-detections .classes input')[0].click()")
    assert browser.evaluate(count) == "1 of 2"


def test_scale_bar_is_as_long_as_it_says(browser: Chromium, pages: Path) -> None:
    open_page(browser, pages, "S1", "x=650&y=650&side=1300")
    text, width = browser.evaluate(
        "[$('scale').textContent, $('scale').querySelector('i').getBoundingClientRect().width]"
    )
    scale = browser.evaluate("place().scale")  # CSS px per level-0 px
    assert text == "100 µm" and width == pytest.approx(100 / 0.5 * scale, abs=1)


def test_the_overview_leads_to_the_pages(browser: Chromium, pages: Path) -> None:
    browser.open(pages / "index.html")
    browser.wait_for("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
    assert browser.problems() == []
    heads = browser.evaluate("[...document.querySelectorAll('th')].map(h => h.textContent)")
    assert heads[1:6] == ["slide", "case", "label", "predicted", "p(tumour)"]
    assert {"mitoses", "per_mm2", "detections"} <= set(heads)
    names = "[...document.querySelectorAll('tbody tr:not([hidden]) .name')].map(n => n.textContent)"
    assert browser.evaluate(names) == ["S1", "S2 odd #1 50%"]
    browser.evaluate("document.querySelectorAll('th button')[0].click()")
    assert browser.evaluate(names) == ["S1", "S2 odd #1 50%"][::-1]
    browser.evaluate("(f => { f.value = 'odd'; f.oninput(); })(document.getElementById('find'))")
    assert browser.evaluate(names) == ["S2 odd #1 50%"]
    browser.evaluate("document.querySelector('tbody tr:not([hidden]) .name a').click()")
    browser.wait_for(f"typeof SLIDE === 'object' && {READY}")
    assert browser.evaluate("document.querySelector('h1').textContent") == "S2 odd #1 50%"
