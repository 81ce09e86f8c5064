"""Which slides are like a slide, and what is shown of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from patch_encoder.region_page.region_vectors import RegionVectors
from patch_encoder.region_page.retrieval import (
    Retrieval,
    choose_shown,
    find_shown,
    measure_agreements,
    retrieve,
)
from wsi_common.errors import UserError

K, WIDTH = 3, 8
# tissue types per slide, and who it is of
TISSUES = {"a0": (0, 1, 2), "a1": (0, 1, 2), "b0": (3, 4, 5), "b1": (5, 3, 4), "few": (0,)}


def make_vectors(cases: dict[str, str] | None = None) -> RegionVectors:
    """Slides whose regions lie around the directions of their tissue types: 4, 3, ... of each."""
    rng = np.random.default_rng(0)
    directions = np.eye(WIDTH)
    vectors, counts = [], []
    for types in TISSUES.values():
        rows = [directions[t] for place, t in enumerate(types) for _ in range(4 - place)]
        vectors += [rng.permutation(np.array(rows)) + 0.05 * rng.normal(size=(len(rows), WIDTH))]
        counts.append(len(rows))
    return RegionVectors(
        list(TISSUES),
        np.array(counts),
        torch.from_numpy(np.concatenate(vectors)).float(),
        np.zeros((sum(counts), 2), np.int64),
        [64] * len(TISSUES),
        [name[0] for name in TISSUES],
        [(cases or {}).get(name, name) for name in TISSUES],
        "tiny",
    )


def find(cases: dict[str, str] | None = None, **settings) -> Retrieval:
    given = {"k": K, "min_regions": 5, "count": 2, "centre": "none", "seed": 0} | settings
    return retrieve(make_vectors(cases), **given)


def test_neighbours_share_tissues_and_partners_are_of_one_type():
    found = find()
    assert found.kept == [0, 1, 2, 3] and found.neighbours(0)[0] == 1
    assert found.neighbours(3)[0] == 2 and found.neighbours(4) == []
    for slide, place in ((0, 0), (2, 0), (1, 1)):
        other = found.near.slides[slide, place]
        cosines = (found.clusters.prototypes[slide] @ found.clusters.prototypes[other].T).numpy()
        rows, columns = linear_sum_assignment(cosines, maximize=True)
        assert found.near.partner[slide, place].tolist() == columns.tolist()
        np.testing.assert_allclose(found.cosines[slide, place], cosines[rows, columns], atol=1e-6)
        assert found.similarity(slide, place) == pytest.approx(cosines[rows, columns].mean())
    assert found.similarity(0, 0) > 0.95 > 0.3 > found.similarity(0, 1)


def test_slides_of_one_patient_are_not_neighbours():
    found = find({"a0": "x", "a1": "x"})
    assert 1 not in found.neighbours(0) and 0 not in found.neighbours(1)
    with pytest.raises(UserError, match=r"min_regions=5, clusters=3: .* two patients .* found 1"):
        find(dict.fromkeys(TISSUES, "x"))
    with pytest.raises(UserError, match="found 0; the largest of 5 slides has 9 regions"):
        find(min_regions=50)


def test_typical_regions_are_nearest_to_their_prototype_and_of_their_slide():
    found = find()
    for slide in found.kept:
        order = found.order_clusters(slide)
        sizes = found.clusters.sizes[slide, order].tolist()
        assert sizes == [4, 3, 2]
        for cluster, size in zip(order, sizes, strict=True):
            numbers = found.list_typical(slide, cluster, 9)
            part = found.regions.regions(slide)
            assert len(numbers) == size and all(part.start <= n < part.stop for n in numbers)
            closeness = found.units[numbers] @ found.clusters.prototypes[slide, cluster]
            assert closeness.tolist() == sorted(closeness.tolist(), reverse=True)
            kinds = found.regions.vectors[numbers].argmax(1)
            assert len(set(kinds.tolist())) == 1
    assert found.list_typical(0, 0, 1) == found.list_typical(0, 0, 9)[:1]


def test_an_offset_of_the_slide_is_taken_off():
    regions = make_vectors()
    offset = torch.zeros(len(regions.vectors), WIDTH)
    for slide in (0, 2):  # two slides of other tissues have one stain
        offset[regions.regions(slide), 7] = 4.0
    regions.vectors.add_(offset)
    plain = retrieve(regions, K, 5, 1, "none", 0)
    centred = retrieve(regions, K, 5, 1, "slide", 0)
    assert plain.neighbours(0) == [2] and centred.neighbours(0) == [1]
    part = regions.regions(0)
    rows = F.normalize(regions.vectors[part], dim=1)
    expected = F.normalize(rows - rows.mean(0), dim=1)
    torch.testing.assert_close(centred.units[part], expected)


def test_agreement_is_counted_beside_mean_vectors_and_chance():
    found = find(count=1)
    shares = measure_agreements(found)
    assert shares["prototypes"] == shares["mean vectors"] == 1.0
    assert shares["chance"] == pytest.approx(1 / 3)
    found.regions.labels[0] = ""
    assert measure_agreements(found) == {}


def test_shown_slides_are_drawn_over_labels_or_named():
    found = find()
    drawn = choose_shown(found, 2, seed=0)
    assert sorted(found.regions.labels[slide] for slide in drawn) == ["a", "b"]
    assert choose_shown(found, 2, seed=0) == drawn and len(choose_shown(found, 99, 1)) == 4
    assert find_shown(found, ["b1", "a0"]) == [3, 0]
    with pytest.raises(UserError, match="show=c9: expected a slide with a bag, found none among 5"):
        find_shown(found, ["c9"])
    with pytest.raises(UserError, match="show=few: .* found 4; lower min_regions"):
        find_shown(found, ["few"])
