"""A field of 2 mm2 and more: from its file to the mitotic count, GeoJSON and JSON of MIDOG.

    python benchmarks/mitosis_fields.py [--images ../shared/data/mitosis_fields/images]
    [--threads 2 --copies 2 --trunk resnet18]

Runs `detect_mitosis` in processes of their own, with a network of random weights (a ResNet-18 of
three stages, as published, or `--trunk small`), on one real field (7215 x 5412 px, 40x), and on
TIFF files of the same pixels and of `copies` x `copies` of them, side by side. Prints seconds and
peak memory of each: with a field of four times the area memory should not grow.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.rounds import make_parser, say
from common.checkpoint import save_checkpoint
from detection_kd.models.cam import LocaliserKeys, WeakLocaliser

ROOT = Path(__file__).resolve().parents[1]
FIELDS = ROOT.parent / "shared" / "data" / "mitosis_fields" / "images"
MPP, THRESHOLD = 0.25, 0.5


def write_localiser(path: Path, trunk: str) -> None:
    """A localiser with random weights, as `train_mitosis` writes it."""
    torch.manual_seed(0)
    model = WeakLocaliser(LocaliserKeys(trunk=trunk, stage=3, init="random"))
    described = model.describe() | {"side": 500, "mpp": MPP, "threshold": THRESHOLD, "stain": None}
    save_checkpoint(path, model=model.state_dict(), config=described, epoch=0)


def write_mosaic(picture: Path, copies: int, path: Path) -> tuple[int, int]:
    """A tiled TIFF with copies x copies of a picture; its size, px."""
    import tifffile

    pixels = np.tile(np.asarray(Image.open(picture)), (copies, copies, 1))
    options = {"tile": (512, 512), "photometric": "rgb", "compression": "jpeg"}
    resolution = {"resolution": (1e4 / MPP, 1e4 / MPP), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, **options, **resolution)
    return pixels.shape[1], pixels.shape[0]


def measure(slide: Path, localiser: Path, output: Path, threads: int) -> tuple[float, float]:
    """Seconds and peak MiB of one run on one file; the interpreter and libraries included."""
    code = (
        "import resource, sys; from common.cli import run; from detection_kd import detect_mitosis;"
        "status = run(detect_mitosis.main, detect_mitosis.Config, sys.argv[1:]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024); sys.exit(status)"
    )
    keys = [f"slides={slide}", f"localiser={localiser}", f"output={output}", f"mpp={MPP}"]
    keys += ["workers=0", "device=cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *keys], env=environment, check=True, capture_output=True,
        text=True, cwd=ROOT,
    )  # fmt: skip
    return time.perf_counter() - start, float(done.stdout.split()[-1])


def children_seconds() -> float:
    """CPU seconds of the processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = make_parser(__doc__, threads=2, copies=2)
    parser.add_argument("--images", type=Path, default=FIELDS)
    parser.add_argument("--trunk", default="resnet18", help="a trunk of LocaliserKeys")
    a = parser.parse_args()
    picture = sorted(a.images.glob("*.jpg"))[0]
    with tempfile.TemporaryDirectory() as folder:
        localiser = Path(folder) / "localiser.pt"
        write_localiser(localiser, a.trunk)
        cases = {picture.name: (picture, Image.open(picture).size)}
        for copies in (1, a.copies):
            path = Path(folder) / f"field{copies}.tiff"
            cases[f"TIFF of {copies} x {copies}"] = path, write_mosaic(picture, copies, path)
        for name, (path, (width, height)) in cases.items():
            say(name)
            before = children_seconds()
            seconds, memory = measure(path, localiser, Path(folder) / path.stem, a.threads)
            cpu = children_seconds() - before
            print(
                f"{name:32} {width} x {height} px: {seconds:6.1f} s ({cpu:6.1f} CPU-s), "
                f"{memory:6.0f} MiB at most"
            )


if __name__ == "__main__":
    main()
