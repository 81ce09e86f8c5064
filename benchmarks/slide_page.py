"""How soon a large slide's page is whole in a browser, how fluid it stays, and how fast pyramids
are written, beside OpenSlide's own Deep Zoom generator.

    python -m benchmarks.slide_page --side 100000 --folder runs/slide_page
    python -m benchmarks.slide_page --part tiles --side 12000

The slide is a rendered smear on glass, repeated in mirrored pieces, as a JPEG-compressed tiled TIFF
with levels of 1/4 and 1/16. Its page has a tissue outline, scored tiles of 256 px and 5,000
detections. `--fine 10` gives an outline of the middle 10 % and keeps the rest four times coarser
(only_tissue=true), which is sixteen times less to write and the same page to open.
`page` opens it from the disk in a headless Chromium, a new one each time, after the overview:
milliseconds from the request until all tiles of the first view are there and the layers are drawn,
processor seconds of all processes of the browser for that, and milliseconds of one frame while the
view moves. `tiles` writes a pyramid with one process and, taking turns, with the loop of
OpenSlide's example (DeepZoomGenerator, same tile size and quality); processor seconds, so that
other work on the machine counts less.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Iterable, Iterator
from hashlib import sha1
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import tifffile
from openslide.deepzoom import DeepZoomGenerator

from benchmarks.chromium import Chromium, find_chromium
from benchmarks.rounds import make_parser, say
from benchmarks.tile_slide import PIECE, TILE, pieces
from patch_encoder.demo.cytology.smear import draw_smear, plan_smear
from patch_encoder.slide_page import Config
from patch_encoder.slide_page import main as make_pages
from patch_encoder.tissue.geojson import write_geojson
from patch_encoder.tissue.outlines import Outline
from wsi_common.files import write_csv, write_json

MPP, SCORED, QUALITY = 0.25, 256, 80
# milliseconds of drawing a frame, each a little further on
FRAMES = """
(async () => {
  const times = [];
  for (let i = 0; i < 40; i++) {
    viewer.viewport.panBy(new OpenSeadragon.Point(.001, .0005), true);
    const start = performance.now(); draw(); times.push(performance.now() - start);
    await new Promise(requestAnimationFrame);
  }
  return times;
})()
"""


def encode(tiles: Iterable[np.ndarray]) -> Iterator[bytes]:
    """Tiles as JPEG, each different one encoded once."""
    known: dict[bytes, bytes] = {}
    for tile in tiles:
        key = sha1(tile.tobytes()).digest()
        if key not in known:
            known[key] = imagecodecs.jpeg8_encode(
                np.ascontiguousarray(tile), level=85, colorspace="RGB", outcolorspace="RGB"
            )
        yield known[key]


def render(path: Path, side: int) -> Path:
    """Render a slide of side x side px, unless it is there."""
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    smear, _ = draw_smear(plan_smear((1,), PIECE, (40.0, 75.0), 0.1))
    temporary = path.with_suffix(".part")
    with tifffile.TiffWriter(temporary, bigtiff=side > 40000) as writer:
        for factor in (1, 4, 16):
            writer.write(
                encode(pieces(smear, side, factor)),
                shape=(side // factor, side // factor, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                compression="jpeg",
                photometric="rgb",
                subfiletype=int(factor > 1),
                resolution=(1e4 / MPP / factor, 1e4 / MPP / factor),
                resolutionunit="CENTIMETER",
            )
    return temporary.rename(path)


def write_results(root: Path, side: int, detections: int, fine: float) -> dict[str, str]:
    """Results on the slide as the stages leave them; returns the keys of the page.

    Args:
        root: gets the results.
        side: of the slide, px.
        detections: number of them.
        fine: share of the slide's radius that the outline has.
    """
    rng, middle, radius = np.random.default_rng(0), side / 2, 0.42 * side
    angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    ring = middle + fine * radius * np.stack([np.cos(angles), np.sin(angles)], 1)
    write_geojson(root / "outlines" / "slide.geojson", [Outline(ring)], MPP, (0, 0))
    features = []
    for x, y, size, score in zip(
        *(middle + rng.normal(0, radius / 3, (2, detections))),
        rng.uniform(60, 200, detections),
        rng.random(detections),
    ):
        square = [[x, y], [x + size, y], [x + size, y + size], [x, y + size], [x, y]]
        properties = {
            "objectType": "detection",
            "classification": {"name": ("lesion", "other")[int(score * 2)]},
            "measurements": {"score": round(score, 4)},
        }
        geometry = {"type": "Polygon", "coordinates": [square]}
        features.append({"type": "Feature", "geometry": geometry, "properties": properties})
    shapes = {"type": "FeatureCollection", "features": features}
    write_json(root / "detections" / "slide.geojson", shapes)
    corners = np.stack(np.meshgrid(*[np.arange(0, side - SCORED, SCORED)] * 2), -1).reshape(-1, 2)
    corners = corners[np.hypot(*(corners - middle).T) < radius]
    scores = rng.random(len(corners))
    columns = ("tile", "x", "y", "attention", "percentile")
    ranks = 100 * scores.argsort().argsort() / len(scores)
    rows = zip(range(len(scores)), *corners.T.tolist(), scores.tolist(), ranks.tolist())
    table = (dict(zip(columns, row, strict=True)) for row in rows)
    write_csv(root / "heat" / "scores" / "slide.csv", columns, table)
    record = {"width": side, "height": side, "side": SCORED, "shown": "attention"}
    write_json(root / "heat" / "records" / "slide.json", record)
    say(f"{len(scores):,} scored tiles, {detections:,} detections")
    return {name: str(root / name) for name in ("outlines", "detections", "heat")}


def open_page(page: Path, times: int) -> list[tuple[float, float, list[float]]]:
    """(ms until the page is whole, processor seconds until then, ms of each frame) of several
    browsers, one after the other.
    """
    program = find_chromium()
    if program is None:
        raise SystemExit("expected Chromium, found none; install it to open the page")
    found = []
    for _ in range(times):
        with Chromium(program, timeout=240) as browser:
            browser.open(page.parents[1] / "index.html")  # a browser that runs, as a reader's does
            browser.wait_for("document.readyState === 'complete'")
            time.sleep(1)
            start = browser.cpu_seconds()
            browser.open(page)
            ready = browser.wait_for("document.documentElement.dataset.ready")
            used = browser.cpu_seconds() - start
            lost = browser.evaluate("document.documentElement.dataset.failed")
            assert lost == "0" and not browser.problems(), browser.problems()
            found.append((float(ready), used, browser.evaluate(FRAMES)))
    return found


def measure_page(
    folder: Path, side: int, workers: int, times: int, detections: int, fine: float
) -> None:
    """Make the page of a large slide and open it."""
    slide = render(folder / f"slide_{side}" / "slide.tiff", side)
    say(f"{slide}: {slide.stat().st_size / 1e6:.0f} MB")
    keys = write_results(folder / f"results_{side}", side, detections, fine)
    output = folder / f"pages_{side}"
    start = time.perf_counter()
    config = Config(
        slides=str(slide), output=str(output), workers=workers, only_tissue=fine < 1, **keys
    )
    assert make_pages(config) == 0
    seconds = time.perf_counter() - start
    record = json.loads((output / "tiles" / "slide.json").read_text())
    say(f"{record['tiles']:,} tiles, {seconds:.0f} s with {workers} processes (0: were there)")
    found = open_page(output / "slides" / "slide.html", times)
    for ready, used, frames in found:
        print(
            f"first whole view {ready:.0f} ms, {used:.2f} processor seconds, "
            f"a frame of all layers {statistics.median(frames):.1f} ms"
        )


def write_with_generator(slide: Path, output: Path) -> int:
    """The loop of OpenSlide's deepzoom_tile.py in one process: number of tiles."""
    count = 0
    with openslide.OpenSlide(slide) as handle:
        generator = DeepZoomGenerator(handle, TILE, 0)
        for level, (columns, rows) in enumerate(generator.level_tiles):
            folder = output / str(level)
            folder.mkdir(parents=True)
            for row in range(rows):
                for column in range(columns):
                    tile = generator.get_tile(level, (column, row))
                    tile.save(folder / f"{column}_{row}.jpg", quality=QUALITY)
                    count += 1
    return count


def write_with_ours(slide: Path, output: Path) -> int:
    """The same by the stage, in this process: number of tiles that the pyramid stands for."""
    assert make_pages(Config(slides=str(slide), output=str(output), workers=0)) == 0
    with openslide.OpenSlide(slide) as handle:
        return DeepZoomGenerator(handle, TILE, 0).tile_count


def measure_tiles(folder: Path, side: int, rounds: int) -> None:
    """Write pyramids in turns; prints tiles per processor second."""
    slide = render(folder / f"slide_{side}" / "slide.tiff", side)
    rates: dict[str, list[float]] = {}
    for number in range(rounds):
        for name, write in (("DeepZoomGenerator", write_with_generator), ("ours", write_with_ours)):
            output = folder / "written"
            shutil.rmtree(output, ignore_errors=True)
            start = time.process_time()
            count = write(slide, output)
            rates.setdefault(name, []).append(count / (time.process_time() - start))
            say(f"round {number + 1}: {name}: {rates[name][-1]:.1f} tiles per processor second")
    ratios = [ours / theirs for ours, theirs in zip(rates["ours"], rates["DeepZoomGenerator"])]
    for name, found in rates.items():
        print(f"{name:20}{statistics.median(found):8.1f} tiles per processor second")
    print(f"ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


def main() -> None:
    parser = make_parser(__doc__, side=100000, workers=2, times=3, detections=5000, fine=100)
    parser.add_argument("--part", choices=("page", "tiles"), default="page")
    parser.add_argument("--folder", type=Path, default=Path("runs/slide_page"))
    arguments = parser.parse_args()
    if arguments.part == "tiles":
        measure_tiles(arguments.folder, arguments.side, arguments.times)
    else:
        measure_page(
            *(arguments.folder, arguments.side, arguments.workers),
            *(arguments.times, arguments.detections, arguments.fine / 100),
        )


if __name__ == "__main__":
    main()
