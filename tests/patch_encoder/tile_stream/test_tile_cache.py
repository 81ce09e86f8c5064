"""The cache of decoded tiles: the same batches with it cold, warm, damaged and shared."""

from __future__ import annotations

import errno
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch

from patch_encoder.tile_stream import tile_cache
from patch_encoder.tile_stream.plan import TilePlan
from patch_encoder.tile_stream.slide_shelf import SlideShelf
from patch_encoder.tile_stream.sources import find_sources
from patch_encoder.tile_stream.stream import TileStream
from patch_encoder.tile_stream.windows import StreamBatch
from tests.patch_encoder.tile_stream.corpus import make_tree, store
from tests.patch_encoder.tile_stream.test_stream import assert_equal, join
from wsi_common.errors import UserError

BATCH, STEPS = 8, 6


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Two slides of 25 tiles."""
    return make_tree(tmp_path / "slides", 2)


def plan_of(root: Path, **keys: Any) -> TilePlan:
    settings = {"tile_size": 32, "jitter": 0.0, "open_slides": 2, "tiles_per_visit": 4, "shard": 10}
    return TilePlan(find_sources(root, {}), **{**settings, **keys})


def read(plan: TilePlan, folder: Path, **keys: Any) -> list[StreamBatch]:
    return list(TileStream(plan, BATCH, cache_dir=str(folder), **keys).batches(0, STEPS))


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*.tiles"))}


def no_slide(*_: object) -> NoReturn:
    raise AssertionError("no slide is opened")


def test_a_visit_draws_from_one_shard_and_all_tiles_are_drawn_alike(corpus: Path) -> None:
    plan = plan_of(corpus)
    shards = {
        (plan.visit(index), plan.draw(index).slide, plan.shard_of(*plan.draw(index)[2:4])[0])
        for index in range(400)
    }
    assert len(shards) == len({visit for visit, *_ in shards}) == 100
    tiles = plan.sources[0].coordinates.coords
    covered = [tile for shard in range(3) for tile in plan.tiles_of(0, shard)]
    assert sorted(covered) == list(range(25)) and len(plan.tiles_of(0, 0)) <= 10
    for shard in range(3):
        assert [plan.shard_of(0, tile) for tile in plan.tiles_of(0, shard)] == [
            (shard, number) for number in range(len(plan.tiles_of(0, shard)))
        ]
    drawn = Counter(plan.draw(index)[2:4] for index in range(5000))
    assert len(drawn) == 2 * len(tiles) and min(drawn.values()) > 50


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.process)])
def test_cold_warm_and_shared_caches_give_the_same_batches(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    plan = plan_of(corpus)
    cold = read(plan, tmp_path / "cache", context_factor=2)
    plain = list(TileStream(replace(plan, shard=0), BATCH, context_factor=2).batches(0, 1))
    near = cold[0].tiles.float() - read(plan, tmp_path / "cache")[0].tiles.float()
    assert near.abs().max() == 0, "the tile is the same with and without its context"
    assert plain[0].tiles.shape == cold[0].tiles.shape
    parts = [
        read(plan, tmp_path / "other", rank=r, world=2, workers=workers, context_factor=2)
        for r in range(2)
    ]
    assert_equal(join(parts), cold)
    both = [
        {path.relative_to(tmp_path / name): data for path, data in files(tmp_path / name).items()}
        for name in ("cache", "other")
    ]
    assert both[1].items() <= both[0].items(), "the second stream below adds tiles without context"
    monkeypatch.setattr(SlideShelf, "get", no_slide)
    assert_equal(read(plan, tmp_path / "cache", workers=workers, context_factor=2), cold)
    shutil.move(tmp_path / "slides", tmp_path / "moved")
    moved = plan_of(tmp_path / "moved")
    assert_equal(read(moved, tmp_path / "cache", context_factor=2), cold)


def test_cached_tiles_are_the_slide_s_up_to_jpeg(corpus: Path, tmp_path: Path) -> None:
    plan = plan_of(corpus, tile_size=128)
    cached = read(plan, tmp_path / "cache")
    for batch in cached:
        for tile, index in zip(batch.tiles, batch.indices.tolist(), strict=True):
            draw = plan.draw(index)
            shelf = SlideShelf(plan.sources, 1, bytearray(2))
            pixels = shelf.get(draw.slide).read(draw.x, draw.y, 128).transpose(2, 0, 1)
            shelf.close()
            assert np.abs(tile.numpy().astype(int) - pixels).mean() < 5, "noise, at quality 95"
            assert abs(float(tile[0].float().mean()) - pixels[0].mean()) < 1, "red is red"


def test_shards_that_are_damaged_or_of_other_settings_are_made_anew(
    corpus: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    expected, plan = read(plan_of(corpus), cache), plan_of(corpus)
    whole = files(cache)
    first, second, third = list(whole)[:3]
    first.write_bytes(whole[first][:-7])
    second.write_bytes(whole[second][:-1] + b"x")
    third.write_bytes(b"{}\n")
    assert_equal(read(plan, cache), expected)
    assert caplog.text.count("it is made anew") == 3
    assert files(cache) == whole
    read(plan_of(corpus, tile_size=48), cache)
    store(corpus / "A", corpus / "A" / "slide_1.tiff")
    (corpus / "A" / "slide_1.npy").unlink()
    read(plan_of(corpus), cache)
    assert len({path.parent for path in files(cache)}) == 2 + 2 + 1
    assert {path: files(cache)[path] for path in whole} == whole


def test_tiles_that_cannot_be_read_are_kept_as_such(
    tmp_path: Path, real_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slides").mkdir()
    for name in ("cmu-1-small-region.svs", "DERIVED-cmu-1-small-region.zerotail.svs"):
        folder = "wsi_broken" if "zerotail" in name else "wsi_openslide"
        shutil.copy(real_data / folder / name, tmp_path / "slides")
        store(tmp_path / "slides", tmp_path / "slides" / name, side=256)
    plan = plan_of(tmp_path / "slides", tile_size=64)
    cold = read(plan, tmp_path / "cache")
    assert any(batch.failures for batch in cold)
    assert "cannot be decoded" in next(bad.reason for b in cold for bad in b.failures)
    monkeypatch.setattr(SlideShelf, "get", no_slide)
    assert_equal(read(plan, tmp_path / "cache"), cold)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.process)])
def test_a_full_disk_is_no_bad_draw(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tile_cache, "_write_shard", full)
    with pytest.raises((OSError, UserError), match="[Nn]o space left"):
        read(plan_of(corpus), tmp_path / "cache", workers=workers)


def test_a_cache_that_cannot_be_written_is_no_slide_s_fault(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(FileExistsError):
        read(plan_of(corpus), tmp_path / "cache")


def test_what_a_cache_cannot_do_is_refused(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"jitter=0.5: expected jitter=0 with cache_dir"):
        plan_of(corpus, jitter=0.5)
    for keys, plan in (({}, plan_of(corpus, shard=0)), ({"align": True}, plan_of(corpus))):
        with pytest.raises(UserError, match="cache_dir: expected jitter=0, align=false"):
            read(plan, tmp_path / "cache", **keys)
    assert torch.equal(*(read(plan_of(corpus), tmp_path / "c")[0].tiles for _ in range(2)))
