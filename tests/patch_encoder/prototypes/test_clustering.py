"""Clusters of slides: against scikit-learn, exact where clusters are apart, and at the edges."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score

from patch_encoder.prototypes import clustering
from patch_encoder.prototypes.clustering import Clusters, cluster_slides
from tests.patch_encoder.prototypes.references import draw_slides, inertia
from wsi_common.errors import UserError


def cluster(rows: torch.Tensor, counts: list[int], k: int = 4, **options: int) -> Clusters:
    return cluster_slides(rows, torch.tensor(counts), k, **options)


@pytest.mark.parametrize(("types", "noise"), [(4, 0.3), (6, 0.3), (4, 1.0), (6, 1.0)])
def test_inertia_is_that_of_scikit_learn(types: int, noise: float) -> None:
    """At most 1 % above ten starts of Euclidean K-means, on slides of several sizes."""
    counts = [16, 32, 60, 60, 90, 124] * 3
    rows, _ = draw_slides(counts, types, noise)
    found = cluster(rows, counts, restarts=10, iterations=50)
    totals = [0.0, 0.0]
    for slide, part in zip(rows.split(counts), found.assignment.split(counts), strict=True):
        published = KMeans(4, n_init=10, random_state=0).fit(slide.numpy())
        totals[0] += inertia(slide, part)
        totals[1] += inertia(slide, torch.from_numpy(published.labels_))
    assert totals[0] <= 1.01 * totals[1], totals[0] / totals[1]


@pytest.mark.parametrize("k", [1, 2, 4, 12])
def test_clusters_that_are_apart_are_found(k: int) -> None:
    counts = [36, 48]
    rows, kinds = draw_slides(counts, k, 0.05)
    found = cluster(rows, counts, k)
    assert found.prototypes.shape == (2, k, 32)
    for slide, members, truth in zip(
        range(2), found.assignment.split(counts), kinds.split(counts), strict=True
    ):
        assert adjusted_rand_score(truth, members) == 1
        own = rows.split(counts)[slide]
        for number in range(k):
            mean = torch.nn.functional.normalize(own[members == number].mean(0), dim=0)
            torch.testing.assert_close(found.prototypes[slide, number], mean)
            assert found.sizes[slide, number] == (members == number).sum()


def test_slides_that_are_too_small_are_ignored() -> None:
    """Slides of 0, 1 and K - 1 regions, and those below `min_regions`."""
    counts = [0, 1, 3, 4, 9, 10]
    rows, _ = draw_slides(counts, 2, 0.3)
    found = cluster(rows, counts, min_regions=10)
    assert found.ignored.tolist() == [True] * 5 + [False]
    assert cluster(rows, counts).ignored.tolist() == [True] * 3 + [False] * 3
    small = found.slides < 5
    assert (found.assignment[small] == -1).all() and (found.assignment[~small] >= 0).all()
    assert not found.prototypes[:5].any() and not found.sizes[:5].any()
    assert found.sizes[5].sum() == 10
    assert found.slides.tolist() == [s for s, n in enumerate(counts) for _ in range(n)]


def test_all_slides_may_be_ignored() -> None:
    rows, _ = draw_slides([3, 2], 1, 0.3)
    assert cluster(rows, [3, 2]).ignored.all()
    assert cluster(rows[:0], [0, 0]).ignored.all()


def test_no_cluster_stays_empty() -> None:
    """Identical regions make all centres equal, and every region belongs to the first."""
    same = torch.ones(40, 8)
    found = cluster(same, [40])
    assert sorted(found.sizes[0].tolist()) == [1, 1, 1, 37]
    unit = torch.full((4, 8), 8**-0.5)
    torch.testing.assert_close(found.prototypes[0], unit)
    # two kinds of regions for four clusters
    two = torch.eye(8)[:2].repeat_interleave(6, dim=0)
    found = cluster(two, [12])
    assert (found.sizes > 0).all() and found.sizes.sum() == 12
    for number in range(4):
        members = two[found.assignment == number]
        assert (members == members[0]).all(), "each cluster holds regions of one kind"


def test_as_many_regions_as_clusters() -> None:
    rows, _ = draw_slides([4], 4, 1.0)
    found = cluster(rows, [4])
    assert sorted(found.assignment.tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(found.prototypes[0][found.assignment], rows)


def test_a_slide_has_the_clusters_that_it_has_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever slides it is padded with, and in which groups."""
    counts = [20, 33, 47, 5]
    rows, _ = draw_slides(counts, 5, 1.0)
    together = cluster(rows, counts)
    monkeypatch.setitem(clustering.CHUNK, "cpu", 1)
    alone = cluster(rows, counts)
    assert torch.equal(alone.assignment, together.assignment)
    torch.testing.assert_close(alone.prototypes, together.prototypes)


def test_regions_without_an_embedding_are_in_no_cluster() -> None:
    """And the others have the clusters that they have without them."""
    counts = [20, 7, 5]
    rows, _ = draw_slides(counts, 3, 1.0)
    holes = torch.zeros(sum(counts), dtype=torch.bool)
    holes[[0, 4, 19, 28, 29]] = True
    found = cluster(rows * ~holes[:, None], counts)
    assert (found.assignment[holes] == -1).all()
    assert found.ignored.tolist() == [False, False, True], "three regions are left of the last"
    alone = cluster(rows[~holes], [17, 7, 3])
    assert torch.equal(found.assignment[~holes], alone.assignment)
    assert torch.equal(found.prototypes, alone.prototypes)


def test_length_and_precision_of_embeddings_do_not_count() -> None:
    rows, _ = draw_slides([30], 4, 0.3)
    found = cluster(rows, [30])
    longer = cluster(rows * torch.linspace(1, 5, 30)[:, None], [30])
    assert torch.equal(found.assignment, longer.assignment)
    torch.testing.assert_close(found.prototypes, longer.prototypes)
    assert torch.equal(found.assignment, cluster(rows.half(), [30]).assignment)


def test_the_seed_decides_and_more_restarts_are_better() -> None:
    counts = [60] * 8
    rows, _ = draw_slides(counts, 9, 1.0)

    def score(found: Clusters) -> float:
        return float((rows * found.prototypes[found.slides, found.assignment]).sum())

    first, again = cluster(rows, counts, seed=1), cluster(rows, counts, seed=1)
    assert torch.equal(first.assignment, again.assignment)
    assert torch.equal(first.prototypes, again.prototypes)
    assert not torch.equal(first.assignment, cluster(rows, counts, seed=2).assignment)
    assert score(cluster(rows, counts, restarts=20)) > score(cluster(rows, counts, restarts=1))
    assert score(cluster(rows, counts)) > score(cluster(rows, counts, iterations=1))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embeddings_that_are_no_numbers_are_refused(bad: float) -> None:
    rows, _ = draw_slides([5, 6], 2, 0.3)
    rows[7, 3] = bad
    with pytest.raises(UserError, match=r"region 7 \(in slide number 1\): .* 1 of 11") as error:
        cluster(rows, [5, 6], 2)
    assert "\n" not in str(error.value)
