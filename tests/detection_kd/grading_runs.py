"""A set of graded patches that a network learns in seconds, and the arguments of its trainings."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from detection_kd.train_resolution_kd import Config, main
from wsi_common.config import load_config

SIDE, GRADES = 32, ("low", "middle", "high")
SPLIT = ("train",) * 9 + ("test",) * 3
TINY = (
    "network.trunk=small",
    "network.init=random",
    "network.norm=layer",
    f"tile_size={SIDE}",
    "target_mpp=1",
    "augmentation.stain=0",
    "epochs=4",
    "batch_size=6",
    "lr=0.002",
    "device=cpu",
    "precision=fp32",
    "workers=0",
    "log_every=2",
)


def draw_patch(rng: np.random.Generator, grade: int) -> np.ndarray:
    """Pink, with dark dots that are the larger the higher the grade, uint8 (SIDE, SIDE, 3)."""
    pixels = 200 + rng.normal(0, 10, (SIDE, SIDE, 3)) + np.array([20, -20, 10])
    rows, columns = np.mgrid[:SIDE, :SIDE]
    for x, y in rng.uniform(2, SIDE - 2, (8, 2)):
        pixels[np.hypot(columns - x, rows - y) < 1.5 + 2.5 * grade] = (70, 40, 110)
    return pixels.clip(0, 255).astype(np.uint8)


def write_graded_set(folder: Path, per_grade: int = 3) -> list[str]:
    """Twelve slides with patches of every grade; the arguments that name them."""
    rng, rows = np.random.default_rng(0), []
    for slide, split in enumerate(SPLIT):
        for number in range(per_grade * len(GRADES)):
            grade = number % len(GRADES)
            name = f"slide{slide}/{number}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw_patch(rng, grade)).save(folder / name)
            rows.append([name, GRADES[grade], f"slide{slide}", split])
    with (folder / "patches.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([["image", "label", "group", "split"], *rows])
    source = f"data.source={folder}/patches.csv"
    return [source, f"data.grades=[{','.join(GRADES)}]", "data.folds=3"]


def write_ungraded(folder: Path, count: int = 7) -> str:
    """Pictures of all grades below a folder, which do not say which; the argument that names it."""
    rng = np.random.default_rng(1)
    for number in range(count):
        path = folder / f"slide{number % 2}" / f"further{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_patch(rng, number % len(GRADES))).save(path)
    return f"data.ungraded={folder}"


def train(inputs: list[str], output: Path, *settings: str) -> Path:
    """A finished training in this process."""
    given = [*inputs, *TINY, *settings, f"output={output}"]
    assert main(load_config(Config, given)) == 0
    return output


def configure(inputs: list[str], *settings: str) -> Config:
    """The configuration of a training that is not started."""
    return load_config(Config, [*inputs, *TINY, "output=unused", *settings])
