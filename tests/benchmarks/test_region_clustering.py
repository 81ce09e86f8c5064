"""The benchmark of the prototypes on a few tiny slides: contestants do the same work, and all have
figures.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from benchmarks import region_clustering
from benchmarks.region_clustering import (
    assign_pair_by_pair,
    cluster_one_by_one,
    cluster_together,
    crop_one_by_one,
    draw_embeddings,
    measure_inertia,
    try_permutations,
)
from patch_encoder.prototypes.neighbours import find_neighbours
from patch_encoder.prototypes.region_view_recipe import RegionViewRecipe


def test_contestants_have_figures(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    arguments = ["--slides", "3", "--regions", "8", "--batch", "2", "--rounds", "1", "--json"]
    threads = ["--threads", str(torch.get_num_threads())]
    monkeypatch.setattr(sys, "argv", ["region_clustering.py", *arguments, *threads])
    monkeypatch.setattr(region_clustering, "WIDTH", 4)
    region_clustering.main()
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert {title: len(rows) for title, rows in figures.items()} == {
        "views": 3,
        "clustering": 2,
        "neighbours": 3,
    }
    for rows in figures.values():
        assert next(iter(rows.values()))["ratio"] == 1
        assert all(row["ms"] > 0 for row in rows.values())
    assert figures["clustering"]["ours"]["inertia"] == pytest.approx(1, abs=0.05)


def test_all_cluster_and_find_alike() -> None:
    embeddings = draw_embeddings(6, 40)
    ours, published = cluster_together(embeddings), cluster_one_by_one(embeddings)
    assert ours.shape == published.shape == (6, 40)
    ratio = measure_inertia(embeddings, ours) / measure_inertia(embeddings, published)
    assert ratio.mean() == pytest.approx(1, abs=0.02)
    prototypes = draw_embeddings(20, 4)
    nearest = find_neighbours(prototypes, torch.zeros(20).bool(), list(map(str, range(20))))
    expected = nearest.slides[:, 0].numpy()
    np.testing.assert_array_equal(try_permutations(prototypes), expected)
    np.testing.assert_array_equal(assign_pair_by_pair(prototypes), expected)


def test_the_crop_loop_makes_the_published_views() -> None:
    views = crop_one_by_one([torch.randn(4, 16, 16)] * 3, RegionViewRecipe())
    assert [tuple(v.shape) for v in views] == [(3, 4, 14, 14)] * 2 + [(3, 4, 6, 6)] * 8
