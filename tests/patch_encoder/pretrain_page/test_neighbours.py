"""Neighbours are those of a plain loop and never of the own slide; planes are principal ones."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics.pairwise import cosine_similarity

from patch_encoder.pretrain_page import neighbours
from patch_encoder.pretrain_page.gallery import make_gallery
from patch_encoder.pretrain_page.neighbours import (
    choose_queries,
    find_neighbours,
    measure_agreement,
    measure_chance,
    scale_to_unit,
)
from patch_encoder.pretrain_page.projection import draw_planes, project_on_principal_plane

RNG = np.random.default_rng(0)
FEATURES = RNG.normal(size=(60, 7)).astype(np.float32)
SLIDES = [f"s{number % 5}" for number in range(60)]


def test_neighbours_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "BLOCK", 16)  # several blocks
    found = find_neighbours(scale_to_unit(FEATURES), SLIDES, 5)
    similar = cosine_similarity(FEATURES)
    for row in range(60):
        others = [other for other in range(60) if SLIDES[other] != SLIDES[row]]
        expected = sorted(others, key=lambda other: -similar[row, other])[:5]
        assert found[row].tolist() == expected
        assert all(SLIDES[other] != SLIDES[row] for other in found[row])


def test_a_slide_that_has_nearly_all_tiles_leaves_fewer_neighbours() -> None:
    groups = ["a"] * 57 + ["b", "c", "c"]
    assert find_neighbours(FEATURES, groups, 5).shape == (60, 3)
    assert find_neighbours(FEATURES, ["a"] * 60, 5).shape == (60, 0)


def test_agreement_beside_chance() -> None:
    labels, groups = ["x", "x", "y", "y"], ["a", "b", "c", "c"]
    found = np.array([[1, 2], [0, 2], [0, 1], [1, 0]])
    assert measure_agreement(found, labels) == pytest.approx(2 / 8)
    # of the others, one in three, one in three, none, none
    assert measure_chance(groups, labels) == pytest.approx((1 / 3 + 1 / 3) / 4)


def test_queries_are_of_different_slides_and_drawn_by_the_seed() -> None:
    chosen = choose_queries(SLIDES, 4, seed=3)
    assert len({SLIDES[row] for row in chosen}) == 4
    assert chosen == choose_queries(SLIDES, 4, seed=3) != choose_queries(SLIDES, 4, seed=4)
    assert len(choose_queries(SLIDES, 9, seed=0)) == 5


def test_the_gallery_shows_neighbours_by_each_space_and_marks_labels() -> None:
    pictures = RNG.integers(0, 255, (60, 16, 16, 3), dtype=np.uint8)
    labels = ["x" if number < 30 else "y" for number in range(60)]
    told = np.array([[float(label == "x")] for label in labels])  # knows the label
    gallery = make_gallery(pictures, {"told": told, "noise": FEATURES}, SLIDES, labels, 0)
    assert gallery.agreement["told"] == 1.0 > gallery.agreement["noise"]
    assert gallery.agreement["chance"] == pytest.approx(measure_chance(SLIDES, labels))
    assert len(gallery.rows) == 5 and gallery.tiles == 60
    for row in gallery.rows:
        assert list(row.found) == ["told", "noise"] and all(tile.same for tile in row.found["told"])
        assert all(tile.name != row.query.name for tile in row.found["noise"])
    unknown = make_gallery(pictures, {"noise": FEATURES}, SLIDES, [""] * 60, 0)
    assert not unknown.agreement and not unknown.rows[0].found["noise"][0].same


def test_the_plane_is_that_of_scikit_learn() -> None:
    points, shares = project_on_principal_plane(FEATURES)
    plane = PCA(2, svd_solver="full").fit(FEATURES)
    expected = plane.transform(FEATURES)
    signs = np.sign((points * expected).sum(0))
    np.testing.assert_allclose(points, expected * signs, atol=1e-5)
    np.testing.assert_allclose(shares, plane.explained_variance_ratio_, rtol=1e-5)
    # mirrored features have the mirrored plane, not another one
    np.testing.assert_allclose(project_on_principal_plane(-FEATURES)[0], -points, atol=1e-9)
    assert project_on_principal_plane(FEATURES[:1])[0].tolist() == [[0.0, 0.0]]
    assert project_on_principal_plane(FEATURES[:, :1])[0].shape == (60, 2)


def test_umap_stands_beside_it_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def make(**options: object) -> SimpleNamespace:
        asked.update(options)
        return SimpleNamespace(fit_transform=lambda features: features[:, 2:4])

    module = ModuleType("umap")
    module.UMAP = make  # type: ignore[attr-defined]
    module.__spec__ = SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "umap", module)
    figure = draw_planes(FEATURES, {"slide": SLIDES, "label": ["x", "y"] * 30}, seed=7)
    assert [axes.get_xlabel() for axes in figure.axes] == ["PC 1", "UMAP 1"] * 2
    assert asked["random_state"] == 7 and asked["metric"] == "cosine"
    assert figure.axes[3].get_legend().get_title().get_text() == "label"
    few = draw_planes(FEATURES[:10], {"slide": SLIDES[:10]}, seed=7)
    assert [axes.get_xlabel() for axes in few.axes] == ["PC 1"]
