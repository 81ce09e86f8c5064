"""The page of a real, tiny cohort: whole in itself, bounded, and one line for what is wrong."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patch_encoder import region_report
from patch_encoder.bags.writer import write_bag
from patch_encoder.region_page.sections import MOST_PROTOTYPES, TYPICAL
from patch_encoder.region_page.slide_pictures import paint_regions
from tests.html_pages import PageChecker
from tests.patch_encoder.regions.cohort import GEOMETRY
from wsi_common.cli import run
from wsi_common.figures import palette_colour

SIDE, ACROSS = 64, 6  # regions of 64 px, 6 x 6 of them on a slide of 384 px


def write_slide(root: Path, name: str, seed: int, shift: int) -> None:
    """A slide with bright, dark and grey bands of regions, and vectors that tell them apart."""
    rng = np.random.default_rng(seed)
    kinds = (np.arange(ACROSS**2) // ACROSS + shift) % 3
    levels = np.array([40, 130, 220])[kinds].reshape(ACROSS, ACROSS)
    pixels = np.kron(levels, np.ones((SIDE, SIDE), int))[..., None].repeat(3, 2)
    (root / "slides").mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(root / "slides" / f"{name}.png")
    vectors = np.eye(5)[kinds] + 0.02 * rng.normal(size=(len(kinds), 5))
    y, x = np.divmod(np.arange(ACROSS**2), ACROSS)
    geometry = GEOMETRY | {"name": name, "target_size": SIDE}
    write_bag(
        root / "features" / "slpd" / "h5_files" / f"{name}.h5",
        vectors.astype(np.float32),
        np.stack((x, y), 1) * SIDE,
        geometry,
        {"encoder": "slpd"},
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    for number in range(5):
        write_slide(folder, f"s{number}", number, number % 2)
    rows = [f"p{n},s{n},{('tumour <1>', 'normal')[n % 2]}\n" for n in range(5)]
    (folder / "labels.csv").write_text("case_id,slide_id,label\n" + "".join(rows))
    return folder


def make_page(root: Path, output: Path, *more: str, status: int = 0) -> str:
    given = [f"features={root}/features/slpd", f"slides={root}/slides", f"output={output}"]
    given += [f"labels={root}/labels.csv", "clusters=3", *more]
    assert run(region_report.main, region_report.Config, given) == status
    return (output / "regions.html").read_text() if status == 0 else ""


def test_page_is_self_contained_and_has_its_parts(root: Path, tmp_path: Path):
    html = make_page(root, tmp_path, "queries=2", "neighbours=2", "title=A & B")
    checker = PageChecker()
    checker.feed(html)
    assert checker.open == []
    assert not re.search(r"(src|href)=\"(?!data:)", html) and "<script" not in html
    assert "http" not in re.sub(r"data:[^\"]*", "", html) and "url(" not in html
    assert "A &amp; B" in html and "tumour &lt;1&gt;" in html and "<1>" not in html
    counts = {name.split(" ")[0]: 0 for name in checker.images}
    for name, uris in checker.images.items():
        counts[name.split(" ")[0]] += len(uris)
    # two queries with two neighbours: a card each and a region per prototype; then the gallery
    assert counts == {
        "regions": 2 * 3,
        "region": 2 * 3 * 3,
        "slide": 2,
        "prototypes": 2,
        "typical": 2 * 3 * TYPICAL,
    }
    assert html.count("by chance") == 1 and "cosine 1.000" in html
    again = make_page(root, tmp_path / "again", "queries=2", "neighbours=2", "title=A & B")
    assert html == again, "seeded"


def write_run(folder: Path, *lines: dict[str, float]) -> Path:
    folder.mkdir()
    (folder / "run.json").write_text('{"config": {"network.out_dim": 64}}')
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"epoch": 3, "lo')  # still being written
    return folder


def test_page_has_the_curves_that_the_run_has_logged(root: Path, tmp_path: Path):
    step = {"epoch": 1, "step": 0, "loss": 4.0, "intra": 1.0, "centre_entropy": 4.0}
    epochs = [{"epoch": n, "steps": 5 * n, "loss": 4.0 - n, "dino": 3.0} for n in (1, 2)]
    run_folder = write_run(tmp_path / "run", step, *epochs)
    html = make_page(root, tmp_path / "page", "show=[s0]", f"run={run_folder}")
    checker = PageChecker()
    checker.feed(html)
    assert {"Loss", "Entropy of the centre"} <= checker.images.keys()
    assert "Gradient norm" not in checker.images and "Learning rate" not in checker.images
    assert "Loss" not in make_page(root, tmp_path / "plain", "show=[s0]")


def test_curves_need_a_finished_epoch(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run_folder = write_run(tmp_path / "run", {"epoch": 1, "step": 0, "loss": 4.0})
    make_page(root, tmp_path / "page", f"run={run_folder}", status=2)
    assert "expected a run directory of pretrain_slpd with a finished epoch" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "page" / "regions.html").exists()


def test_matched_regions_are_of_one_kind(root: Path, tmp_path: Path):
    """Rows of the first query: its typical region and its partners' have one grey."""
    html = make_page(root, tmp_path, "show=[s0]", "neighbours=3")
    part = html[html.index("Slides like this one") : html.index("Prototypes of these slides")]
    crops = re.findall(r'<img src="([^"]*)" alt="region of (s\d)"', part)
    assert len(crops) == 3 * 4
    for row in range(3):
        greys = set()
        for uri, _ in crops[4 * row : 4 * row + 4]:
            content = base64.b64decode(uri.partition("base64,")[2])
            greys.add(round(float(np.asarray(Image.open(io.BytesIO(content))).mean()) / 30))
        assert len(greys) == 1, greys


def test_every_slide_has_its_neighbours_in_the_table(root: Path, tmp_path: Path):
    make_page(root, tmp_path, "show=[s3]", "neighbours=2")
    with (tmp_path / "neighbours.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["slide_id"] for row in rows] == [f"s{n}" for n in range(5) for _ in range(2)]
    assert all(row["neighbour"] != row["slide_id"] for row in rows)
    assert all(0.9 < float(row["similarity"]) <= 1 for row in rows)


def test_size_does_not_grow_with_cohort_or_prototypes(root: Path, tmp_path: Path):
    html = make_page(root, tmp_path, "clusters=9", "show=[s0]", "neighbours=1")
    assert html.count('class="key"') == 2 * MOST_PROTOTYPES
    assert "3 smaller prototypes are grey" in html
    two = make_page(root, tmp_path / "two", "queries=2", "neighbours=1")
    assert len(two) < 3e5


def test_what_cannot_be_drawn_is_said(root: Path, tmp_path: Path):
    slides = tmp_path / "slides"
    slides.mkdir()
    for name in ("s0", "s1"):
        (slides / f"{name}.png").write_bytes((root / "slides" / f"{name}.png").read_bytes())
    (slides / "s2.tiff").write_bytes(b"no slide")
    html = make_page(root, tmp_path / "page", f"slides={slides}", "neighbours=4", "show=[s0]")
    assert "Slide s3 is not drawn: no slide file of this id was found" in html
    assert "Slide s2 is not drawn:" in html and html.count("not readable") >= 2 * 4


def test_bags_that_cannot_be_used_are_one_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    make_page(root, tmp_path, "min_regions=99", status=2)
    assert "min_regions=99, clusters=3: expected slides of two" in capsys.readouterr().err
    labels = tmp_path / "other.csv"
    labels.write_text("case_id,slide_id,label\np,q,x\n")
    make_page(root, tmp_path, f"labels={labels}", status=2)
    assert "expected bags of slides in labels.csv, found none among 5" in capsys.readouterr().err


def test_regions_are_painted_at_their_place():
    overview = np.full((20, 40, 3), 255, np.uint8)
    corners = np.array([[0, 0], [200, 100]])
    painted = paint_regions(overview, 0.1, corners, 100, [palette_colour(0), palette_colour(1)])
    first, second = (
        np.array([int(palette_colour(n)[i : i + 2], 16) for i in (1, 3, 5)]) for n in (0, 1)
    )
    np.testing.assert_array_equal(painted[0, 0], first)  # its frame
    np.testing.assert_array_equal(painted[19, 29], second)
    np.testing.assert_allclose(painted[5, 5], 0.45 * first + 0.55 * 255, atol=1)
    assert (painted[:, 30:] == 255).all() and (painted[10:, :20] == 255).all()
    assert (overview == 255).all()
