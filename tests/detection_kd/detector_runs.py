"""What the tests of the detector train on: 64 px images with dark squares, and a network that is as
small as it can be.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

TINY = [
    "backbone=resnet18", "norm=group", "pretrained=false", "epochs=2", "batch_size=4", "workers=0",
    "log_every=1", "lr=0.001",
    "precision=fp32", "device=cpu", "architecture.hidden_dim=32", "architecture.heads=2",
    "architecture.feedforward_dim=32",
    "architecture.encoder_layers=1", "architecture.decoder_layers=2", "architecture.queries=5",
    "architecture.levels=2",
    "augmentation.sizes=[48,64]", "augmentation.crop_sizes=[]", "augmentation.eval_size=64",
    "augmentation.pad_to=64",
]  # fmt: skip
# a trunk of 0.2 million parameters with layer norm, where no ResNet is needed: no batch statistics
SMALL_TRUNK = ("backbone=test_convnext", "norm=batch")


def draw_set(folder: Path, name: str, count: int) -> Path:
    """`count` 64 px images with one or two dark squares, the last one empty; returns the annotation
    file.
    """
    rng = np.random.default_rng(len(name))
    images, annotations = [], []
    for index in range(count):
        pixels = rng.integers(200, 255, (64, 64, 3), dtype=np.uint8)
        for _ in range(int(index < count - 1) * rng.integers(1, 3)):
            x, y, side = (int(v) for v in (*rng.integers(0, 40, 2), rng.integers(12, 24)))
            pixels[y : y + side, x : x + side] = (90, 40, 120)
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": index,
                    "category_id": 1,
                    "bbox": [x, y, side, side],
                }
            )
        Image.fromarray(pixels).save(folder / f"{name}_{index}.png")
        images.append({"id": index, "file_name": f"{name}_{index}.png", "width": 64, "height": 64})
    path = folder / f"{name}.json"
    path.write_text(
        json.dumps(
            {
                "images": images,
                "annotations": annotations,
                "categories": [{"id": 1, "name": "lesion"}],
            }
        )
    )
    return path


def write_detection_sets(folder: Path) -> list[str]:
    """A training set of nine images and a validation set of three; the arguments that name them."""
    train, val = draw_set(folder, "train", 9), draw_set(folder, "val", 3)
    return [f"train={train}", f"val={val}", f"images={folder}"]
