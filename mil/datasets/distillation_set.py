"""A distillation set on disk: chosen tiles of every slide with their teacher feature, and the list
of them.

`<root>/wsi_root/<slide>/<patch>.jpg` + `.pt` ((D,) float32), `<root>/ann_root/ann.json` (COCO
images; no annotations) and `<root>/distillation.json` (provenance). Layout of TS2G-KD; scores,
corners and provenance are ours. Patches are named `<row>_<col>` when they are a tile folder's own
tiles (whose JPEGs are copied), else `<x>_<y>` in level-0 pixels.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from patch_encoder.bags.bag import read_bag
from patch_encoder.slides import Slide, open_slide
from patch_encoder.slides.tile_folder import TileFolder
from patch_encoder.tiles.coordinates import TileGeometry
from patch_encoder.tiles.grid import read_tile
from wsi_common.checkpoint import save_tensors
from wsi_common.files import atomic_path, read_json, write_json
from wsi_common.provenance import can_reuse, unknown_origin

JPEG_QUALITY = 95


@dataclass(frozen=True)
class Patch:
    """One chosen tile: row of the bag, level-0 corner, score, and whether it is among the top K."""

    row: int
    x: int
    y: int
    score: float
    top: bool


@dataclass(frozen=True)
class PatchCutJob:
    """The chosen tiles of one slide, and where they are cut from and written to."""

    slide_id: str
    slide: Path
    mpp: float | None
    bag: Path
    folder: Path
    patches: tuple[Patch, ...]


def choose_patches(
    scores: np.ndarray, top_k: int, extra_random: int, seed: Sequence[int]
) -> np.ndarray:
    """Rows of the `top_k` highest scores, best first, then `extra_random` others; all rows when
    there are fewer.
    """
    order = np.argsort(-scores, kind="stable")
    rest = order[top_k:]
    drawn = np.random.default_rng(list(seed)).permutation(rest)[:extra_random]
    return np.concatenate([order[:top_k], drawn])


def read_native_tile(slide: Slide, geometry: TileGeometry, patch: Patch) -> tuple[str, Path] | None:
    """Name and file of a tile folder's own tile, when the patch is exactly that."""
    if not isinstance(slide, TileFolder) or {geometry.patch_size, geometry.target_size} != {
        slide.tile_side
    }:
        return None
    file = slide.tile_at(patch.x, patch.y)
    return None if file is None else (file.stem, file)


def cut_patches(job: PatchCutJob) -> None:
    """Write picture and teacher feature of every chosen tile that is not there yet, and the slide's
    rows of ann.json.

    Raises:
        UserError: the slide cannot be read.
    """
    bag = read_bag(job.bag)
    features = bag.read()
    geometry = TileGeometry.from_attributes(bag.attributes, str(job.bag))
    images = []
    with open_slide(job.slide, job.mpp, geometry.tile_pattern) as slide:
        for patch in job.patches:
            native = read_native_tile(slide, geometry, patch)
            name = native[0] if native else f"{patch.x}_{patch.y}"
            file = native[1] if native else None
            write_picture(job.folder / f"{name}.jpg", slide, geometry, patch, file)
            feature = job.folder / f"{name}.pt"
            if not feature.is_file():
                save_tensors(feature, features[patch.row].clone())
            images.append(
                {
                    "file_name": f"{job.slide_id}/{name}.jpg",
                    "width": geometry.target_size,
                    "height": geometry.target_size,
                    "slide_id": job.slide_id,
                    "x": patch.x,
                    "y": patch.y,
                    "score": patch.score,
                    "chosen": "top" if patch.top else "random",
                }
            )
    write_json(find_done_file(job.folder), images)


def write_picture(
    path: Path, slide: Slide, geometry: TileGeometry, patch: Patch, native: Path | None
) -> None:
    """The tile as JPEG; a tile folder's own JPEG is copied."""
    if path.is_file():
        return
    with atomic_path(path) as temporary:
        if native is not None and native.suffix.lower() in {".jpg", ".jpeg"}:
            shutil.copyfile(native, temporary)
        else:
            pixels = read_tile(slide, geometry, patch.x, patch.y)
            Image.fromarray(pixels).save(temporary, "JPEG", quality=JPEG_QUALITY, subsampling=0)


def find_done_file(folder: Path) -> Path:
    """`ann_root/slides/<slide>.json`: the slide's rows of ann.json, written when its tiles are
    complete.
    """
    return folder.parents[1] / "ann_root" / "slides" / f"{folder.name}.json"


def is_done(job: PatchCutJob) -> bool:
    """Whether the slide's rows and every file they name are there."""
    if not find_done_file(job.folder).is_file():
        return False
    names = [Path(image["file_name"]).stem for image in read_done_file(job)]
    present = {file.name for file in job.folder.glob("*") if file.stat().st_size > 0}
    needed = {f"{name}.{ending}" for name in names for ending in ("jpg", "pt")}
    return len(names) == len(job.patches) and needed <= present


def read_done_file(job: PatchCutJob) -> list[dict[str, Any]]:
    """The slide's rows of ann.json."""
    return read_json(find_done_file(job.folder), "a slide's annotations")


def claim_root(root: Path, provenance: dict[str, Any], overwrite: bool) -> None:
    """Make the root ours, or check that it is.

    Raises:
        UserError: it holds a distillation set of another or unknown provenance.
    """
    stamp = root / "distillation.json"
    if not stamp.is_file() and (root / "wsi_root").exists():
        raise unknown_origin(root, "wsi_root", stamp.name)
    if can_reuse(
        stamp,
        lambda: read_json(stamp, "a distillation set's provenance"),
        provenance,
        "another distillation set",
        overwrite=overwrite,
    ):
        return
    for name in ("wsi_root", "ann_root"):
        shutil.rmtree(root / name, ignore_errors=True)
    write_json(stamp, provenance)


def write_annotations(
    root: Path, jobs: Sequence[PatchCutJob], provenance: dict[str, Any]
) -> tuple[int, int]:
    """ann_root/ann.json over all finished slides; returns the numbers of images and of slides."""
    done = [job for job in jobs if is_done(job)]
    images = [image for job in done for image in read_done_file(job)]
    numbered = [{"id": index, **image} for index, image in enumerate(images, start=1)]
    content = {"info": provenance, "images": numbered, "annotations": [], "categories": []}
    write_json(root / "ann_root" / "ann.json", content)
    return len(images), len(done)
