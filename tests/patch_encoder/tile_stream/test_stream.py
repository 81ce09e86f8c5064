"""Batches of tiles: the same for any number of processes and workers and wherever a run goes on,
and full whatever is wrong with some slides.
"""

from __future__ import annotations

import io
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from patch_encoder.slides.openslide_file import OpenSlideFile
from patch_encoder.slides.tiff_file import TiffFile
from patch_encoder.tile_stream import reader as reader_module
from patch_encoder.tile_stream.plan import TilePlan
from patch_encoder.tile_stream.sources import find_sources
from patch_encoder.tile_stream.stream import TileStream
from patch_encoder.tile_stream.windows import StreamBatch
from tests.helpers import children, die
from tests.patch_encoder.tile_stream.corpus import make_tree, store
from wsi_common.errors import UserError
from wsi_common.memory import peak_memory

process = pytest.mark.process
WORKERS = [0, pytest.param(1, marks=process), pytest.param(3, marks=process)]
BATCH, STEPS = 12, 7


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four slides in two sub-datasets; read only."""
    return make_tree(tmp_path_factory.mktemp("tree"))


def plan_of(root: Path, **keys: object) -> TilePlan:
    sources = find_sources(root, {}, need_mpp="mpps" in keys)
    settings = {"tile_size": 32, "open_slides": 4, "tiles_per_visit": 4, "seed": 1} | keys
    return TilePlan(sources, **settings)  # type: ignore[arg-type]


def read(plan: TilePlan, first: int = 0, last: int = STEPS, **keys: object) -> list[StreamBatch]:
    before = children()
    batches = list(TileStream(plan, BATCH, **keys).batches(first, last))  # type: ignore[arg-type]
    assert children() <= before, "no process is left"
    return batches


def join(parts: list[list[StreamBatch]]) -> list[StreamBatch]:
    """The batches of all processes, step by step, as one process has them."""
    joined = []
    for step in zip(*parts, strict=True):
        contexts = [batch.context for batch in step if batch.context is not None]
        joined.append(
            StreamBatch(
                torch.cat([batch.tiles for batch in step]),
                torch.cat(contexts) if contexts else None,
                torch.cat([batch.indices for batch in step]),
                [slide for batch in step for slide in batch.slides],
                [bad for batch in step for bad in batch.failures],
            )
        )
    return joined


def assert_equal(found: list[StreamBatch], expected: list[StreamBatch]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.tiles, b.tiles) and torch.equal(a.indices, b.indices)
        assert (a.context is None) == (b.context is None)
        assert a.context is None or torch.equal(a.context, b.context)  # type: ignore[arg-type]
        assert (a.slides, a.failures) == (b.slides, b.failures)


def break_slide(root: Path, data: Path) -> None:
    """Real slides beside the small ones: whole, with a part that cannot be decoded, and none."""
    folder = root / "C"
    folder.mkdir()
    zerotail = data / "wsi_broken" / "DERIVED-cmu-1-small-region.zerotail.svs"
    shutil.copy(data / "wsi_openslide" / "cmu-1-small-region.svs", folder / "cmu.svs")
    shutil.copy(zerotail, folder / "tail.svs")
    shutil.copy(data / "wsi_broken" / "openslide-unreadable.svs", folder / "unreadable.svs")
    for name in ("cmu", "tail"):
        store(folder, folder / f"{name}.svs", side=256)
    np.save(folder / "unreadable.npy", np.zeros((1, 2), np.int64))


def struck(monkeypatch: pytest.MonkeyPatch, slide: str, act: Callable[[], None]) -> None:
    """`act` whenever pixels of a slide are read."""
    for reader in (OpenSlideFile, TiffFile):

        def bad(
            self: Any, x: int, y: int, size: int, level: int = 0, plain: Any = reader.read
        ) -> np.ndarray:
            if slide in str(self.path):
                act()
            return plain(self, x, y, size, level)

        monkeypatch.setattr(reader, "read", bad)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("world", [1, 3])
def test_any_number_of_processes_and_workers_has_the_same_pixels(
    tree: Path, world: int, workers: int
) -> None:
    plan = plan_of(tree, mpps=(0.5, 1.0))
    expected = read(plan, context_factor=2)
    assert [batch.indices.tolist() for batch in expected] == [
        list(range(step * BATCH, (step + 1) * BATCH)) for step in range(STEPS)
    ]
    assert expected[0].tiles.shape == (BATCH, 3, 32, 32) and expected[0].tiles.is_contiguous()
    assert len({slide for batch in expected for slide in batch.slides}) == 4
    keys = {"world": world, "workers": workers, "context_factor": 2}
    assert_equal(join([read(plan, rank=rank, **keys) for rank in range(world)]), expected)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=process)])
def test_a_run_goes_on_at_any_step(tree: Path, workers: int) -> None:
    plan = plan_of(tree)
    whole = read(plan, workers=workers)
    for step in range(STEPS):
        assert_equal(read(plan, step, workers=workers), whole[step:])
    assert read(plan, STEPS, STEPS, workers=workers) == []


def test_the_tiles_are_those_of_the_plan(tree: Path) -> None:
    plan = plan_of(tree, tile_size=64)
    for batch in read(plan, 0, 3):
        for tile, index, number in zip(batch.tiles, batch.indices, batch.slides, strict=True):
            draw = plan.draw(int(index))
            with OpenSlideFile(plan.sources[number].path) as slide:
                pixels = slide.read(draw.x, draw.y, 64)
            assert draw.slide == number and np.array_equal(tile.permute(1, 2, 0), pixels)


def test_slides_with_parts_that_cannot_be_read_cost_only_their_draws(
    tmp_path: Path, real_data: Path
) -> None:
    make_tree(tmp_path)
    break_slide(tmp_path, real_data)
    plan = plan_of(tmp_path, balance="slides")
    names = [source.name for source in plan.sources]
    stream = TileStream(plan, BATCH)
    batches = list(stream.batches(0, 25))
    assert all(len(batch.tiles) == BATCH == len(batch.slides) for batch in batches)
    bad = [draw for batch in batches for draw in batch.failures]
    assert {names[draw.slide] for draw in bad} == {"C/tail", "C/unreadable"}
    assert not {names[slide] for batch in batches for slide in batch.slides} & {"C/unreadable"}
    for batch in batches:
        assert batch.failures == sorted(batch.failures)
        for draw in batch.failures:
            assert plan.draw(draw.index, draw.attempt).slide == draw.slide
    reasons = {names[draw.slide]: draw.reason for draw in bad}
    assert "level 0 cannot be decoded" in reasons["C/tail"]
    assert "Bogus marker length" in reasons["C/unreadable"]
    dropped = stream.slides_to_drop()
    assert [names[slide] for slide in dropped] == ["C/unreadable"], "few of the other's are bad"
    listed = stream.describe_failures()
    assert sorted(listed) == ["C/tail", "C/unreadable"]
    count = sum(names[draw.slide] == "C/unreadable" for draw in bad)
    assert listed["C/unreadable"].startswith(f"{count} of {count} draws could not be read, the fir")
    stream.drop(dropped)
    assert not stream.slides_to_drop()
    after = list(stream.batches(25, 30))
    assert {names[slide] for batch in after for slide in batch.slides} > {"C/tail", "C/cmu"}
    assert not any(draw.slide in dropped for batch in after for draw in batch.failures)
    assert_equal(after, read(plan.without(dropped), 25, 30))


@process
def test_broken_slides_change_nothing_between_processes_and_workers(
    tmp_path: Path, real_data: Path
) -> None:
    make_tree(tmp_path)
    break_slide(tmp_path, real_data)
    plan = plan_of(tmp_path, balance="slides")
    expected = read(plan)
    assert any(batch.failures for batch in expected)
    assert_equal(read(plan, workers=2), expected)
    assert_equal(join([read(plan, rank=rank, world=2) for rank in range(2)]), expected)


def test_a_slide_leaves_after_a_fifth_and_at_least_five_of_its_draws(tree: Path) -> None:
    stream = TileStream(plan_of(tree), BATCH)
    counts = {"drawn": [4, 24, 25, 1000], "bad": [4, 5, 5, 200]}
    stream.load_state_dict(stream.state_dict() | counts)
    assert stream.slides_to_drop() == [1]
    stream.load_state_dict(stream.state_dict() | {"given_up": [0], "dropped": [1]})
    assert stream.slides_to_drop() == [0]


def test_counts_are_of_the_steps_that_were_taken_and_resume_anywhere(
    tmp_path: Path, real_data: Path
) -> None:
    make_tree(tmp_path)
    break_slide(tmp_path, real_data)
    plan = plan_of(tmp_path, balance="slides")
    stream = TileStream(plan, BATCH)
    states = [stream.state_dict()]
    for _ in stream.batches(0, 20):
        states.append(stream.state_dict())
    assert sum(states[7]["drawn"]) == 7 * BATCH + sum(states[7]["bad"])
    stored = io.BytesIO()
    torch.save(states[7], stored)
    stored.seek(0)
    again = TileStream(plan, BATCH)
    again.load_state_dict(torch.load(stored, weights_only=True))
    list(again.batches(7, 20))
    assert again.state_dict() == states[20] == stream.state_dict()
    dropped = stream.slides_to_drop()
    assert dropped and again.slides_to_drop() == dropped
    again.drop(dropped)
    later = TileStream(plan, BATCH)
    later.load_state_dict(again.state_dict())
    assert later.plan.dropped == set(dropped)
    np.save(tmp_path / "A" / "slide_1.npy", np.array([[0, 0]]))
    for other in (replace(plan, sources=plan.sources[:3]), plan_of(tmp_path)):
        with pytest.raises(
            UserError, match=r"run that is resumed \(7 slides\), found one of [37] "
        ):
            TileStream(other, BATCH).load_state_dict(states[0])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=process)])
def test_a_corpus_of_broken_slides_is_one_line(tmp_path: Path, workers: int) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.svs").write_bytes(b"no slide")
        np.save(tmp_path / f"{name}.npy", np.zeros((1, 2), np.int64))
    plan = plan_of(tmp_path)
    expected = r"found none in 200 draws from 2 slides, the last: slide .*svs: expected a format th"
    with pytest.raises(UserError, match=expected) as raised:
        read(plan, workers=workers)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=process)])
def test_a_slide_that_changed_or_is_gone_costs_its_draws(tmp_path: Path, workers: int) -> None:
    make_tree(tmp_path)
    plan = plan_of(tmp_path, balance="slides")
    store(tmp_path / "A", tmp_path / "A" / "slide_1.tiff")
    (tmp_path / "A" / "slide_1.npy").unlink()
    plan = plan_of(tmp_path, balance="slides")
    make_tree(tmp_path / "new", 1, pixels=384)
    (tmp_path / "new" / "A" / "slide_1.tiff").replace(tmp_path / "A" / "slide_1.tiff")
    (tmp_path / "A" / "slide_2.tiff").unlink()
    np.save(tmp_path / "B" / "slide_1.npy", np.array([[9000, 0]]))
    stranger = find_sources(tmp_path / "B", {})[0]
    sources = list(plan.sources)
    sources[2] = replace(sources[2], coordinates=stranger.coordinates)
    plan = replace(plan, sources=sources)
    stream = TileStream(plan, BATCH, workers=workers)
    batches = list(stream.batches(0, 12))
    assert {slide for batch in batches for slide in batch.slides} == {3}
    reasons = {draw.slide: draw.reason for batch in batches for draw in batch.failures}
    assert "expected 512 x 512 px as when it was tiled, found 384 x 384" in reasons[0]
    assert "found nothing there" in reasons[1]
    assert "512 x 512 px, but a tile is at (9000, 0): its coordinates are of" in reasons[2]
    assert stream.slides_to_drop() == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=process)])
def test_what_a_reader_should_not_raise_is_a_bad_draw(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, workers: int
) -> None:
    def bug() -> None:
        raise ZeroDivisionError("no tiles across")

    struck(monkeypatch, "A/slide_2", bug)
    batches = read(plan_of(tree), workers=workers)
    reasons = {(draw.slide, draw.reason) for batch in batches for draw in batch.failures}
    assert reasons == {(1, "ZeroDivisionError: no tiles across")}
    assert workers or "Traceback" in caplog.text


@process
def test_a_slide_that_crashes_its_reader_is_given_up_and_dropped(
    tree: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(tree)
    struck(monkeypatch, "B/slide_1", lambda: die(signal.SIGSEGV))
    stream = TileStream(plan, BATCH, workers=2)
    batches = list(stream.batches(0, STEPS))
    assert all(len(batch.tiles) == BATCH for batch in batches)
    assert 2 not in {slide for batch in batches for slide in batch.slides}
    crashed = "the worker crashed (signal 11, SIGSEGV) at tile"
    assert crashed in stream.describe_failures()["B/slide_1"]
    assert caplog.text.count("it is tried once more") == 1
    assert stream.slides_to_drop() == [2]
    # all that follows is the same as if the slide could just not be read
    monkeypatch.undo()

    def broken() -> None:
        raise reader_module.SlideError("broken")

    struck(monkeypatch, "B/slide_1", broken)
    for found, expected in zip(batches, read(plan), strict=True):
        assert torch.equal(found.tiles, expected.tiles) and found.slides == expected.slides
        assert [bad[:3] for bad in found.failures] == [bad[:3] for bad in expected.failures]
    resumed = TileStream(plan, BATCH, workers=2)
    resumed.load_state_dict(stream.state_dict())
    struck(monkeypatch, "B/slide_1", lambda: die(signal.SIGSEGV))
    caplog.clear()
    list(resumed.batches(STEPS, STEPS + 3))
    assert "crashed" not in caplog.text, "it is not opened again"


@process
def test_a_slide_that_hangs_is_given_up_after_the_timeout(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    struck(monkeypatch, "A/slide_1", lambda: time.sleep(60))
    start = time.monotonic()
    stream = TileStream(plan_of(tree), BATCH, workers=2, read_timeout=0.7)
    batches = list(stream.batches(0, STEPS))
    assert time.monotonic() - start < 20
    assert 0 not in {slide for batch in batches for slide in batch.slides}
    assert stream.slides_to_drop() == [0]
    assert "did not answer for 0.7 s at tile" in stream.describe_failures()["A/slide_1"]


@process
def test_a_worker_that_is_killed_while_it_reads_costs_nothing(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tree)
    expected = read(plan)
    mark = tmp_path / "died"

    def once() -> None:
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)

    struck(monkeypatch, "A/slide_2", once)
    stream = TileStream(plan, BATCH, workers=2)
    assert_equal(list(stream.batches(0, STEPS)), expected)
    assert mark.exists() and not stream.slides_to_drop()


@process
def test_workers_that_die_at_no_slide_end_the_training_with_one_line(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TilePlan, "draw", lambda *_: die(signal.SIGKILL))
    with pytest.raises(UserError, match="3 decoding processes were lost one after the other"):
        read(plan_of(tree), workers=2)


@process
def test_a_mistake_of_ours_is_not_a_slide_s(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(*_: object) -> None:
        raise LookupError("in the plan")

    monkeypatch.setattr(TilePlan, "draw", mistake)
    with pytest.raises(RuntimeError, match=r"(?s)in mistake.*LookupError: in the plan"):
        read(plan_of(tree), workers=1)


@process
def test_what_is_read_ahead_is_bounded_and_memory_is_flat_in_steps(tree: Path) -> None:
    plan, before = plan_of(tree, tile_size=128), children()
    stream = TileStream(plan, BATCH, workers=2)
    batches = stream.batches(0, 10**9)
    for _ in range(20):
        next(batches)
    settled = peak_memory()
    for _ in range(200):
        next(batches)
    assert peak_memory() - settled < 10e6, "of 118 MB that went by"
    batches.close()
    assert children() <= before, "no process is left"


def test_a_batch_that_processes_cannot_share_is_refused(tree: Path) -> None:
    with pytest.raises(UserError, match="batch_size=12: expected a multiple of the 5 processes"):
        TileStream(plan_of(tree), 12, world=5)
