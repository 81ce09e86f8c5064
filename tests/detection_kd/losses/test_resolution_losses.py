"""Terms of a student at low resolution by loops, their sum, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detection_kd.losses.attention_transfer import find_attention_by_autograd, root_mean_square
from detection_kd.losses.resolution_losses import (
    TERMS,
    GradingOutput,
    PairedOutputs,
    ResolutionTerms,
    feature_matching_loss,
    regressed_prediction_loss,
    resolution_loss,
    softened_prediction_loss,
)
from wsi_common.config import load_config
from wsi_common.errors import UserError


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def grade(maps: Tensor, head: nn.Linear, inner: Tensor | None = None) -> GradingOutput:
    vectors = maps.mean(dim=(2, 3))
    return GradingOutput(maps, vectors, head(vectors), inner)


def compare(settings: ResolutionTerms, cells: int = 3) -> PairedOutputs:
    """A student of `cells` x `cells` cells and a teacher of 6 x 6, 8 channels, 4 grades."""
    torch.manual_seed(0)
    heads = nn.Linear(8, 4).double(), nn.Linear(8, 4).double()
    inner = [draw(5, 8, n, n, seed=n).requires_grad_() for n in (2 * cells, 12)]
    outputs = [
        grade(F.avg_pool2d(x, 2).sin(), head, x) for x, head in zip(inner, heads, strict=True)
    ]
    return PairedOutputs(*outputs, *heads, settings)


LABELS = torch.tensor([0, 1, 2, 3, 3])


def softmax(values: list[float]) -> list[float]:
    return [math.exp(v) / sum(math.exp(u) for u in values) for v in values]


def test_softened_predictions_by_loop() -> None:
    student, teacher = draw(3, 4), draw(3, 4, seed=1)
    both = one_sided = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        target = softmax([x / 2.5 for x in t])
        found = softmax([x / 2.5 for x in s])
        both += 2.5**2 * sum(p * math.log(p / q) for p, q in zip(target, found)) / 3
        one_sided -= sum(p * math.log(q) for p, q in zip(target, softmax(s))) / 3
    assert softened_prediction_loss(student, teacher, 2.5).item() == pytest.approx(both)
    assert softened_prediction_loss(student, teacher, 2.5, True).item() == pytest.approx(one_sided)
    assert softened_prediction_loss(teacher, teacher, 2.5).item() == pytest.approx(0, abs=1e-15)


def test_at_temperature_1_published_and_symmetric_gradients_are_the_same() -> None:
    student, teacher = draw(3, 4).requires_grad_(), draw(3, 4, seed=1)
    gradients = [
        torch.autograd.grad(softened_prediction_loss(student, teacher, 1.0, way), student)[0]
        for way in (False, True)
    ]
    torch.testing.assert_close(*gradients)


def test_feature_matching_is_one_root_over_everything() -> None:
    student, teacher = draw(2, 3, 4, 4), draw(2, 3, 4, 4, seed=1)
    expected = (student - teacher).square().mean().sqrt()
    torch.testing.assert_close(feature_matching_loss(student, teacher), expected)
    assert feature_matching_loss(teacher, teacher) == 0
    # a smaller map is resized, and one that covers the same tissue alike agrees
    assert feature_matching_loss(torch.ones(1, 2, 1, 1), torch.ones(1, 2, 4, 4)) == 0


def test_vectors_are_seen_through_the_teachers_layer() -> None:
    head, vectors, logits = nn.Linear(8, 4).double(), draw(5, 8).requires_grad_(), draw(5, 4)
    total = 0.0
    for z, wanted in zip(vectors.tolist(), logits.tolist(), strict=True):
        for c in range(4):
            score = head.bias[c].item() + sum(w * x for w, x in zip(head.weight[c].tolist(), z))
            total += (score - wanted[c]) ** 2 / 20
    loss = regressed_prediction_loss(vectors, head, logits)
    assert loss.item() == pytest.approx(math.sqrt(total))
    loss.backward()
    assert head.weight.grad is None and vectors.grad is not None


@pytest.mark.parametrize("term", TERMS)
def test_each_term_reaches_the_student_alone(term: str) -> None:
    settings = ResolutionTerms(**{term: 2.0})
    pair = compare(settings)
    weights = settings.weights()
    assert list(weights) == [term]
    total, terms = resolution_loss(pair.student.logits, LABELS, weights, pair)
    assert list(terms) == ["ce", term] and terms[term] > 0
    once = TERMS[term](pair)
    torch.testing.assert_close(terms[term], 2 * once)
    gradient = torch.autograd.grad(once, pair.student.inner, retain_graph=True)[0]
    assert gradient.abs().max() > 0
    total.backward()
    teacher = (pair.teacher.inner, *pair.teacher_head.parameters())
    assert all(leaf.grad is None for leaf in teacher)


def test_logged_terms_add_up_to_the_loss_that_is_differentiated() -> None:
    settings = ResolutionTerms(**{name: 0.5 + i for i, name in enumerate(TERMS)}, temperature=3.0)
    pair = compare(settings)
    student = pair.student
    total, terms = resolution_loss(student.logits, LABELS, settings.weights(), pair)
    assert list(terms) == ["ce", *TERMS]
    assert total.item() == pytest.approx(sum(x.item() for x in terms.values()))
    torch.testing.assert_close(terms["ce"], F.cross_entropy(student.logits, LABELS))
    parts = [torch.autograd.grad(x, student.inner, retain_graph=True)[0] for x in terms.values()]
    whole = torch.autograd.grad(total, student.inner)[0]
    torch.testing.assert_close(whole, torch.stack(parts).sum(dim=0))


def test_labels_alone_need_no_teacher() -> None:
    logits = draw(5, 4)
    total, terms = resolution_loss(logits, LABELS, ResolutionTerms().weights())
    assert list(terms) == ["ce"] and total == F.cross_entropy(logits, LABELS)


def test_ungraded_patches_are_in_every_term_but_the_labels() -> None:
    """Over batches with as many or as few graded patches as may be, the mean of the cross-entropy
    is that of all graded ones.
    """
    settings = ResolutionTerms(kd=1.0)
    pair, weights = compare(settings), settings.weights()
    logits = pair.student.logits
    labels = torch.tensor([[0, -100, 2, 3, 3], [-100] * 5])
    found = [resolution_loss(logits, own, weights, pair, graded_share=0.4)[1] for own in labels]
    expected = F.cross_entropy(logits[[0, 2, 3, 4]], labels[0][[0, 2, 3, 4]])
    torch.testing.assert_close((found[0]["ce"] + found[1]["ce"]) / 2, expected)
    assert found[0]["kd"] == found[1]["kd"] > 0
    (gradient,) = torch.autograd.grad(found[0]["ce"], logits, retain_graph=True)
    assert (gradient[1] == 0).all() and (gradient[0] != 0).all()


@pytest.mark.parametrize("order", ["at_plus", "grad_cam"])
def test_an_earlier_level_is_compared_by_autograd(order: str) -> None:
    settings = ResolutionTerms(**{order: 1.0}, level=-2, normalisation="none")
    pair = compare(settings, cells=6)
    assert settings.needs_inner() and not ResolutionTerms(kd=1.0, level=-2).needs_inner()
    maps = [
        find_attention_by_autograd(output.inner, output.logits, order)
        for output in (pair.student, pair.teacher)
    ]
    expected = root_mean_square(maps[0] - maps[1], per_sample=True)
    found = TERMS[order](pair)
    torch.testing.assert_close(found.detach(), expected)
    assert torch.autograd.grad(found, pair.student_head.weight)[0].abs().max() > 0


@pytest.mark.parametrize(
    ("setting", "terms"),
    [
        ({"temperature": 3.0}, {"kd"}),
        ({"one_sided": True}, {"kd"}),
        ({"align_corners": True}, {"fm", "at", "grad_cam", "at_plus"}),
        ({"normalisation": "none"}, {"grad_cam", "at_plus"}),
        ({"level": -2}, {"grad_cam", "at_plus"}),
    ],
)
def test_every_setting_reaches_its_terms_and_no_others(
    setting: dict[str, object], terms: set[str]
) -> None:
    weights = dict.fromkeys(TERMS, 1.0)
    plain, other = (compare(ResolutionTerms(**weights, **given)) for given in ({}, setting))
    changed = {name for name, term in TERMS.items() if term(plain) != term(other)}
    assert changed == terms


def test_a_batch_of_one_and_agreement_of_all() -> None:
    settings = ResolutionTerms(**dict.fromkeys(TERMS, 1.0))
    pair = compare(settings)
    one = [grade(x.maps[:1], head) for x, head in (
        (pair.student, pair.student_head), (pair.teacher, pair.teacher_head)
    )]  # fmt: skip
    alone = PairedOutputs(*one, pair.student_head, pair.teacher_head, settings)
    assert torch.isfinite(resolution_loss(one[0].logits, LABELS[:1], settings.weights(), alone)[0])
    head = pair.teacher_head
    same = PairedOutputs(pair.teacher, pair.teacher, head, head, settings)
    for name, term in TERMS.items():
        value = term(same)
        gradient = torch.autograd.grad(value, pair.teacher.inner, retain_graph=True)[0]
        assert value.item() == pytest.approx(0, abs=1e-12), name
        assert torch.isfinite(gradient).all() and gradient.abs().max() < 1e-12, name


@pytest.mark.parametrize(
    "keys",
    [{"kd": -1.0}, {"at_plus": 1.0, "fm": -1.0}, {"kd": 1.0, "temperature": 0.0}, {"level": 0}],
)
def test_weights_that_mean_nothing_are_refused(keys: dict[str, float]) -> None:
    with pytest.raises(UserError, match="expected weights of at least 0, a temperature above 0"):
        ResolutionTerms(**keys).weights()


def test_keys_are_read_as_a_configuration() -> None:
    keys = load_config(ResolutionTerms, ["at_plus=10", "fm=0.1", "normalisation=minmax"])
    assert keys.weights() == {"fm": 0.1, "at_plus": 10.0}
