"""Pre-trained encoders are read from their shared folder as from the backbone file of their run."""

from __future__ import annotations

from pathlib import Path

import timm
import torch

from patch_encoder.models.encoders import build_encoder
from patch_encoder.pretraining.run_files import save_backbone, share_backbone, write_description
from patch_encoder.prototypes.region_encoder import (
    RegionEncoderDescription,
    build_region_encoder,
    write_region_encoder,
)
from tests.training_harness import assert_equal


def test_a_tile_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=0)
    half = ((0.5,) * 3, (0.5,) * 3)
    save_backbone(tmp_path / "backbone.pt", network)
    write_description(tmp_path / "encoder.json", "test_vit", {}, 64, 160, half, 160, 0.5)
    share_backbone(tmp_path, "encoder.json", {"epochs": 2})
    wanted = build_encoder("dino", str(tmp_path / "backbone.pt"))
    (tmp_path / "backbone.pt").unlink()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        found = build_encoder("dino", str(path))
        assert_equal(dict(found.model.state_dict()), dict(wanted.model.state_dict()), str(path))
        assert found.provenance == wanted.provenance and found.mpp == 0.5


def test_a_region_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    description = RegionEncoderDescription(6, 4, 16, 1, 2, 4, "none", "uni")
    save_backbone(tmp_path / "backbone.pt", description.build())
    write_region_encoder(tmp_path, description)
    share_backbone(tmp_path, "region_encoder.json", {"epochs": 2})
    wanted = build_region_encoder(tmp_path)[0].state_dict()
    (tmp_path / "backbone.pt").unlink()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        network, found = build_region_encoder(path)
        assert found == description
        assert_equal(dict(network.state_dict()), dict(wanted), str(path))
