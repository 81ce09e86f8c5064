"""What the tests of D2VFM train on: a random small backbone, 24 pairs on 4 slides, and the script's
arguments.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from detection_kd import train_d2vfm
from detection_kd.models.backbone import Backbone
from wsi_common.checkpoint import save_checkpoint
from wsi_common.cli import run

DIM = 12


def write_backbone(path: Path) -> Path:
    """A random backbone of 0.4 million parameters as train_detector writes it."""
    torch.manual_seed(1)
    backbone = Backbone("test_resnet", "frozen")
    save_checkpoint(path, model=backbone.state_dict(), config=backbone.describe(), epoch=1)
    return path


def write_pairs(root: Path) -> Path:
    """24 pairs on 4 slides; the teacher's feature is a fixed function of the tile's colour."""
    rng = np.random.default_rng(0)
    images = []
    mixing = torch.from_numpy(rng.normal(size=(3, DIM)).astype(np.float32))
    for slide in range(4):
        folder = root / "wsi_root" / f"S{slide}"
        folder.mkdir(parents=True)
        for index in range(6):
            colour = rng.integers(0, 255, 3)
            pixels = np.clip(colour + rng.integers(-20, 20, (64, 64, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}_0.jpg", quality=95)
            torch.save(
                torch.from_numpy(colour.astype(np.float32) / 255) @ mixing, folder / f"{index}_0.pt"
            )
            images.append(
                {
                    "id": len(images),
                    "file_name": f"S{slide}/{index}_0.jpg",
                    "width": 64,
                    "height": 64,
                }
            )
    (root / "ann_root").mkdir()
    (root / "ann_root" / "ann.json").write_text(
        json.dumps({"images": images, "annotations": [], "categories": []})
    )
    return root


def arguments(pairs_root: Path, backbone_path: Path, output: Path, *extra: str) -> list[str]:
    """The script's arguments: three epochs of batches of four on the CPU."""
    base = [
        f"dataset={pairs_root}",
        f"backbone={backbone_path}",
        f"output={output}",
        "batch_size=4",
        "device=cpu",
        "workers=0",
    ]
    return [
        *base,
        "precision=fp32",
        "val_fraction=0.25",
        "scales=[1.0,0.75]",
        "epochs=3",
        "figures=false",
        *extra,
    ]


def train(*args: object) -> int:
    """The script in this process: its exit status."""
    return run(train_d2vfm.main, train_d2vfm.Config, arguments(*args))  # type: ignore[arg-type]
