"""Monitors against their formulas, and against trainings that collapse because something is taken
away from them.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from patch_encoder.selfdistill.head import DINOHead
from patch_encoder.selfdistill.losses.centring import centred_targets, update_centre
from patch_encoder.selfdistill.losses.dino import dino_loss
from patch_encoder.selfdistill.losses.sinkhorn import sinkhorn_targets
from patch_encoder.selfdistill.monitors import (
    describe_collapse,
    feature_std,
    measure_targets,
    rankme,
)
from patch_encoder.selfdistill.student import SelfDistilled, make_teacher
from tests.patch_encoder.selfdistill.references import random_logits
from wsi_common.ema import update_teacher

K = 64


def test_entropies_and_divergences_are_their_sums() -> None:
    targets = (random_logits(2, 3, 4) / 0.3).softmax(dim=-1)
    found = {name: value.item() for name, value in measure_targets(targets).items()}
    q = targets.flatten(0, 1).numpy()
    mean = q.mean(axis=0)
    assert found["teacher_entropy"] == pytest.approx(-(q * np.log(q)).sum() / len(q))
    assert found["mean_target_entropy"] == pytest.approx(-(mean * np.log(mean)).sum())
    assert found["target_information"] == pytest.approx((q * np.log(q / mean)).sum() / len(q))


def test_a_target_of_one_prototype_has_no_entropy() -> None:
    found = measure_targets(torch.eye(4)[None])
    assert found["teacher_entropy"] == 0
    assert found["mean_target_entropy"] == pytest.approx(math.log(4))


def test_feature_std_is_one_on_the_sphere_and_zero_at_a_point() -> None:
    torch.manual_seed(0)
    assert feature_std(torch.randn(4000, 16)).item() == pytest.approx(1, abs=0.01)
    assert feature_std(torch.ones(50, 16) * torch.rand(50, 1)).item() == pytest.approx(0, abs=1e-6)


def test_rankme_counts_equal_directions() -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(200, 16))[0]
    assert rankme(basis).item() == pytest.approx(16, abs=1e-3)
    assert rankme(basis[:, :5] @ torch.randn(5, 5).matrix_exp() @ torch.eye(5, 16)).item() < 5
    assert rankme(torch.ones(200, 16)).item() == pytest.approx(1, abs=1e-3)
    singular = np.linalg.svd(basis[:, :4].numpy() * [1, 2, 3, 4], compute_uv=False)
    p = singular / singular.sum()
    skewed = rankme(basis[:, :4] * torch.arange(1, 5))
    assert skewed.item() == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)


def train(targets: str, steps: int) -> dict[str, float]:
    """Self-distillation of noisy vectors; the monitors' means over the last ten steps."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16, 32), nn.GELU(), nn.Linear(32, 16))
    student = SelfDistilled(backbone, DINOHead(16, K, 32, 8))
    teacher = make_teacher(student)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=1e-3)
    tiles, centre, seen = torch.randn(128, 3, 4, 4), torch.zeros(K), []
    for _ in range(steps):
        batch = tiles[torch.randint(0, 128, (32,))]
        views = [batch + 0.5 * torch.randn_like(batch) for _ in range(4)]
        with torch.no_grad():
            logits = teacher(views[:2])[0].view(2, 32, K)
        q = {
            "sinkhorn": lambda x: sinkhorn_targets(x, 0.04),
            "no centring": lambda x: centred_targets(x, torch.zeros(K), 0.04),
            "no sharpening": lambda x, c=centre: centred_targets(x, c, 0.5),
        }[targets](logits)
        centre = update_centre(centre, logits)
        predicted, features = student(views)
        loss = dino_loss(predicted.view(4, 32, K), q)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_teacher(teacher, student, 0.9)
        seen.append(measure_targets(q) | {"feature_std": feature_std(features[:32])})
    return {name: mean_of(seen[-10:], name) for name in seen[0]}


def mean_of(rows: list[dict[str, Tensor]], name: str) -> float:
    return float(torch.stack([row[name] for row in rows]).mean())


@pytest.mark.parametrize(
    ("targets", "steps", "expected"),
    [
        ("sinkhorn", 60, None),
        ("no centring", 60, "all targets are one prototype"),
        ("no sharpening", 250, "all targets are uniform"),
    ],
)
def test_trainings_that_collapse_are_told_from_one_that_does_not(
    targets: str, steps: int, expected: str | None
) -> None:
    values = train(targets, steps)
    found = describe_collapse(values, K)
    assert (found is None) if expected is None else (found or "").startswith(expected), values


def test_every_kind_of_collapse_has_its_clause() -> None:
    healthy = {
        "teacher_entropy": 2.0,
        "mean_target_entropy": 3.0,
        "target_information": 1.0,
        "feature_std": 0.5,
    }
    assert describe_collapse(healthy, K) is None
    same = describe_collapse(healthy | {"target_information": 0.0}, K)
    assert same is not None and same.startswith("all tiles have the same target")
    alike = describe_collapse(healthy | {"feature_std": 0.001}, K)
    assert alike is not None and alike.startswith("all features are alike (feature_std 0.001")
