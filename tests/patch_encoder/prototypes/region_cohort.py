"""A small cohort of regions with structure in it: tiles of three kinds, whose share differs from
zone to zone, and the same zones on every slide.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from patch_encoder import build_regions
from patch_encoder.bags.writer import write_bag
from wsi_common.cli import run

SIDE, GRID, WIDTH, ZONES = 16, 4, 8, 3
SIZES = (9,) * 6 + (6,) * 5  # regions of each slide; the small ones are ignored
MIXTURES = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
TINY = (
    "network.width=32", "network.depth=2", "network.heads=2", "network.drop_path=0.0",
    "network.out_dim=64", "network.hidden_dim=64", "network.bottleneck_dim=32",
    "views.local_number=2", "prototypes.start_epoch=1", "prototypes.clusters=2",
    "prototypes.min_regions=8", "batch_size=8", "device=cpu", "precision=fp32", "log_every=1",
    "objective.temperature=0.07", "objective.centre_momentum=0.5", "training.lr=0.05",
    "training.warmup=1", "training.teacher_momentum=0.9", "training.weight_decay_end=0.04",
)  # fmt: skip


def write_region_bags(
    folder: Path, sizes: Sequence[int] = SIZES, seed: int = 0, copies: bool = False
) -> None:
    """Write `bags/plain/h5_files/s<i>.h5`, `labels.csv` (one slide of every patient, but two of the last) and
    `zones.csv`.

    Args:
        folder: of all.
        sizes: regions of each slide, laid side by side in rows of three.
        seed: of the features.
        copies: all slides have the features of the first one.
    """
    zones = []
    kinds = 100 * np.eye(ZONES, WIDTH)
    for number, count in enumerate(sizes):
        rng = np.random.default_rng((seed, 0 if copies else number))
        corners, features = [], []
        for region in range(count):
            zone = region % ZONES
            column, row = (region % 3) * GRID, (region // 3) * GRID
            cells = np.stack(np.meshgrid(range(GRID), range(GRID)), -1).reshape(-1, 2)
            corners.append((cells + np.array([column, row])) * SIDE)
            drawn = kinds[rng.choice(ZONES, len(cells), p=MIXTURES[zone])]
            features.append(drawn + 15 * rng.standard_normal(drawn.shape))
            zones.append((f"s{number}", column * SIDE, row * SIDE, f"zone{zone}"))
        # a slide with no region at all has one tile, too few for any
        coords = np.concatenate(corners) if count else np.zeros((1, 2), np.int64)
        values = np.concatenate(features) if count else np.zeros((1, WIDTH))
        place = folder / "bags" / "plain" / "h5_files" / f"s{number}.h5"
        write_bag(place, values.astype(np.float16), coords, geometry(f"s{number}"))
    patients = [f"p{min(number, len(sizes) - 2)}" for number in range(len(sizes))]
    names = [(patients[number], f"s{number}", "ab"[number > 4]) for number in range(len(sizes))]
    write_table(folder / "labels.csv", ("case_id", "slide_id", "label"), names)
    write_table(folder / "zones.csv", ("slide_id", "x", "y", "label"), zones)


def geometry(name: str) -> dict[str, object]:
    size = {"patch_size": SIDE, "patch_size_level0": SIDE, "patch_level": 0, "target_size": SIDE}
    place = {"target_mpp": 0.5, "mpp": 0.5, "overlap": 0.0}
    return {"name": name, **size, **place, "level0_width": 1024, "level0_height": 1024}


def write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])


def write_region_cohort(folder: Path, sizes: Sequence[int] = SIZES, **options: object) -> list[str]:
    """The same with region files; arguments that name them, without an output."""
    write_region_bags(folder, sizes, **options)  # type: ignore[arg-type]
    made = [f"features={folder}/bags/plain", f"output={folder}/regions", f"region_tiles={GRID}"]
    more = ["min_fill=0.5", "form=materialised"]
    assert run(build_regions.main, build_regions.Config, [*made, *more]) == 0
    return [f"regions={folder}/regions/plain", f"labels={folder}/labels.csv"]


def region_inputs(folder: Path) -> list[str]:
    """A cohort and a tiny network, for the rows of the training scripts."""
    return [*write_region_cohort(folder), *TINY]
