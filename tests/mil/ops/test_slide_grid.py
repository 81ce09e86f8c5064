"""The grid of a slide: one step for every draw, the file before a guess, no slide too odd to train
on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mil.datasets.bags import Sample, load_bags
from mil.heatmaps.scores import score_tiles_alone
from mil.models import build, deform_mil
from mil.ops.grid import build_grid
from mil.training.engine import CLASSES, examine, train_one_epoch
from mil.training.epochs import draws
from mil.training.prediction import predict, side_inputs
from mil.training.recipes import Recipe
from patch_encoder.bags.bag import make_bag, slide_grid
from patch_encoder.bags.writer import write_bag
from patch_encoder.tiles.coordinates import FULL_GEOMETRY
from patch_encoder.tiles.slide_grid import MAX_CELLS, SlideGrid, find_grid, infer_step
from wsi_common.distributed import World

CPU = World(0, 1, torch.device("cpu"))
ODD = torch.tensor([[1000, 1000], [50001, 40003], [50002, 90000]])  # on no grid
OURS = {
    "patch_size": 256,
    "patch_size_level0": 512,
    "patch_level": 1,
    "target_size": 256,
    "overlap": 0.0,
}


def tissue(tiles: int = 400, step: int = 256, seed: int = 0) -> torch.Tensor:
    """A disc of tiles on a grid, shuffled, its uppermost and leftmost tile at (700, 900)."""
    y, x = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    inside = ((x - 20) ** 2 + (y - 20) ** 2).flatten().argsort(stable=True)[:tiles]
    cells = torch.stack((x.flatten(), y.flatten()), 1)[inside]
    order = torch.randperm(tiles, generator=torch.Generator().manual_seed(seed))
    return (cells - cells.min(0).values)[order] * step + torch.tensor([700, 900])


def deform(**options: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return build("deform_mil", 6, 2, dropout=0.0, width=16, depth=1, heads=2, points=2, **options)


@pytest.mark.parametrize("known", [False, True])
def test_every_draw_lies_where_the_whole_bag_does(known: bool) -> None:
    coords = tissue()
    whole = build_grid([coords], 2)
    attributes = OURS | {"overlap": 0.5} if known else {}
    sample = Sample("s", make_bag(torch.zeros(400, 6), coords, attributes), 0)
    alone = set()
    for _, tiles in draws([(sample, place) for place in range(30)], 6, 0):
        assert tiles is not None
        drawn = sample.load(tiles)[1]
        grid = build_grid([drawn], 2, slides=[sample.grid])
        assert grid.step == whole.step == (256.0,) and torch.equal(
            grid.positions, whole.positions[tiles]
        )
        assert torch.equal(drawn, coords[tiles])  # still level-0 pixels
        alone.add(infer_step(coords[tiles].numpy()))
    assert len(alone) > 3  # what six tiles themselves say
    again = build_grid([sample.load()[1]], 2, slides=[sample.grid])
    assert torch.equal(again.positions, whole.positions)


def test_the_model_sees_a_draw_as_a_part_of_its_bag() -> None:
    coords, tiles = tissue(), torch.arange(0, 400, 29)
    x, corners = torch.randn(400, 6), [coords[:, 0].argmin(), coords[:, 1].argmin()]
    tiles = torch.cat(
        (tiles, torch.stack(corners))
    ).unique()  # with both corners: their own grid is the bag's
    sample, model = Sample("s", make_bag(x, coords), 0), deform().eval()
    drawn = model(*sample.load(tiles), **side_inputs(model, sample))
    expected = deform(step=256.0).eval()(x[tiles], coords[tiles])
    assert torch.equal(drawn.logits, expected.logits) and torch.equal(
        drawn.attention, expected.attention
    )
    assert not torch.equal(
        drawn.logits, deform().eval()(x[tiles], coords[tiles]).logits
    )  # a guess from 16 tiles
    assert torch.equal(examine(model, sample, CPU.device).logits, model(x, coords).logits)
    own = deform(step=512.0).eval()  # what is asked for counts
    assert torch.equal(own(*sample.load(), grid=sample.grid).logits, own(x, coords).logits)


@pytest.mark.parametrize("standardize", [False, True])
def test_training_prediction_and_heatmaps_give_the_model_its_slides_grid(
    standardize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = deform(standardize=standardize)
    sample = Sample("s", make_bag(torch.randn(400, 6), tissue(), OURS), 1)  # 512 px, coords: 256
    seen: list[SlideGrid | None] = []
    build_one = deform_mil.build_grid

    def watch(coords: Any, levels: Any, step: Any, slides: list[SlideGrid | None]) -> Any:
        seen.extend(slides)
        return build_one(coords, levels, step, slides)

    monkeypatch.setattr(deform_mil, "build_grid", watch)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    train_one_epoch(model, [sample], optimizer, Recipe(max_tiles=6), CPU, [0])
    predict(model, [sample], CPU.device)
    examine(model, sample, CPU.device)
    assert seen == [SlideGrid(512.0, (700, 900))] * 3


def test_other_models_never_ask_for_the_grid() -> None:
    class Sealed(Sample):
        @property
        def grid(self) -> None:  # type: ignore[override]
            raise AssertionError("the grid was looked for")

    model = build("abmil", 6, 2, standardize=True)
    sample = Sealed("s", make_bag(torch.randn(9, 6), tissue(9)), 0)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    train_one_epoch(model, [sample], optimizer, Recipe(), CPU, [0])
    predict(model, [sample], CPU.device)
    examine(model, sample, CPU.device)


def test_a_tile_alone_is_a_bag_of_its_own() -> None:
    coords, x, model = tissue(5), torch.randn(5, 6), deform().eval()
    found = score_tiles_alone(model, CLASSES, Sample("s", make_bag(x, coords), 0), CPU.device)
    expected = [model(x[i : i + 1], coords[i : i + 1]).logits.softmax(0).tolist() for i in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("attributes", "step"),
    [
        (OURS, 512.0),
        (OURS | {"overlap": 0.25}, 384.0),
        (OURS | {"step_level0": 300}, 300.0),
        # TRIDENT's, in px after resampling
        ({"patch_size": 256, "patch_size_level0": 1024, "overlap": 64}, 768.0),
        ({"patch_size": 1, "patch_level": 0, FULL_GEOMETRY: json.dumps(OURS | dict.fromkeys(
            ("target_mpp", "mpp", "level0_width", "level0_height"), 0) | {"name": "s"})}, 512.0),
        ({"patch_size": 512, "patch_level": 0}, 256.0),  # CLAM's says nothing of the step
        ({"patch_size": "large", "patch_level": 0}, 256.0),
        ({"patch_size": 0, "patch_size_level0": 512, "overlap": 0}, 256.0),
        (OURS | {"overlap": float("nan")}, 256.0),
        ({}, 256.0),
    ],
)  # fmt: skip
def test_what_the_file_states_comes_before_what_coords_say(
    attributes: dict[str, Any], step: float
) -> None:
    bag = make_bag(torch.zeros(400, 6), tissue(), attributes)
    assert slide_grid(bag) == SlideGrid(step, (700, 900))


def test_coords_refine_a_stated_step_that_is_no_whole_number() -> None:
    x = (np.arange(300) * 512.4).round().astype(np.int64)
    coords = torch.from_numpy(np.stack((x, 0 * x), 1))
    grid = slide_grid(make_bag(torch.zeros(300, 6), coords, OURS))
    assert grid is not None and grid.step == pytest.approx(512.4, abs=0.01)
    positions = build_grid([coords], slides=[grid]).positions[:, 0]
    assert torch.equal(positions, torch.arange(300.0))


def test_bags_from_files_know_their_step(tmp_path: Path) -> None:
    write_bag(tmp_path / "a.h5", np.ones((400, 6), np.float32), tissue(step=700).numpy(), OURS)
    write_bag(tmp_path / "b.h5", np.ones((400, 6), np.float32), tissue(step=700).numpy(), {})
    torch.save({"features": torch.ones(3, 6), "coords": ODD}, tmp_path / "c.pt")
    bags = load_bags({name: next(tmp_path.glob(f"{name}.*")) for name in "abc"})
    steps = {slide: Sample(slide, bag, 0).grid.step for slide, bag in bags.items()}
    assert steps == {"a": 512.0, "b": 700.0, "c": 49001.0}
    assert bags["c"].coords.tolist() == ODD.tolist()
    assert Sample("s", make_bag(torch.zeros(3, 6)), 0).grid is None


@pytest.mark.parametrize(
    ("coords", "step"),
    [
        (ODD.tolist(), 49001.0),
        ([[0, 0], [1, 5000]], 5000.0),  # not a pixel
        ([[0, 0], [1, 30000], [2, 70000]], 30000.0),
        ([[0, 0], [300, 0], [1013, 1117], [2033, 77], [100, 2003]], 913.0),  # one pair in a row
        ([[0, 0], [25600, 51200], [25856, 128000]], 256.0),  # far apart, but all on a grid of 256
        ([[0, 0], [1, 0], [2, 0], [1, 1], [9, 9]], 1.0),
    ],
)
def test_a_distance_by_accident_is_no_step(coords: list[list[int]], step: float) -> None:
    assert infer_step(np.array(coords)) == step
    assert infer_step(np.array(coords), side=224) == (224.0 if step > 256 else step)


@pytest.mark.parametrize("count", [2, 30, 2000])
def test_tiles_on_no_grid_get_cells_of_their_density(count: int) -> None:
    coords = torch.randint(0, 100_000, (count, 2), generator=torch.Generator().manual_seed(count))
    assert 1 <= build_grid([coords]).index.shapes.prod() <= 64 * count


@pytest.mark.parametrize("max_tiles", [0, 2])
def test_three_tiles_on_no_grid_are_trained_on(max_tiles: int) -> None:
    aligned = Sample("good", make_bag(torch.randn(400, 6), tissue()), 1)
    far = torch.tensor(
        [[0, 0], [1, 0], [2, 0], [1, 1], [10_000_000, 10_000_000]]
    )  # a map of 1 px would not fit
    samples = [
        Sample("odd", make_bag(torch.randn(3, 6), ODD), 0),
        aligned,
        Sample("far", make_bag(torch.randn(5, 6), far), 0),
    ]
    model = deform()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    assert np.isfinite(
        train_one_epoch(model, samples, optimizer, Recipe(max_tiles=max_tiles), CPU, [0, 1, 2])
    )


def test_cells_become_coarser_until_the_map_fits_and_it_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    coords = torch.tensor([[0, 0], [1_000_000, 1_000_000]])
    grid = find_grid(coords.numpy(), 16)
    assert grid.step == 128.0
    assert build_grid([coords], slides=[grid]).index.shapes.prod() < MAX_CELLS
    assert caplog.text.count("16 px apart; cells are 128 px") == 1
