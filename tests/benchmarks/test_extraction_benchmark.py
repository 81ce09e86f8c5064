"""The benchmark of extraction: what it keeps from one run to the next."""

from __future__ import annotations

from pathlib import Path

import pytest

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
