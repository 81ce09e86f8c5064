"""Export a D2VFM student to ONNX, float32 and int8, and compare each file with the PyTorch student
on tiles.

    python -m detection_kd.export_student student=runs/d2vfm/checkpoint_best.pt slides=...
    coords=... output=runs/export

Writes `student.onnx`, `student_int8.onnx` and `export.json` (digests, versions, cosines on tiles
that calibrated nothing). A file whose features are not the student's is an error, and nothing is
written. `extract_student` takes the files as `student=`.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from detection_kd.datasets.distillation import DistillationTiles, read_pairs
from detection_kd.models.export_files import is_exported, publish_export
from detection_kd.models.onnx_export import OPSET, import_onnx
from detection_kd.models.student import load_student, load_student_encoder
from detection_kd.models.student_onnx import (
    FILES,
    RECORD,
    export_onnx,
    make_student_note,
    quantise,
)
from patch_encoder.cohort.failures import Failures
from patch_encoder.extraction.loop import cohort_jobs
from patch_encoder.extraction.tile_batches import TileSequence
from patch_encoder.models.encoders import Encoder
from patch_encoder.models.onnx_network import OnnxNetwork, import_onnxruntime
from patch_encoder.models.transforms import ToInputSize
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes

logger = logging.getLogger(__name__)
BARS = {"onnx": 0.999, "int8": 0.99}  # least cosine of any tile


@dataclass
class Config:
    """Keys of the export."""

    student: str = key(REQUIRED, "checkpoint of train_d2vfm", path=True)
    output: str = key(
        REQUIRED,
        "where the results are written; student.onnx, student_int8.onnx and export.json",
        runtime=True,
    )
    slides: str = key(
        "", "slide file, or folder tree of slides; their tiles calibrate and check", path=True
    )
    coords: str = key("", "folder of coordinates files; of the slides", path=True)
    labels: str = key("", "labels.csv of the cohort; only its slides are used", path=True)
    dataset: str = key(
        "",
        "distillation set: a folder with wsi_root/ and ann_root/, or a packed .h5 file; "
        "in place of slides and coords",
        path=True,
    )
    int8: bool = key(True, "write student_int8.onnx as well")
    narrow_weights: bool = key(
        False, "int8 weights of 7 bits, for CPUs without VNNI, whose sums overflow"
    )
    calibration_tiles: int = key(64, "tiles from which the ranges of int8 are taken")
    check_tiles: int = key(32, "other tiles, on which the files are compared with PyTorch")
    seed: int = key(0, "seed of everything that is drawn at random")
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def find_tiles(config: Config) -> Iterator[UInt8[Tensor, "3 h w"]]:
    """The tiles of the cohort or the distillation set in random order; those that cannot be read
    are passed over.
    """
    generator = np.random.default_rng(config.seed)
    if config.dataset:
        pairs = DistillationTiles(read_pairs(config.dataset), augment=False, seed=0)
        yield from (
            pairs[int(index)][0].contiguous() for index in generator.permutation(len(pairs))
        )
        return
    if not (config.slides and config.coords):
        raise UserError(
            "export_student: expected slides=... and coords=..., or dataset=..., for tiles to "
            "compare on"
        )
    sequence = TileSequence(
        cohort_jobs(config.slides, config.coords, config.labels, Failures("export_student")),
        ToInputSize(None),
    )
    items = (sequence[int(index)][1] for index in generator.permutation(len(sequence)))
    yield from (item for item in items if isinstance(item, Tensor))


def draw_tiles(config: Config) -> tuple[UInt8[Tensor, "c 3 h w"], UInt8[Tensor, "n 3 h w"]]:
    """(calibration, held-out) tiles.

    Raises:
        UserError: too few tiles, or tiles of several sizes.
    """
    for name, least in (("calibration_tiles", 2), ("check_tiles", 2)):
        if getattr(config, name) < least:
            raise UserError(f"{name}={getattr(config, name)}: expected at least {least}")
    wanted = config.calibration_tiles + config.check_tiles
    drawn = list(islice(find_tiles(config), wanted))
    if len(drawn) < wanted:
        raise UserError(
            f"export_student: expected {wanted} tiles (calibration_tiles + check_tiles), found "
            f"{len(drawn)}; lower the two"
        )
    shapes = sorted({tuple(tile.shape) for tile in drawn})
    if len(shapes) > 1:
        raise UserError(
            f"expected tiles of one size, found {shapes[0]} and {shapes[-1]}; tile the cohort "
            "with one tile_size"
        )
    tiles = torch.stack(drawn)
    return tiles[: config.calibration_tiles], tiles[config.calibration_tiles :]


@torch.no_grad()
def compute_features(module: nn.Module, tiles: UInt8[Tensor, "n 3 h w"]) -> Float[Tensor, "n d"]:
    """float32 features, few tiles at a time."""
    return torch.cat([module(part).float() for part in tiles.split(4)])


def compare_features(
    found: Float[Tensor, "n d"], expected: Float[Tensor, "n d"], form: str
) -> dict[str, float]:
    """Cosines between two sets of features of the same tiles.

    Raises:
        UserError: the least of them misses the bar of this form.
    """
    cosines = nn.functional.cosine_similarity(found.double(), expected.double(), dim=1)
    least, mean = cosines.min().item(), cosines.mean().item()
    if not least >= BARS[form]:
        remedy = (
            "give more calibration_tiles, or set int8=false"
            if form == "int8"
            else "report the student's architecture"
        )
        raise UserError(
            f"export: {FILES[form]}: expected cosine >= {BARS[form]} with the PyTorch student on "
            f"every tile, found {least:.6f} "
            f"(mean {mean:.6f} of {len(cosines)} tiles); nothing was written; {remedy}"
        )
    return {"min": least, "mean": mean}


def make_identity(
    config: Config, encoder: Encoder, calibration: Tensor, held_out: Tensor
) -> dict[str, Any]:
    """What decides the files."""
    used = calibration if config.int8 else calibration[:2]
    digests = [
        sha256_bytes(str(tuple(tiles.shape)).encode(), tiles.numpy().tobytes())
        for tiles in (used, held_out)
    ]
    return {
        "student_sha256": encoder.provenance["weights_sha256"],
        "calibration": {
            "method": "MinMax",
            "tiles": len(used),
            "sha256": digests[0],
            "narrow_weights": config.narrow_weights,
        },
        "held_out": {
            "tiles": len(held_out),
            "size": list(held_out.shape[2:]),
            "sha256": digests[1],
        },
        "opset": OPSET,
        "forms": list(FILES) if config.int8 else ["onnx"],
    }


def export(
    config: Config, encoder: Encoder, folder: Path, calibration: Tensor, held_out: Tensor
) -> dict[str, dict[str, float]]:
    """Write the files into `folder`, and compare each with the student; {form: cosines}."""
    _, student = load_student(config.student)
    expected, cosines = compute_features(encoder.model, held_out), {}
    for form in list(FILES) if config.int8 else ["onnx"]:
        note, path = make_student_note(student, encoder, form), folder / FILES[form]
        if form == "onnx":
            export_onnx(encoder.model, calibration, path, note)
        else:
            quantise(folder / FILES["onnx"], path, calibration, note, config.narrow_weights)
        cosines[form] = compare_features(
            compute_features(OnnxNetwork(path, encoder.dim), held_out), expected, form
        )
        logger.info(
            "export_student: %s: cosine min %.6f, mean %.6f", FILES[form], *cosines[form].values()
        )
    return cosines


def main(config: Config) -> None:
    import_onnx()
    import_onnxruntime()
    encoder, output = load_student_encoder(config.student, "student"), Path(config.output)
    calibration, held_out = draw_tiles(config)
    wanted = make_identity(config, encoder, calibration, held_out)
    if is_exported(output / RECORD, wanted, "export_student", config.overwrite):
        logger.info("export_student: %s is there", output)
        return
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export.", dir=output) as folder:
        cosines = export(config, encoder, Path(folder), calibration, held_out)
        names = [FILES[form] for form in cosines]
        content = wanted | {"cosine": cosines, "bars": BARS}
        publish_export(Path(folder), output / RECORD, names, list(FILES.values()), content)


if __name__ == "__main__":
    launch(main, Config)
