"""Seconds and peak memory of tiling one rendered slide, with and without a pyramid, by method;
tiles measured a second.

    python -m benchmarks.tile_slide --side 20000 --folder runs/tile_slide

The slide is a rendered smear on glass, repeated in mirrored pieces, as a JPEG-compressed tiled
TIFF. Each run is a child process, so that its peak memory is its own. Nothing is compared: the
numbers are of the machine that prints them.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import tifffile

from benchmarks.rounds import make_parser
from patch_encoder.demo.cytology.smear import draw_smear, plan_smear
from patch_encoder.tiles.coordinates import read_coordinates

PIECE, TILE = 2048, 512
RUNS = {
    "hsv_otsu": ["method=hsv_otsu"],
    "clam": ["method=clam", "tissue.clam.preset=bwh_biopsy"],
    "cytology": ["method=cytology", "tissue.mpp=4", "tissue.min_area=300"],
    "every tile": ["method=none"],
    "every tile, measured": ["method=none", "quality=true"],
}


def pieces(smear: np.ndarray, side: int, factor: int) -> Iterator[np.ndarray]:
    """TIFF tiles of a level, row by row: a disc of mirrored smears on glass."""
    small = cv2.resize(smear, (PIECE // factor, PIECE // factor), interpolation=cv2.INTER_AREA)
    views = [
        np.ascontiguousarray(v) for v in (small, small[::-1], small[:, ::-1], small[::-1, ::-1])
    ]
    glass, count = np.full((TILE, TILE, 3), smear.max((0, 1)), dtype=np.uint8), len(small)
    for top in range(0, side // factor, TILE):
        for left in range(0, side // factor, TILE):
            if (
                np.hypot(top + TILE / 2 - side / factor / 2, left + TILE / 2 - side / factor / 2)
                > 0.42 * side / factor
            ):
                yield glass
                continue
            view = views[(top // count % 2) * 2 + left // count % 2]
            rows, cols = np.arange(top, top + TILE) % count, np.arange(left, left + TILE) % count
            yield view[rows][:, cols]


def render(path: Path, side: int, factors: tuple[int, ...]) -> Path:
    """Render a slide of side x side px at 0.25 um per pixel, unless it is there."""
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    smear, _ = draw_smear(plan_smear((1,), PIECE, (40.0, 75.0), 0.1))
    with tifffile.TiffWriter(path, bigtiff=side > 40000) as writer:
        for factor in factors:
            writer.write(
                pieces(smear, side, factor),
                shape=(side // factor, side // factor, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                compression="jpeg",
                photometric="rgb",
                subfiletype=int(factor > 1),
                resolution=(4e4 / factor, 4e4 / factor),
                resolutionunit="CENTIMETER",
            )
    return path


def measure(slides: Path, output: Path, keys: list[str]) -> tuple[float, float]:
    """(seconds, peak MiB) of tile_slides as a child process."""
    arguments = [
        f"slides={slides}",
        f"output={output}",
        "target_mpp=0.5",
        "overwrite=true",
        "workers=1",
        *keys,
    ]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "patch_encoder.tile_slides", *arguments], stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(
            f"tile_slides {' '.join(arguments)} ended with {os.waitstatus_to_exitcode(status)}"
        )
    return time.perf_counter() - started, usage.ru_maxrss / 1024


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--side", type=int, default=20000, help="px of level 0")
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/tile_slide"),
        help="gets the slides and their tiles",
    )
    arguments = parser.parse_args()
    print(
        f"{arguments.side} x {arguments.side} px, one process, {os.cpu_count()} cores, load "
        f"{os.getloadavg()[0]:.1f}"
    )
    print(f"{'levels':10}{'method':22}{'seconds':>9}{'peak MiB':>10}{'tiles':>8}{'tiles/s':>9}")
    for name, factors in (("pyramid", (1, 4, 16)), ("one", (1,))):
        render(arguments.folder / name / "slide.tiff", arguments.side, factors)
        plain = 0.0
        for label, keys in RUNS.items():
            output = arguments.folder / f"tiles_{name}_{label.replace(', ', '_')}"
            seconds, peak = measure(arguments.folder / name, output, keys)
            tiles = len(read_coordinates(output / "coords" / "slide.h5").coords)
            plain = seconds if label == "every tile" else plain
            rate = f"{tiles / max(seconds - plain, 1e-9):9.0f}" if "quality=true" in keys else ""
            print(f"{name:10}{label:22}{seconds:9.1f}{peak:10.0f}{tiles:8}{rate}", flush=True)


if __name__ == "__main__":
    main()
