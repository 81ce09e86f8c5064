"""Figures and overlays of a detector: what they draw, where labels go, and the cases without
boxes.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from detection_kd.datasets.coco import DetectionSet, ImageRecord
from detection_kd.evaluation.coco_metrics import RECALLS, Prediction
from detection_kd.evaluation.froc import RATES
from detection_kd.evaluation.operating_point import judge_set
from detection_kd.figures.detection import (
    draw_froc,
    draw_precision_recall,
    write_detection_figures,
)
from detection_kd.figures.overlays import (
    BAND,
    FALSE_COLOUR,
    GAP,
    HIT_COLOUR,
    MISS_COLOUR,
    NEITHER_COLOUR,
    _find_free_place,
    draw_overlay,
    write_overlays,
)
from wsi_common.errors import UserError

Colour = tuple[int, int, int]


def image(
    folder: Path, index: int, boxes: list[list[float]], labels: list[int], crowd: list[bool]
) -> ImageRecord:
    """A light grey 200 x 100 px image."""
    path = folder / f"{index}.png"
    Image.new("RGB", (200, 100), (220, 220, 220)).save(path)
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return ImageRecord(
        index, path, 200, 100, array, np.array(labels, np.int64), np.array(crowd, bool)
    )


def small_set(folder: Path, categories: int = 2) -> tuple[DetectionSet, list[Prediction]]:
    """A found lesion, a missed one and a crowd; a hit, a double, a false positive, and one below
    0.3. And an empty image.
    """
    boxes = [[20.0, 40.0, 50.0, 80.0], [80.0, 40.0, 110.0, 80.0], [140.0, 20.0, 190.0, 90.0]]
    records = [
        image(folder, 4, boxes, [0, 0, 0], [False, False, True]),
        image(folder, 9, [], [], []),
    ]
    detected = np.array([boxes[0], [22, 41, 52, 81], [60, 10, 75, 25], [5, 5, 15, 15]], np.float32)
    found = Prediction(0, detected, np.array([0.9, 0.8, 0.7, 0.2]), np.zeros(4, np.int64))
    return DetectionSet(records, [f"kind {k}" for k in range(categories)]), [found]


def panels(sheet: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the two panels, without headings and legend."""
    pixels = np.asarray(sheet)[BAND:-BAND]
    width = (sheet.width - 3 * GAP) // 2
    return pixels[:, GAP : GAP + width], pixels[:, 2 * GAP + width : 2 * GAP + 2 * width]


def has(pixels: np.ndarray, colour: Colour) -> bool:
    return bool((pixels == np.array(colour)).all(-1).any())


def test_overlay_has_annotation_left_and_predictions_right(tmp_path: Path) -> None:
    data, found = small_set(tmp_path)
    judged = judge_set(data, found, 0.3, 0.5)
    left, right = panels(draw_overlay(judged[0], data.categories, 0.3))
    assert left.shape == right.shape == (400, 800, 3)  # four times the image
    colours: list[Colour] = [HIT_COLOUR, FALSE_COLOUR, MISS_COLOUR, NEITHER_COLOUR]
    assert [has(left, colour) for colour in colours] == [True, False, True, True]
    assert [has(right, colour) for colour in colours] == [True, True, False, True]
    for panel, (x, y), colour in (
        (left, (80, 300), HIT_COLOUR),
        (right, (240, 80), FALSE_COLOUR),
        (right, (80, 300), HIT_COLOUR),
    ):
        assert has(
            panel[y - 2 : y + 3, x - 2 : x + 3], colour
        )  # the left side of the box lies there
    assert not has(right[10:70, 10:70], FALSE_COLOUR)  # what is below the score is not drawn
    dashes = (left[:, 320] == np.array(MISS_COLOUR)).all(-1)[170:310]
    whole = (left[:, 80] == np.array(HIT_COLOUR)).all(-1)[170:310]
    assert 0.3 < dashes.mean() < 0.7 and whole.all()


def test_overlay_of_an_image_without_boxes_and_without_detections(tmp_path: Path) -> None:
    data, found = small_set(tmp_path)
    empty = judge_set(data, found, 0.3, 0.5)[1]
    for panel in panels(draw_overlay(empty, data.categories, 0.3)):
        assert (panel == 220).all()


def test_labels_name_classes_only_where_there_are_several(tmp_path: Path) -> None:
    def ink(categories: int) -> tuple[int, int]:
        data, found = small_set(tmp_path, categories)
        sheet = draw_overlay(judge_set(data, found, 0.3, 0.5)[0], data.categories, 0.3)
        left, right = (
            int((panel == np.array(HIT_COLOUR)).all(-1).sum()) for panel in panels(sheet)
        )
        return left, right

    assert ink(2)[0] > ink(1)[0] and ink(2)[1] > ink(1)[1]


def test_labels_never_touch_and_stay_inside() -> None:
    rng = np.random.default_rng(0)
    taken: list[tuple[float, float, float, float]] = []
    for corner in rng.uniform(0, 280, (60, 2)):
        box = (float(corner[0]), float(corner[1]), float(corner[0]) + 20, float(corner[1]) + 20)
        place = _find_free_place(box, (40, 10), (300, 300), taken)
        if place is not None:
            taken.append(place)
    assert 20 < len(taken) < 60  # there is no room for all
    cover = np.zeros((300, 300), int)
    for x0, y0, x1, y1 in taken:
        assert (
            (x1 - x0, y1 - y0) == pytest.approx((46, 16)) and min(x0, y0) >= 0 and max(x1, y1) < 300
        )
        cover[round(y0) : round(y1), round(x0) : round(x1)] += 1
    assert cover.max() == 1
    assert _find_free_place((50.0, 100.0, 90.0, 140.0), (20, 10), (300, 300), []) == (
        50,
        84,
        76,
        100,
    )  # first choice: above


@pytest.mark.parametrize("size", [(20, 20), (3000, 2000), (40, 900), (1500, 60)])
def test_overlay_of_any_size_of_image(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / ("a name that is much too long for the line below the picture " * 3 + ".png")
    Image.new("RGB", size, (220, 220, 220)).save(path)
    record = ImageRecord(
        1, path, *size, np.array([[0, 0, *size]], np.float32), np.array([0]), np.array([False])
    )
    sheet = draw_overlay(judge_set(DetectionSet([record], ["x"]), [], 0.3, 0.5)[0], ["x"], 0.3)
    assert 800 < sheet.width <= 2048 and sheet.height <= 1068
    assert has(panels(sheet)[0], MISS_COLOUR)
    legend = np.asarray(sheet)[-BAND:]
    assert all(
        has(legend, colour) for colour in (HIT_COLOUR, FALSE_COLOUR, MISS_COLOUR, NEITHER_COLOUR)
    )


def test_an_image_id_stays_in_its_folder(tmp_path: Path) -> None:
    data, found = small_set(tmp_path)
    judged = judge_set(data, found, 0.3, 0.5)[:1]
    judged[0].record.id = "../x"  # type: ignore[assignment]
    with pytest.raises(UserError, match="image id '../x'"):
        write_overlays(tmp_path / "overlays", judged, data.categories, 0.3)
    assert not list(tmp_path.glob("*.jpg"))


def test_precision_recall_figure_draws_every_category_and_their_mean() -> None:
    falling = np.where(RECALLS <= 0.5, 1 - RECALLS, 0.0)
    names = ["a", "_b", "$c$"]
    curves = {
        overlap: {name: falling * factor for name in names}
        for overlap, factor in ((0.5, 1.0), (0.75, 0.5))
    }
    figure = draw_precision_recall(curves)
    first, second = figure.axes
    assert (first.get_title(), second.get_title()) == ("IoU 0.5", "IoU 0.75")
    assert len(first.lines) == len(second.lines) == 4
    recall, precision = first.lines[-1].get_data()
    assert np.allclose(precision[:-1], 1 - RECALLS[:51]) and (recall[-1], precision[-1]) == (0.5, 0)
    assert second.lines[0].get_ydata()[0] == 0.5
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    mean = f"{falling.mean():.3f}  {falling.mean() / 2:.3f}   "
    assert texts == [mean + name for name in ("mean of all", "a", "_b", r"\$c\$")]
    for axes in figure.axes:
        assert axes.get_xlim()[0] == axes.get_ylim()[0] == 0 and 1 <= axes.get_xlim()[1] < 1.05
    alone = draw_precision_recall({0.5: {"a": falling}})
    assert len(alone.axes[0].lines) == 1 and len(alone.legends[0].get_texts()) == 1


def test_many_categories_get_lines_that_differ() -> None:
    curves = {0.5: {f"category {number}": np.linspace(1, 0, 101) for number in range(24)}}
    lines = draw_precision_recall(curves).axes[0].lines[:-1]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 24


def test_froc_marks_the_six_rates() -> None:
    rate, sensitivity = (
        np.array([0, 0.1, 0.3, 3.0, 3.0, 20.0]),
        np.array([0, 0.2, 0.4, 0.5, 0.6, 0.9]),
    )
    axes = draw_froc(rate, sensitivity, 0.5).axes[0]
    curve, onward, dots = axes.lines
    assert dots.get_xdata().tolist() == list(RATES)
    assert dots.get_ydata().tolist() == [0.2, 0.4, 0.4, 0.4, 0.6, 0.6]
    assert [text.get_text() for text in axes.texts] == [
        "0.20",
        "0.40",
        "0.40",
        "0.40",
        "0.60",
        "0.60",
    ]
    assert axes.get_xscale() == "log" and axes.get_xticks().tolist() == list(RATES)
    assert axes.get_title().startswith("FROC 0.433")
    x, y = curve.get_data()
    assert (
        x[0] == 0.125
        and y[0] == 0.2
        and (np.diff(x) >= 0).all()
        and (np.diff(y) >= 0).all()
        and y[-1] == 0.6
    )
    assert onward.get_linestyle() == "-" and onward.get_xdata()[-1] == 16
    short = draw_froc(rate[:3], sensitivity[:3], 0.5).axes[0]
    assert short.lines[1].get_linestyle() == ":" and short.lines[1].get_ydata().tolist() == [
        0.4,
        0.4,
    ]


@pytest.mark.parametrize("nothing", [False, True], ids=["detections", "none"])
def test_pictures_are_written_whole_and_leave_no_state(tmp_path: Path, nothing: bool) -> None:
    data, found = small_set(tmp_path)
    before = dict(matplotlib.rcParams)
    (tmp_path / "out" / "overlays").mkdir(parents=True)
    (tmp_path / "out" / "overlays" / "77.jpg").write_bytes(b"of another run")
    write_detection_figures(tmp_path / "out", data, [] if nothing else found)
    assert dict(matplotlib.rcParams) == before
    files = sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")
    )
    curves = ["confusion.png", "froc.png", "precision_recall.png"]
    assert files == sorted([*curves, "overlays/4.jpg", "overlays/9.jpg"])
    for name in files:
        with Image.open(tmp_path / "out" / name) as picture:
            picture.load()
    with Image.open(tmp_path / "out" / "froc.png") as picture:
        assert picture.size == (810, 585)
    first = (tmp_path / "out" / "precision_recall.png").read_bytes()
    write_detection_figures(tmp_path / "out", data, [] if nothing else found, overlays=1)
    assert (tmp_path / "out" / "precision_recall.png").read_bytes() == first
    assert [path.name for path in (tmp_path / "out" / "overlays").iterdir()] == [
        "4.jpg"
    ]  # the one with errors
