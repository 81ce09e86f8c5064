"""The plan of a training: what it draws, how often, and that nothing but its arguments decides."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from patch_encoder.tile_stream.plan import TilePlan
from patch_encoder.tile_stream.tissue_cover import TissueCover, sort_by_band
from tests.patch_encoder.tile_stream.corpus import SIDE, grid, source
from wsi_common.counters import hash_counters, permutation, uniform
from wsi_common.errors import UserError
from wsi_common.memory import peak_memory

SLIDES = [
    source("a", grid(640, 640), subdataset="x", size=(640, 640)),  # 100 tiles
    source("b", grid(320, 320), subdataset="x", size=(320, 320)),  # 25
    source("c", grid(320, 320), subdataset="y", size=(320, 320), mpp=1.0),  # 25
]


def shares(plan: TilePlan, count: int = 6000) -> np.ndarray:
    """How often each slide is drawn."""
    drawn = Counter(plan.draw(index).slide for index in range(count))
    return np.array([drawn[number] / count for number in range(len(plan.sources))])


@pytest.mark.parametrize(
    ("balance", "expected"),
    [
        ("tiles", (100 / 150, 25 / 150, 25 / 150)),
        ("slides", (1 / 3, 1 / 3, 1 / 3)),
        ("subdatasets", (0.5 * 0.8, 0.5 * 0.2, 0.5)),
    ],
)
def test_slides_are_drawn_as_often_as_the_balance_says(
    balance: str, expected: tuple[float, ...]
) -> None:
    plan = TilePlan(SLIDES, balance=balance, tile_size=SIDE, tiles_per_visit=1)
    assert shares(plan) == pytest.approx(np.array(expected), abs=0.025)  # 4 standard errors


def test_a_draw_depends_on_nothing_but_its_arguments() -> None:
    plan = TilePlan(SLIDES, seed=5, tile_size=SIDE)
    forward = [plan.draw(index) for index in range(300)]
    again = replace(plan)
    assert [again.draw(index) for index in reversed(range(300))] == forward[::-1]
    assert [replace(plan, seed=6).draw(index) for index in range(300)] != forward
    assert plan.draw(10**15) == again.draw(10**15), "in constant time, wherever it is"
    assert len({plan.draw(7, attempt)[2:] for attempt in range(20)}) == 20, "other places"


def test_a_visit_draws_its_tiles_from_one_slide_and_a_block_mixes_visits() -> None:
    plan = TilePlan(SLIDES, tile_size=SIDE, balance="slides", open_slides=8, tiles_per_visit=4)
    for block in range(20):
        indices = range(block * 32, block * 32 + 32)
        visits = [plan.visit(index) for index in indices]
        assert Counter(visits) == {block * 8 + number: 4 for number in range(8)}
        slides = {(visit, plan.draw(index).slide) for visit, index in zip(visits, indices)}
        assert len(slides) == 8
        assert visits != sorted(visits)
    first = [plan.visit(index) % 8 for index in range(32)]
    assert first != [plan.visit(index) % 8 for index in range(32, 64)]


def test_positions_fill_the_tissue_evenly_and_stay_in_the_slide() -> None:
    plan = TilePlan(SLIDES[:1], tile_size=SIDE, jitter=0.5, tissue_share=0.0)
    draws = [plan.draw(index) for index in range(4000)]
    x, y = np.array([(draw.x, draw.y) for draw in draws]).T
    assert min(x.min(), y.min()) == 0 and max(x.max(), y.max()) == 640 - SIDE
    assert len(set(x.tolist())) > 400, "not the corners alone"
    inside = x[(x > 0) & (x < 640 - SIDE)]
    histogram = np.histogram(inside % SIDE, 8, (0, SIDE))[0] / len(inside)
    assert histogram == pytest.approx(1 / 8, abs=0.025)
    still = [replace(plan, jitter=0.0).draw(index) for index in range(200)]
    assert {(draw.x % SIDE, draw.y % SIDE) for draw in still} == {(0, 0)}


def test_of_a_slide_of_unknown_size_no_tile_leaves_the_stored_ones() -> None:
    plan = TilePlan([source("a", grid(320, 320) + 64)], tile_size=SIDE, tissue_share=0.0)
    corners = np.array([plan.draw(index)[4:6] for index in range(500)])
    assert corners.min() == 64 and corners.max() == 64 + 320 - SIDE


def test_enough_of_every_tile_is_tissue() -> None:
    """A lone tile in the middle of nowhere."""
    lone = source("a", np.array([[320, 320], [0, 0]]), size=(640, 640))
    plan = TilePlan([lone], tile_size=SIDE, jitter=1.0, tissue_share=0.6)
    cover = TissueCover(lone.coordinates.coords, SIDE)
    found = [cover.share(draw.x, draw.y, draw.side) for draw in map(plan.draw, range(300))]
    assert min(found) >= 0.6 and len(set(found)) > 30
    loose = replace(plan, tissue_share=0.0)
    assert min(cover.share(d.x, d.y, d.side) for d in map(loose.draw, range(300))) < 0.2
    # a quarter at most is tissue at twice the side: the best place that was found is taken
    coarse = replace(plan, mpps=(1.0,), jitter=0.0)
    assert {cover.share(d.x, d.y, d.side) for d in map(coarse.draw, range(50))} == {0.25}


def test_the_cover_is_the_union_of_the_tiles() -> None:
    rng = np.random.default_rng(0)
    corners = rng.integers(-40, 600, (150, 2))
    painted = np.zeros((1000, 1000), bool)
    for x, y in corners + 100:
        painted[y : y + SIDE, x : x + SIDE] = True
    order = sort_by_band(corners, SIDE)
    assert order.dtype == np.int32 and sort_by_band(order, SIDE) is order
    assert sorted(map(tuple, order.tolist())) == sorted(map(tuple, corners.tolist()))
    cover = TissueCover(order, SIDE)
    for x, y, side in zip(*rng.integers(-90, 700, (2, 400)), rng.integers(1, 190, 400)):
        expected = painted[y + 100 : y + 100 + side, x + 100 : x + 100 + side].mean()
        assert cover.share(int(x), int(y), int(side)) == pytest.approx(expected, abs=1e-12)


def test_resolutions_are_drawn_by_their_weights_from_slides_that_have_them() -> None:
    plan = TilePlan(
        SLIDES, tile_size=32, mpps=(0.5, 1.0, 2.0), mpp_weights=(2.0, 1.0, 1.0), tiles_per_visit=1
    )
    draws = [plan.draw(index) for index in range(6000)]
    drawn = Counter(draw.mpp for draw in draws)
    assert [drawn[mpp] / 6000 for mpp in plan.mpps] == pytest.approx([0.5, 0.25, 0.25], abs=0.025)
    assert plan.count_left_out() == {0.5: 1, 1.0: 0, 2.0: 0}
    assert {draw.slide for draw in draws if draw.mpp == 0.5} == {0, 1}, "not the coarser one"
    assert {(draw.slide == 2, draw.mpp, draw.side) for draw in draws} == {
        (False, 0.5, 32),
        (False, 1.0, 64),
        (False, 2.0, 128),
        (True, 1.0, 32),
        (True, 2.0, 64),
    }
    centred = replace(plan, mpps=(2.0,), mpp_weights=(), jitter=0.0, tissue_share=0.0)
    inner = [d for d in map(centred.draw, range(300)) if d.slide == 0 and 0 < d.x < 640 - 128]
    assert {(draw.x + 64 - 32) % SIDE for draw in inner} == {0}, "around a stored tile's centre"


def test_slides_that_leave_are_not_drawn_and_the_others_keep_their_numbers() -> None:
    plan = TilePlan(SLIDES, tile_size=SIDE, tiles_per_visit=1).without([0])
    assert shares(plan) == pytest.approx(np.array([0, 0.5, 0.5]), abs=0.03)
    assert plan.without([1]).dropped == {0, 1}
    with pytest.raises(UserError, match=r"found none of 3 \(3 left out since they cannot be read"):
        plan.without([1, 2])
    with pytest.raises(UserError, match=r"none at 0.5 um per px or finer of 3"):
        TilePlan(SLIDES, mpps=(1.0, 0.5)).without([0, 1])


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"balance": "cases"}, "balance=cases: expected one of tiles, slides, subdatasets"),
        ({"mpp_weights": (1.0,)}, r"mpp_weights=\[1.0\]: expected a number of at least 0 for each"),
        ({"mpps": (0.5,), "mpp_weights": (0.0,)}, "mpp_weights"),
        ({"mpps": (0.5, -1.0)}, "mpps=.*: expected um per px above 0"),
        ({"jitter": 1.5}, "jitter=1.5, tissue_share=0.4: expected shares"),
        ({"tissue_share": -0.1}, "expected shares"),
        ({"tiles_per_visit": 0}, "tiles_per_visit=0: expected at least 1"),
        ({"tile_size": 0}, "tile_size=0: expected at least 1"),
    ],
)
def test_values_out_of_range_are_refused(keys: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        TilePlan(SLIDES, **keys)  # type: ignore[arg-type]


def test_numbers_of_counters_are_uniform_and_independent() -> None:
    states = [hash_counters(3, a, b) for a, b in itertools.product(range(60), range(60))]
    assert len(set(states)) == 3600
    first, second = (np.array([uniform(state, number) for state in states]) for number in (0, 1))
    for numbers in (first, second):
        assert np.histogram(numbers, 10, (0, 1))[0] == pytest.approx(360, abs=80)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.06
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06
    assert sorted(permutation(states[0], 100)) == list(range(100))
    assert hash_counters(1, 2) != hash_counters(2, 1) != hash_counters(-1, 1)


def test_ten_thousand_slides_cost_their_corners_and_no_time() -> None:
    """10,000 slides of 10,000 tiles; the corners are one array here, 80 MB if there were copies."""
    corners = sort_by_band(grid(6400, 6400), SIDE)
    many = [
        source(f"{n}", corners, subdataset=f"{n % 9}", size=(6400, 6400)) for n in range(10_000)
    ]
    before = peak_memory()
    plan = TilePlan(many, tile_size=SIDE, balance="subdatasets", mpps=(0.5, 1.0))
    plan.draw(0)
    assert peak_memory() - before < 60e6
    few = replace(plan, sources=many[:10])
    few.draw(0)

    def seconds(of: TilePlan) -> float:
        start = time.process_time()
        for index in range(1500):
            of.draw(index)
        return time.process_time() - start

    assert min(seconds(plan) for _ in range(3)) < 2 * min(seconds(few) for _ in range(3))
