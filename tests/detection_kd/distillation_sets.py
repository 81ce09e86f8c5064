"""A small distillation set as `mil.rank_patches` writes it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from patch_encoder.descriptors.stain_texture import stain_texture

SIDE = 32


def write_set(root: Path, slides: int = 3, tiles: int = 4, suffix: str = ".png") -> Path:
    """`slides` x `tiles` pairs in an order that mixes the slides; the teacher is stain_texture on
    the picture as stored.
    """
    rng = np.random.default_rng(0)
    images = []
    for index in range(tiles):
        for slide in range(slides):
            image = root / "wsi_root" / f"S{slide}" / f"{index}_{slide}{suffix}"
            image.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.clip(
                rng.integers(60, 200, 3) + rng.integers(-40, 40, (SIDE, SIDE, 3)), 0, 255
            ).astype(np.uint8)
            Image.fromarray(pixels).save(image, quality=95)
            with Image.open(image) as stored:
                feature = stain_texture(np.asarray(stored.convert("RGB")))
            torch.save(torch.from_numpy(feature), image.with_suffix(".pt"))
            name = f"S{slide}/{image.name}"
            corner = {
                "x": slide * SIDE,
                "y": index * SIDE,
                "slide_id": f"S{slide}",
                "score": float(index),
            }
            images.append(
                {"id": len(images) + 1, "file_name": name, "width": SIDE, "height": SIDE, **corner}
            )
    (root / "ann_root").mkdir()
    write_listing(root, images)
    return root


def write_listing(root: Path, images: list[dict[str, object]]) -> None:
    """ann.json."""
    listing = {"images": images, "annotations": [], "categories": []}
    (root / "ann_root" / "ann.json").write_text(json.dumps(listing))


def read_listing(root: Path) -> list[dict[str, object]]:
    """The images of ann.json."""
    return json.loads((root / "ann_root" / "ann.json").read_text())["images"]
