"""Inputs of the D2VFM stage, made once per test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.detection_kd.d2vfm_runs import write_backbone, write_pairs


@pytest.fixture
def backbone_path(tmp_path: Path) -> Path:
    """A random small backbone as train_detector writes it."""
    return write_backbone(tmp_path / "backbone.pt")


@pytest.fixture
def pairs_root(tmp_path: Path) -> Path:
    """24 pairs on 4 slides."""
    return write_pairs(tmp_path / "distillation")
