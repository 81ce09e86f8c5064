"""Feature bags of slides whose tiles lie on a grid with holes, and regions built from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from patch_encoder import build_regions
from patch_encoder.bags.writer import write_bag
from wsi_common.cli import run

STEP = 64
GEOMETRY = {
    "patch_size": STEP,
    "patch_size_level0": STEP,
    "patch_level": 0,
    "target_size": STEP,
    "target_mpp": 0.5,
    "mpp": 0.5,
    "overlap": 0.0,
    "level0_width": 4000,
    "level0_height": 4000,
}


def make_corners(width: int, height: int, keep: float, seed: int, step: int = STEP) -> np.ndarray:
    """Corners of a random share of a grid of tiles that does not start at 0, in raster order."""
    rng = np.random.default_rng(seed)
    y, x = np.nonzero(rng.random((height, width)) < keep)
    return np.stack((x, y), 1) * step + (130, 70)


def write_slide(
    folder: Path,
    slide_id: str,
    corners: np.ndarray,
    width: int = 12,
    seed: int = 0,
    dtype: str = "float16",
    **geometry: object,
) -> np.ndarray:
    """A bag of random features with an offset of the slide's own; its features."""
    rng = np.random.default_rng(seed)
    features = (rng.normal(size=(len(corners), width)) + 3 * rng.normal(size=width)).astype(dtype)
    path = folder / "tiny" / "h5_files" / f"{slide_id}.h5"
    attributes = GEOMETRY | {"name": slide_id} | geometry
    write_bag(path, features, corners, attributes, {"encoder": "tiny"})
    return features


def write_cohort(folder: Path, slides: int = 3, **options: object) -> dict[str, np.ndarray]:
    """Bags of `slides` slides of different sizes; the features of each."""
    return {
        f"S{number}": write_slide(
            folder,
            f"S{number}",
            make_corners(9 + 2 * number, 7 + number, 0.7, number),
            seed=number,
            **options,
        )
        for number in range(slides)
    }


def build(root: Path, *keys: str, output: str = "regions") -> int:
    """Run build_regions on the cohort below `root`; its exit status."""
    arguments = [f"features={root}/features/tiny", f"output={root}/{output}", *keys]
    return run(build_regions.main, build_regions.Config, arguments)
