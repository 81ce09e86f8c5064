"""D2VFM's losses against loops over tiles, pairs and triplets, and their sum by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from detection_kd.losses.distillation_loss import ExtraTerms, distillation_loss
from detection_kd.losses.feature_losses import (
    FEATURE_LOSSES,
    contrastive_loss,
    relational_angle_loss,
    relational_distance_loss,
    smooth_l1_loss,
)
from wsi_common.errors import UserError


def features(tiles: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, tiles, 5, generator=generator, dtype=torch.float64)
    return draw[0].requires_grad_(), draw[1] * 3 + 1


def huber(difference: float, beta: float = 1.0) -> float:
    size = abs(difference)
    return size**2 / (2 * beta) if size < beta else size - beta / 2


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_smooth_l1_by_loop(beta: float) -> None:
    student, teacher = features()
    total = sum(
        huber(s - t, beta)
        for s, t in zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    )
    assert smooth_l1_loss(student, teacher, beta).item() == pytest.approx(total / len(student))


def test_distances_of_pairs_by_loop() -> None:
    student, teacher = features()
    pairs = list(itertools.permutations(range(6), 2))

    def relative(x: torch.Tensor) -> dict[tuple[int, int], float]:
        distances = {(i, j): math.dist(x[i].tolist(), x[j].tolist()) for i, j in pairs}
        mean = sum(distances.values()) / len(pairs)
        return {pair: distance / mean for pair, distance in distances.items()}

    of_student, of_teacher = relative(student), relative(teacher)
    expected = sum(huber(of_student[pair] - of_teacher[pair]) for pair in pairs) / len(pairs)
    assert relational_distance_loss(student, teacher).item() == pytest.approx(expected)


def test_angles_of_triplets_by_loop() -> None:
    student, teacher = features()
    triplets = list(itertools.permutations(range(6), 3))

    def cosine(x: torch.Tensor, i: int, j: int, k: int) -> float:
        first, second = x[i] - x[j], x[k] - x[j]
        return (first @ second / (first.norm() * second.norm())).item()

    expected = sum(huber(cosine(student, *t) - cosine(teacher, *t)) for t in triplets) / len(
        triplets
    )
    assert relational_angle_loss(student, teacher).item() == pytest.approx(expected)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_contrastive_by_loop(temperature: float) -> None:
    student, teacher = features()
    s, t = (x / x.norm(dim=1, keepdim=True) for x in (student, teacher))
    logits = [[(s[i] @ t[j]).item() / temperature for j in range(6)] for i in range(6)]
    total = 0.0
    for i in range(6):
        total -= logits[i][i] - math.log(sum(math.exp(logits[i][j]) for j in range(6)))
        total -= logits[i][i] - math.log(sum(math.exp(logits[j][i]) for j in range(6)))
    assert contrastive_loss(student, teacher, temperature).item() == pytest.approx(total / 12)


def test_relations_do_not_see_shift_rotation_scale_or_width() -> None:
    _, teacher = features(seed=1)
    rotation = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64)).Q
    moved = torch.cat([teacher @ rotation * 0.1 + 7, torch.zeros(6, 2, dtype=torch.float64)], dim=1)
    assert relational_distance_loss(moved, teacher).item() == pytest.approx(0, abs=1e-12)
    assert relational_angle_loss(moved, teacher).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    "loss", [relational_distance_loss, relational_angle_loss, contrastive_loss]
)
@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_equal_tiles_and_small_batches_have_finite_gradients(loss, tiles: int) -> None:  # type: ignore[no-untyped-def]
    student, teacher = torch.ones(tiles, 3, requires_grad=True), torch.randn(tiles, 3)
    value = loss(student, teacher)
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None and torch.isfinite(student.grad).all()
    if loss is not contrastive_loss and tiles < 2:
        assert value == 0


def test_two_equal_tiles_leave_the_other_angles() -> None:
    student, teacher = features()
    doubled = torch.cat([student.detach(), student.detach()[:1]]).requires_grad_()
    relational_angle_loss(doubled, torch.cat([teacher, teacher[:1]])).backward()
    assert doubled.grad is not None and doubled.grad.abs().max() < 10


@pytest.mark.parametrize(
    "loss",
    [*FEATURE_LOSSES.values(), relational_distance_loss, relational_angle_loss, contrastive_loss],
)
def test_gradients(loss) -> None:  # type: ignore[no-untyped-def]
    student, teacher = features(4)
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher), (student,))


def test_sum_adds_weighted_terms_and_gathers_only_what_needs_the_batch() -> None:
    student, teacher = features()
    other = features(seed=2)
    extra = ExtraTerms(
        mse=1.0,
        cosine=3.0,
        distance=4.0,
        angle=5.0,
        contrastive=6.0,
        temperature=0.5,
        smooth_l1=7.0,
        beta=0.2,
    )
    gathered = iter([torch.cat([student, other[0]]), torch.cat([teacher, other[1]])])
    total, terms = distillation_loss("mse", 2.0, extra)(student, teacher, lambda x: next(gathered))
    whole = torch.cat([student, other[0]]), torch.cat([teacher, other[1]])
    expected = {
        "mse": (3.0, FEATURE_LOSSES["mse"](student, teacher)),
        "cosine": (3.0, FEATURE_LOSSES["cosine"](student, teacher)),
        "smooth_l1": (7.0, smooth_l1_loss(student, teacher, 0.2)),
        "distance": (4.0, relational_distance_loss(*whole)),
        "angle": (5.0, relational_angle_loss(*whole)),
        "contrastive": (6.0, contrastive_loss(*whole, 0.5)),
    }
    assert terms.keys() == expected.keys()
    assert all(
        terms[name].item() == pytest.approx(value.item()) for name, (_, value) in expected.items()
    )
    assert total.item() == pytest.approx(
        sum(weight * value.item() for weight, value in expected.values())
    )


@pytest.mark.parametrize("loss", list(FEATURE_LOSSES))
def test_published_loss_alone_gathers_nothing(loss: str) -> None:
    student, teacher = features()
    total, terms = distillation_loss(loss, 2.0, ExtraTerms())(
        student, teacher, lambda x: pytest.fail("gathered")
    )
    assert list(terms) == [loss]
    assert torch.equal(total, 2.0 * FEATURE_LOSSES[loss](student, teacher))


@pytest.mark.parametrize(
    ("weight", "extra"),
    [
        (0.0, {}),
        (-1.0, {"mse": 2.0}),
        (1.0, {"angle": -1.0}),
        (1.0, {"temperature": 0.0}),
        (1.0, {"beta": -1.0}),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(weight: float, extra: dict[str, float]) -> None:
    with pytest.raises(UserError, match="expected"):
        distillation_loss("mse", weight, ExtraTerms(**extra))
