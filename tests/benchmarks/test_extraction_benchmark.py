"""The benchmark of extraction: what it keeps from one run to the next."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from torch import Tensor, nn

from benchmarks import extraction
from patch_encoder.extraction.tile_batches import TileSequence
from patch_encoder.models.transforms import ToInputSize


def test_a_cache_serves_any_number_of_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "SIDE", 512)
    for tiles in (20, 4, 40):
        jobs = extraction.render(tmp_path, tiles)
        folder = TileSequence([jobs["tile folder"]], ToInputSize(None))
        batch = folder.batch(range(tiles), {})
        assert not batch.failures
        assert batch.items is not None and len(batch.items) == tiles


def test_matrix_products_are_worth_as_many_tiles_as_their_operations(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extraction, "INPUT", 512)
    layer = nn.Conv2d(3, 64, 3, padding=1)  # 906 million operations at 512 px
    model = nn.Sequential(Scaled(), layer)
    a = argparse.Namespace(device="cpu", tiles=10)
    operations = 2 * 512**2 * 64 * 27
    products = 5 * operations // (2 * 1024**3)
    run = extraction.matrix_products(model, "fp32", a)
    assert run() == pytest.approx(products * 2 * 1024**3 / operations)


class Scaled(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        return pixels.float() / 255


def test_ratios_hold_the_ceiling_of_the_processor() -> None:
    rates = {
        "model fp32": 9.0,
        "matrix products fp32": 10.0,
        "slide end to end fp32": 8.0,
        "slide read": 100.0,
        "slide classic": 4.0,
    }
    found = extraction.ratios([rates])
    assert found["fp32: model / matrix products"] == pytest.approx(0.9)
    assert found["fp32: matrix products / classic"] == pytest.approx(2.5)
    assert found["slide: fp32 / classic"] == pytest.approx(2.0)
