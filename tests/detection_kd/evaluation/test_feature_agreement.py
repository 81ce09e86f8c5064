"""Agreement of student and teacher against scikit-learn, against loops, and on cases with a known
answer.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score
from sklearn.neighbors import NearestNeighbors

from detection_kd.evaluation import feature_agreement as metrics


def features(tiles: int = 60, width: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(tiles, width, generator=generator) * torch.arange(1, width + 1) + 2
    return teacher + torch.randn(tiles, width, generator=generator), teacher


def test_r2_is_scikit_learns_and_undefined_where_the_teacher_is_constant() -> None:
    student, teacher = features()
    expected = r2_score(teacher.numpy(), student.numpy(), multioutput="raw_values")
    assert metrics.compute_r2_by_dimension(student, teacher).numpy() == pytest.approx(
        expected, abs=1e-5
    )
    weighted = r2_score(teacher.numpy(), student.numpy(), multioutput="variance_weighted")
    assert metrics.feature_agreement(student, teacher)["r2"] == pytest.approx(weighted, abs=1e-5)
    teacher[:, 2] = 0.1
    r2 = metrics.compute_r2_by_dimension(student, teacher)
    assert r2.isnan().nonzero().tolist() == [[2]]
    known = np.delete(r2.numpy(), 2)
    quantiles = metrics.compute_r2_quantiles(r2)
    assert [quantiles[name] for name in ("r2_p10", "r2_median", "r2_p90")] == pytest.approx(
        np.quantile(known, [0.1, 0.5, 0.9])
    )


@pytest.mark.parametrize("block", [7, 60, 2048])
def test_neighbours_are_scikit_learns(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", block)
    student, teacher = features()
    found = {}
    for name, x in (("student", student), ("teacher", teacher)):
        oracle = NearestNeighbors(n_neighbors=10, metric="cosine").fit(x.numpy())
        found[name] = oracle.kneighbors(return_distance=False)
        assert metrics.find_nearest_neighbours(x, 10).tolist() == found[name].tolist()
    for k, share in metrics.measure_neighbour_agreement(student, teacher, [1, 5, 10]).items():
        overlaps = [
            len({*s[:k]} & {*t[:k]}) / k
            for s, t in zip(found["student"], found["teacher"], strict=True)
        ]
        assert share == pytest.approx(np.mean(overlaps))
        assert 0 < share < 1


def test_linear_cka_is_the_alignment_of_centred_kernels() -> None:
    student, teacher = features()

    def kernel(x: torch.Tensor) -> torch.Tensor:
        centred = (x - x.mean(dim=0)).double()
        return centred @ centred.T

    k, other = kernel(student), kernel(teacher)
    assert metrics.linear_cka(student, teacher) == pytest.approx(
        ((k * other).sum() / (k.norm() * other.norm())).item()
    )
    rotation = torch.linalg.qr(torch.randn(7, 7)).Q
    assert metrics.linear_cka(teacher @ rotation * 3 + 1, teacher) == pytest.approx(1, abs=1e-5)
    assert metrics.linear_cka(torch.ones(60, 7), teacher) == 0


def test_agreement_has_every_number_and_only_neighbourhoods_that_mean_something() -> None:
    student, teacher = features()
    perfect = metrics.measure_agreement(teacher, teacher)
    assert list(perfect) == [
        "cosine",
        "r2",
        "r2_p10",
        "r2_median",
        "r2_p90",
        "knn_1",
        "knn_5",
        "knn_10",
        "cka",
    ]
    assert all(value == pytest.approx(1, abs=1e-5) for value in perfect.values())
    assert all(
        value < perfect[name] for name, value in metrics.measure_agreement(student, teacher).items()
    )
    assert {"knn_1", "knn_5"} <= metrics.measure_agreement(student[:7], teacher[:7]).keys()
    assert "knn_5" not in metrics.measure_agreement(student[:6], teacher[:6])
    single = metrics.measure_agreement(student[:1], teacher[:1])
    assert np.isfinite(list(single.values())).all() and "knn_1" not in single
