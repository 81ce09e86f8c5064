"""Similarity of slides against scipy, optimal transport and brute force; who may be a neighbour."""

from __future__ import annotations

import numpy as np
import ot
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from patch_encoder.prototypes import neighbours
from patch_encoder.prototypes.neighbours import (
    Neighbours,
    compare_slides,
    find_neighbours,
    match_prototypes,
    sum_best_matching,
)
from tests.patch_encoder.prototypes.references import best_by_trying, random_units


def find(prototypes: Tensor, count: int = 1, **options: object) -> Neighbours:
    """Neighbours of slides, each of a patient of its own, none ignored unless it is said."""
    cases = options.pop("cases", [str(slide) for slide in range(len(prototypes))])
    ignored = options.pop("ignored", torch.zeros(len(prototypes), dtype=torch.bool))
    return find_neighbours(prototypes, ignored, cases, count, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [2, 3, 4, 5, 8, 9, 16])
def test_similarity_is_assignment_and_optimal_transport(k: int) -> None:
    slides = random_units(7, k, 24, seed=k)
    found = compare_slides(slides).numpy()
    for i in range(7):
        for j in range(7):
            cosines = (slides[i] @ slides[j].T).numpy()
            assigned = cosines[linear_sum_assignment(cosines, maximize=True)].sum()
            assert found[i, j] == pytest.approx(assigned, abs=1e-6)
            uniform = np.full(k, 1 / k)
            transport = ot.emd2(uniform, uniform, 1 - cosines)
            assert found[i, j] == pytest.approx(k * (1 - transport), abs=1e-6)
            if k <= 4:
                assert found[i, j] == pytest.approx(best_by_trying(cosines), abs=1e-12)
    np.testing.assert_allclose(found.diagonal(), k, atol=1e-6)
    np.testing.assert_array_equal(found, found.T)


def test_both_ways_to_match_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    slides = random_units(9, 6, 12).float()
    table = compare_slides(slides)
    monkeypatch.setattr(neighbours, "LARGEST_TABLE", 5)
    torch.testing.assert_close(compare_slides(slides), table)
    monkeypatch.setattr(neighbours, "PAIRS", 1)
    torch.testing.assert_close(compare_slides(slides), table)


def test_matching_takes_the_sum_and_not_the_best_pair() -> None:
    """Greedily the first row would take .9, and leave -1 to the second: -.1 in all."""
    cosines = torch.tensor([[0.9, 0.8], [0.7, -1.0]])
    assert sum_best_matching(cosines[..., None]).item() == pytest.approx(1.5)
    assert match_prototypes(cosines[None].numpy()).tolist() == [[1, 0]]


@pytest.mark.parametrize("target", ["matched", "greedy"])
def test_the_order_of_prototypes_changes_nothing(target: str) -> None:
    slides = random_units(12, 4, 8)
    order = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(s))
                         for s in range(12)])  # fmt: skip
    shuffled = slides[torch.arange(12)[:, None], order]
    torch.testing.assert_close(compare_slides(shuffled), compare_slides(slides))
    plain, other = find(slides, 2, target=target), find(shuffled, 2, target=target)
    assert torch.equal(plain.slides, other.slides)
    for slide in range(12):
        for place, near in enumerate(plain.slides[slide].tolist()):
            # in terms of the slides' own numbers both name the same pairs
            back = order[near][other.partner[slide, place]]
            assert torch.equal(back, plain.partner[slide, place][order[slide]])


def test_neighbours_are_other_slides_of_other_patients_with_prototypes() -> None:
    one = random_units(1, 3, 16)
    slides = torch.cat([one, one, one, one, random_units(2, 3, 16, seed=1)])
    slides[3] = 0
    ignored = torch.tensor([0, 0, 0, 1, 0, 0], dtype=torch.bool)
    found = find(slides, 5, ignored=ignored, cases=["a", "a", "b", "c", "d", "d"])
    assert found.slides[0, 0] == 2, "the same prototypes, but of another patient"
    assert found.slides[2, :2].tolist() == [0, 1], "equally similar: the first"
    assert sorted(found.slides[0].tolist()) == [-1, -1, 2, 4, 5]
    assert found.slides[3].tolist() == [-1] * 5
    assert sorted(found.slides[4].tolist()) == [-1, -1, 0, 1, 2]
    assert (found.partner[3] == -1).all()
    assert torch.equal((found.partner >= 0).all(-1), found.slides >= 0)
    assert torch.equal((found.partner < 0).all(-1), found.slides < 0)


def test_two_identical_slides_are_each_others_neighbour() -> None:
    """The published code takes a slide's best match for the slide itself, and so returns it."""
    for seed in range(20):
        one = random_units(1, 4, 16, seed=seed).float()
        slides = torch.cat([random_units(3, 4, 16, seed=99).float(), one, one])
        found = find(slides)
        assert found.slides[3:, 0].tolist() == [4, 3]
        assert found.partner[3, 0].tolist() == [0, 1, 2, 3]


def test_more_neighbours_come_in_their_order() -> None:
    slides = random_units(30, 4, 8)
    found = find(slides, 3)
    similarity = compare_slides(slides).fill_diagonal_(-9)
    assert torch.equal(found.slides, similarity.topk(3).indices)
    assert torch.equal(find(slides, 1).slides, found.slides[:, :1])


@pytest.mark.parametrize("count", [0, 1, 2])
def test_without_other_slides_there_are_no_neighbours(count: int) -> None:
    found = find(random_units(count, 4, 8), 3, cases=["a"] * count)
    assert (found.slides == -1).all() and found.slides.shape == (count, 3)
    assert (found.partner == -1).all() and found.partner.shape == (count, 3, 4)


def test_greedy_partners_may_be_shared_and_matched_ones_not() -> None:
    axes = torch.eye(4)
    near = torch.nn.functional.normalize(axes[:1] + 0.1 * axes, dim=1)  # all closest to axis 0
    slides = torch.stack([near, axes])
    assert find(slides, target="greedy").partner[0, 0].tolist() == [0, 0, 0, 0]
    assert find(slides, target="matched").partner[0, 0].tolist() == [0, 1, 2, 3]


def test_random_slides_share_greedy_partners_as_often_as_we_say() -> None:
    """Among unit vectors 93 % of pairs of slides at K = 4, and about half at K = 2."""
    for k, share in ((2, 0.51), (4, 0.93)):
        pairs = random_units(400, 2, k, 64, seed=k)
        partners = torch.cat([find(pair, target="greedy").partner[:1, 0] for pair in pairs])
        shared = (partners.sort().values.diff() == 0).any(-1).double().mean().item()
        assert shared == pytest.approx(share, abs=0.05)
