"""AT+ maps in closed form against autograd and pytorch_grad_cam, and maps that say nothing."""

from __future__ import annotations

import pytest
import torch
from pytorch_grad_cam import GradCAM, GradCAMElementWise
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn
from torch.nn import functional as F

from detection_kd.losses.attention_transfer import (
    ORDERS,
    activation_attention_loss,
    attention_loss,
    find_attention,
    find_attention_by_autograd,
    normalise_jointly,
    resize_maps,
    root_mean_square,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def find_by_double_backward(a: Tensor, w: Tensor, order: str) -> Tensor:
    """What the original does, for any signs; differentiable."""
    logits = F.linear(a.mean(dim=(2, 3)), w)
    return find_attention_by_autograd(a, logits, order, create_graph=True)


@pytest.mark.parametrize("order", ORDERS)
def test_closed_form_equals_double_backward_in_values_and_gradients(order: str) -> None:
    a, w, ahead = draw(3, 16, 5, 4), draw(4, 16, seed=1), draw(3, 4, 5, 4, seed=2)
    found, gradients = [], []
    for find in (find_attention, find_by_double_backward):
        inputs = (a.clone().requires_grad_(), w.clone().requires_grad_())
        maps = find(*inputs, order)
        found.append(maps.detach())
        gradients.append(torch.autograd.grad((maps * ahead).sum(), inputs))
    assert (found[0] - found[1]).abs().max() <= 1e-12 and found[0].abs().max() > 0.1
    for closed, double in zip(*gradients, strict=True):
        assert (closed - double).abs().max() <= 1e-12 and closed.abs().max() > 1e-3


def test_single_precision_is_as_close_as_it_can_be() -> None:
    a, w = draw(3, 64, 5, 4).float(), draw(4, 64, seed=1).float()
    double = find_by_double_backward(a.requires_grad_(), w, "at_plus").detach()
    torch.testing.assert_close(find_attention(a, w).detach(), double, rtol=5e-6, atol=1e-7)


def test_closed_form_by_loop() -> None:
    a, w = draw(2, 3, 2, 2), draw(2, 3, seed=1)
    for b, c, y, x in torch.cartesian_prod(*[torch.arange(2)] * 4).tolist():
        products = [(w[c, k] * a[b, k, y, x]).item() for k in range(3)]
        clipped_first = sum(max(0.0, p) for p in products) / 4
        assert find_attention(a, w)[b, c, y, x].item() == pytest.approx(clipped_first, abs=1e-15)
        clipped_last = max(0.0, sum(products)) / 4
        assert find_attention(a, w, "grad_cam")[b, c, y, x].item() == pytest.approx(
            clipped_last, abs=1e-15
        )


def test_negative_times_negative_is_positive_evidence() -> None:
    a, w = torch.full((1, 1, 1, 1), -2.0), torch.tensor([[-3.0], [3.0]])
    assert find_attention(a, w).flatten().tolist() == [6.0, 0.0]


def test_after_a_relu_one_convolution_is_enough() -> None:
    a, w = draw(2, 8, 3, 3).relu(), draw(4, 8, seed=1)
    assert torch.equal(find_attention(a, w, rectified=True), find_attention(a, w))
    assert not torch.equal(find_attention(-a, w, rectified=True), find_attention(-a, w))


class Pooled(nn.Module):
    """Convolutions, average pooling and a linear layer."""

    def __init__(self, ends: bool) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.Conv2d(12, 8, 3))
        if ends:
            self.stem.append(nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("ends_in_relu", [False, True])
def test_equals_pytorch_grad_cam(ends_in_relu: bool) -> None:
    torch.manual_seed(0)
    network, pixels = Pooled(ends_in_relu).double(), draw(2, 3, 9, 9)
    with torch.no_grad():
        activations = network.stem(pixels)
        found = {order: find_attention(activations, network.head.weight, order) for order in ORDERS}
    for order, reference in (("at_plus", GradCAMElementWise), ("grad_cam", GradCAM)):
        with reference(network, [network.stem[-1]]) as oracle:
            for c in range(4):
                oracle(pixels, [ClassifierOutputTarget(c)] * 2)
                seen = oracle.activations_and_grads
                arrays = (values[0].numpy() for values in (seen.activations, seen.gradients))
                targets = [ClassifierOutputTarget(c)] * 2
                image = oracle.get_cam_image(pixels, network.stem[-1], targets, *arrays, False)
                # GradCAM leaves the last clip to its caller
                expected = torch.from_numpy(image).relu()
                assert (found[order][:, c] - expected).abs().max() <= 1e-12


def test_autograd_of_an_earlier_layer_equals_its_definition() -> None:
    torch.manual_seed(0)
    network = Pooled(True).double()
    inner = draw(2, 12, 6, 6).requires_grad_()
    logits = network.head(network.stem[2:](inner.relu()).mean(dim=(2, 3)))
    maps = find_attention_by_autograd(inner, logits, create_graph=True)
    for c in range(4):
        (gradient,) = torch.autograd.grad(logits[:, c].sum(), inner, retain_graph=True)
        expected = (gradient.mean(dim=(2, 3), keepdim=True) * inner).relu().sum(dim=1)
        assert torch.equal(maps[:, c], expected)
    weight = network.stem[2].weight
    assert not find_attention_by_autograd(inner, logits).requires_grad
    assert torch.autograd.grad(maps.sum(), weight)[0].abs().max() > 0


def test_minmax_is_joint_over_classes_and_cells() -> None:
    maps = torch.tensor([[[[1.0, 2.0]], [[3.0, 5.0]]], [[[0.0, 0.0]], [[0.0, 8.0]]]])
    expected = [[[[0.0, 0.25]], [[0.5, 1.0]]], [[[0.0, 0.0]], [[0.0, 1.0]]]]
    assert normalise_jointly(maps).tolist() == expected


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-9])
def test_flat_maps_become_zeros_without_a_gradient(value: float) -> None:
    maps = torch.full((2, 4, 3, 3), value, requires_grad=True)
    ahead = draw(2, 4, 3, 3).float()
    loss = attention_loss(maps, ahead)
    assert torch.isfinite(loss)
    assert normalise_jointly(maps).abs().max() == 0
    (gradient,) = torch.autograd.grad(loss, maps)
    assert gradient.abs().max() == 0


def test_small_maps_are_no_flat_maps() -> None:
    maps = draw(2, 4, 3, 3)
    torch.testing.assert_close(normalise_jointly(maps * 1e-30), normalise_jointly(maps))


def test_identical_maps_have_no_loss_and_no_gradient() -> None:
    teacher = draw(2, 4, 3, 3)
    student = teacher.clone().requires_grad_()
    loss = attention_loss(student, teacher)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss == 0 and gradient.abs().max() == 0
    one_differs = teacher.clone()
    one_differs[0, 0, 0, 0] += 5
    one_differs.requires_grad_()
    (gradient,) = torch.autograd.grad(attention_loss(one_differs, teacher), one_differs)
    assert torch.isfinite(gradient).all() and gradient[0].abs().max() > 0
    assert gradient[1].abs().max() == 0


def test_roots_are_taken_per_sample_or_once() -> None:
    difference = torch.tensor([[3.0, 3.0], [4.0, 4.0]])
    assert root_mean_square(difference, per_sample=True) == 3.5
    assert root_mean_square(difference) == pytest.approx(12.5**0.5)


def test_attention_loss_by_loop() -> None:
    student, teacher = draw(3, 4, 3, 2), draw(3, 4, 3, 2, seed=1)
    total = 0.0
    for own, wanted in zip(student, teacher, strict=True):
        own, wanted = ((x - x.min()) / (x.max() - x.min()) for x in (own, wanted))
        total += (own - wanted).square().mean().sqrt().item() / 3
    assert attention_loss(student, teacher).item() == pytest.approx(total, abs=1e-14)
    raw = sum((s - t).square().mean().sqrt().item() / 3 for s, t in zip(student, teacher))
    assert attention_loss(student, teacher, "none").item() == pytest.approx(raw, abs=1e-14)


def test_teachers_get_no_gradient() -> None:
    student, teacher = (draw(2, 4, 3, 3, seed=i).requires_grad_() for i in range(2))
    for loss in (attention_loss, activation_attention_loss):
        assert torch.autograd.grad(loss(student, teacher), student)[0].abs().max() > 0
        assert not loss(student.detach(), teacher).requires_grad


def test_maps_of_the_same_tissue_agree_whatever_their_cells() -> None:
    """A ramp over the tissue, seen in 4 and in 8 cells: bilinear within, clamped at the border."""
    fine = ((torch.arange(8.0) + 0.5) / 8).expand(1, 1, 8, 8)
    coarse = F.avg_pool2d(fine, 2)
    inside = (resize_maps(coarse, (8, 8)) - fine)[..., 1:-1]
    assert inside.abs().max() < 1e-6
    shifted = (resize_maps(coarse, (8, 8), align_corners=True) - fine)[..., 1:-1]
    assert shifted.abs().max() > 0.02
    assert resize_maps(coarse, (4, 4), align_corners=True) is coarse


def test_raw_maps_of_fewer_cells_compare_as_sums() -> None:
    fine, coarse = torch.full((1, 2, 8, 8), 1 / 64), torch.full((1, 2, 2, 2), 1 / 4)
    assert attention_loss(coarse, fine, "none") == 0


def test_activation_attention_by_loop_is_blind_to_scale_and_width() -> None:
    student, teacher = draw(2, 5, 3, 3), draw(2, 7, 3, 3, seed=1)
    total = 0.0
    for own, wanted in zip(student, teacher, strict=True):
        maps = [x.square().sum(dim=0).flatten() for x in (own, wanted)]
        maps = [m / m.norm() for m in maps]
        total += (maps[0] - maps[1]).square().mean().item() / 2
    assert activation_attention_loss(student, teacher).item() == pytest.approx(total)
    assert activation_attention_loss(3 * student, teacher).item() == pytest.approx(total)
    assert activation_attention_loss(student.repeat(1, 4, 1, 1), teacher).item() == pytest.approx(
        total
    )
