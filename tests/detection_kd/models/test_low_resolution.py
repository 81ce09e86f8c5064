"""Networks that grade patches: their trunks, the resolution they see, what it costs, and that a
checkpoint alone rebuilds them.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from detection_kd.losses.attention_transfer import find_attention, find_attention_by_autograd
from detection_kd.losses.resolution_losses import PairedOutputs, ResolutionTerms, resolution_loss
from detection_kd.models.cam import NORMS
from detection_kd.models.grading_trunks import VggTrunk, build_trunk, remove_strides, trace_shape
from detection_kd.models.low_resolution import (
    GradingKeys,
    GradingNetwork,
    PatchScale,
    check_teacher,
    load_grading_network,
)
from patch_encoder.models.encoders import build_encoder
from wsi_common.checkpoint import save_checkpoint
from wsi_common.errors import UserError

GRADES = ("NC", "G3", "G4", "G5")
# of VGG16 up to conv5_3: channels in and out, and how many times its map was halved before
CONVOLUTIONS = [
    (3, 64, 0), (64, 64, 0), (64, 128, 1), (128, 128, 1), (128, 256, 2), (256, 256, 2), (256, 256, 2),
    (256, 512, 3), (512, 512, 3), (512, 512, 3), (512, 512, 4), (512, 512, 4), (512, 512, 4),
]  # fmt: skip


def network(
    trunk: str = "small", side: int = 48, ratio: int = 1, seed: int = 0, **keys: object
) -> GradingNetwork:
    torch.manual_seed(seed)
    settings = GradingKeys(trunk=trunk, **{"init": "random", **keys})
    return GradingNetwork(settings, GRADES, PatchScale(side, ratio))


def pixels(batch: int, side: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(seed))


def count_flops(module: nn.Module, *inputs: Tensor) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


def test_vgg16_as_published() -> None:
    """torchvision's function up to conv5_3, without ReLU and pool5; pixels as they are."""
    torch.manual_seed(0)
    model = network("vgg16", side=64, normalised=False)
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    missing = features.load_state_dict(model.trunk.features.state_dict(), strict=True)
    assert not missing.missing_keys
    x = pixels(2, 64)
    with torch.no_grad():
        output, expected = model(x), x
        for layer in list(features)[:29]:
            expected = layer(expected)
    assert torch.equal(output.maps, expected) and expected.min() < 0
    assert output.maps.shape == (2, 512, 4, 4)
    torch.testing.assert_close(output.vectors, expected.mean(dim=(2, 3)))
    torch.testing.assert_close(output.logits, model.head(output.vectors))
    trunk, head = (sum(p.numel() for p in m.parameters()) for m in (model.trunk, model.head))
    assert (trunk, head) == (14_714_688, 2_052)


def test_vgg16_takes_published_weights_and_no_others(tmp_path: Path) -> None:
    wanted = VggTrunk()
    state = wanted.state_dict() | {
        "classifier.0.weight": torch.zeros(2),
        "pre_logits.fc1": torch.zeros(1),
    }
    torch.save(state, tmp_path / "vgg16.pth")
    loaded = build_trunk("vgg16", str(tmp_path / "vgg16.pth"))
    assert all(torch.equal(v, wanted.state_dict()[k]) for k, v in loaded.state_dict().items())
    del state["features.28.bias"]
    torch.save(state, tmp_path / "vgg16.pth")
    with pytest.raises(UserError, match=r"another architecture: 1 missing \['features.28.bias'\]"):
        build_trunk("vgg16", str(tmp_path / "vgg16.pth"))


def test_pretrained_default_is_the_published_encoder() -> None:
    keys = GradingKeys()
    model = GradingNetwork(keys, GRADES, PatchScale(64)).eval()
    published = build_encoder("imagenet_lite0").model.network
    x = pixels(2, 64)
    with torch.no_grad():
        expected = published((x - 127 / 255) * 255 / 128)
        torch.testing.assert_close(model(x).vectors, expected, rtol=1e-4, atol=1e-4)
    assert model.trunk.width == 1280 and model.map_side == 2


@pytest.mark.parametrize(
    ("trunk", "stride", "count"),
    [
        *(("small", 8, count) for count in range(4)),
        *(("vgg16", 16, 2), ("resnet10t", 32, 2), ("resnet50d", 32, 3)),
        ("tf_efficientnet_lite0", 32, 2),
    ],
)
def test_removed_strides_give_a_student_its_teachers_map(
    trunk: str, stride: int, count: int
) -> None:
    whole = build_trunk(trunk, "random")
    student = build_trunk(trunk, "random", count)
    assert trace_shape(whole, 256)[-2:] == (256 // stride,) * 2 and whole.training
    assert trace_shape(student, 256 >> count)[-2:] == (256 // stride,) * 2
    assert {n: p.shape for n, p in student.named_parameters()} == {
        n: p.shape for n, p in whole.named_parameters()
    }


@pytest.mark.parametrize("norm", NORMS)
def test_cells_of_the_small_trunk_see_no_other_end_of_the_image(norm: str) -> None:
    """Averages of a map say how much of something an image has; a norm over it would hide that."""
    model = network(side=128, norm=norm).eval()
    x = pixels(1, 128)
    other = x.clone()
    other[..., 96:, 96:] = 0
    with torch.no_grad():
        maps, changed = model(x).maps, model(other).maps
    assert torch.equal(maps[..., :4, :4], changed[..., :4, :4])
    assert not torch.equal(maps[..., -1, -1], changed[..., -1, -1])


def test_with_layer_norm_a_patch_is_graded_alike_in_any_batch() -> None:
    x = pixels(4, 48)
    for norm, alike in (("layer", True), ("batch", False)):
        model = network(norm=norm)
        whole, half = model(x).logits[:2], model(x[:2]).logits
        assert torch.allclose(whole, half, atol=1e-5) == alike


def test_a_removed_stride_lets_every_cell_be_computed() -> None:
    """Every other cell of the student's map is that of the trunk with its strides."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    dense, x = copy.deepcopy(whole), pixels(2, 16)
    remove_strides(dense, 1, "two convolutions")
    assert dense(x).shape == (2, 8, 16, 16)
    torch.testing.assert_close(dense(x)[..., ::2, ::2], whole(x))


def test_strides_that_cannot_go_are_refused() -> None:
    for count in (-1, 5):
        with pytest.raises(UserError, match=f"removed_strides={count}: expected 0 to 4, as many"):
            build_trunk("vgg16", "random", count)
    with pytest.raises(UserError, match="cannot do without their strides"):
        build_trunk("convnext_atto", "random", 1)  # patches of 4 px, without padding


@pytest.mark.parametrize(
    ("trunk", "init", "message"),
    [
        ("small", "imagenet_lite0", "trunk=small: expected init=random"),
        ("resnet81", "random", "no such network"),
        ("vit_tiny_patch16_224", "random", "expected a network whose last layer is a map"),
        ("swin_tiny_patch4_window7_224", "random", "images of 256 px do not suit the trunk"),
        ("vgg16", "plip", "expected a network of timm"),
    ],
)
def test_trunks_that_cannot_be_had(trunk: str, init: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_trunk(trunk, init)


@pytest.mark.parametrize("ratio", [3, 5, 64, 0])
def test_ratios_that_do_not_divide_are_refused(ratio: int) -> None:
    with pytest.raises(UserError, match=f"ratio={ratio}: expected a divisor .* 32 px"):
        PatchScale(32, ratio)


def test_patches_too_small_for_a_trunk_are_refused() -> None:
    with pytest.raises(UserError, match="images of 8 px do not suit the trunk"):
        network("vgg16", side=32, ratio=4)
    assert network("vgg16", side=32, ratio=4, removed_strides=1).map_side == 1
    assert network("vgg16", side=32, ratio=4, enlarged=True).map_side == 2


def test_scale_of_what_is_seen() -> None:
    scale = PatchScale(512, 4, 1.0)
    assert (scale.own_side, scale.own_mpp) == (128, 4.0)
    assert PatchScale(512, 8).own_mpp is None


def test_enlarged_student_is_the_network_behind_the_originals_resizing() -> None:
    student, full = network(side=48, ratio=4, enlarged=True), network(side=48)
    x = pixels(2, 12)
    with torch.no_grad():
        big = F.interpolate(x, (48, 48), mode="bilinear", align_corners=True)
        assert torch.equal(student(x).maps, full(big).maps)
        assert student.map_side == full.map_side == 6
        # at ratio 1 nothing is resized
        assert torch.equal(network(side=48, enlarged=True)(big).logits, full(big).logits)


@pytest.mark.parametrize("ratio", [4, 8])
def test_flops_are_the_formulas_and_ratio_squared_times_fewer(ratio: int) -> None:
    side = 128
    native = network("vgg16", side=side, ratio=ratio)
    enlarged = network("vgg16", side=side, ratio=ratio, enlarged=True)
    x = pixels(1, side // ratio)
    head = 2 * 512 * len(GRADES)

    def formula(side: int) -> int:
        return sum(2 * 9 * i * o * (side >> halved) ** 2 for i, o, halved in CONVOLUTIONS)

    assert count_flops(native, x) - head == formula(side // ratio)
    assert count_flops(enlarged, x) - head == formula(side) == ratio**2 * formula(side // ratio)


def test_normalised_pixels_have_the_weights_statistics() -> None:
    model, plain = network(), network(normalised=False)
    model.set_statistics(((0.5, 0.4, 0.3), (0.1, 0.2, 0.4)))
    x = pixels(1, 48)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in model.statistics)
    with torch.no_grad():
        assert torch.equal(model(x).maps, plain((x - mean) / std).maps)


def test_a_teacher_keeps_nothing_for_backward() -> None:
    teacher, kept = network().freeze(), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = teacher(pixels(2, 48))
        find_attention(output.maps, teacher.head.weight)
        assert not kept and not output.logits.requires_grad and not teacher.training
        output = teacher(pixels(2, 48), level=-2)
    # the graph starts at the earlier level, so the layers before it keep nothing
    assert output.inner.is_leaf and output.inner.shape == (2, 64, 6, 6)
    assert kept and not any(tensor.shape[-1] > 6 for tensor in kept if tensor.ndim == 4)


@pytest.mark.parametrize(
    ("trunk", "side", "inner"),
    [("small", 48, (64, 6, 6)), ("vgg16", 32, (512, 2, 2)), ("resnet10t", 64, (256, 4, 4))],
)
def test_an_earlier_level_comes_with_its_graph(
    trunk: str, side: int, inner: tuple[int, int, int]
) -> None:
    model = network(trunk, side)
    output, plain = model(pixels(2, side), level=-2), model.eval()(pixels(2, side))
    assert output.inner.shape == (2, *inner) and plain.inner is None
    (gradient,) = torch.autograd.grad(output.logits.sum(), output.inner, retain_graph=True)
    assert gradient.abs().max() > 0
    output.inner.square().sum().backward()
    assert next(model.trunk.parameters()).grad.abs().max() > 0
    with pytest.raises(UserError, match=r"level=-9: expected -1 to"):
        model(pixels(1, side), level=-9)


def test_an_earlier_level_is_caught_behind_a_compiled_trunk() -> None:
    """A compiled module would pass by what is listening within it."""
    model, x = network(), pixels(1, 48)
    expected = model(x, level=-2).inner

    def fail(*_: object) -> None:
        raise AssertionError("the compiled trunk was called")

    model.trunk._compiled_call_impl = fail
    assert torch.equal(model(x, level=-2).inner, expected)
    with pytest.raises(AssertionError, match="was called"):
        model(x)


@pytest.mark.parametrize("level", [-1, -2])
def test_a_student_learns_from_a_teacher_with_all_terms(level: int) -> None:
    """A step along the gradient lowers the loss; the teacher stays as it is."""
    teacher = network().freeze()
    student = network(ratio=4, removed_strides=1, seed=1)
    settings = ResolutionTerms(0.5, 0.1, 0.1, 0.1, 0.1, 1.0, temperature=2.0, level=level)
    check_teacher(student, teacher, settings)
    big, labels = pixels(4, 48), torch.tensor([0, 1, 2, 3])
    before = copy.deepcopy(teacher.state_dict())
    answer = teacher(big, level)

    def step() -> Tensor:
        output = student(F.avg_pool2d(big, 4), level)
        compared = PairedOutputs(output, answer, student.head, teacher.head, settings)
        return resolution_loss(output.logits, labels, settings.weights(), compared)[0]

    first = step()
    first.backward()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= 1e-3 * parameter.grad
    assert step() < first
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_teachers_that_cannot_teach_are_refused() -> None:
    student, teacher = network(ratio=4, removed_strides=1), network()
    check_teacher(student, teacher, ResolutionTerms(kd=1.0, fm=1.0, sr=1.0))
    check_teacher(student, student, ResolutionTerms(kd=1.0))
    wide = network("resnet10t")
    check_teacher(student, wide, ResolutionTerms(kd=1.0, at=1.0, grad_cam=1.0, at_plus=1.0))
    for term in ("fm", "sr"):
        with pytest.raises(UserError, match="one width, found student 96, teacher 512"):
            check_teacher(student, wide, ResolutionTerms(**{term: 1.0}))
    deep = ResolutionTerms(at_plus=1.0, level=-4)  # resnet10t has so many, small has 3
    with pytest.raises(UserError, match="level=-4: expected -1 to -3 for trunk=small"):
        check_teacher(student, wide, deep)
    check_teacher(student, wide, ResolutionTerms(kd=1.0, level=-4))


@pytest.mark.parametrize(
    ("grades", "scale", "message"),
    [
        (
            GRADES[::-1],
            PatchScale(48, 1, 0.5),
            "the grades NC, G3, G4, G5 in this order, found G5, G4",
        ),
        (GRADES[:3], PatchScale(48, 1, 0.5), "found NC, G3, G4$"),
        (GRADES, PatchScale(64, 1, 0.5), "48 px at 0.5 um/px, found 64 px at 0.5 um/px"),
        (GRADES, PatchScale(48, 1, 0.25), "48 px at 0.5 um/px, found 48 px at 0.25 um/px"),
        (GRADES, PatchScale(48, 3, 0.5), r"the student's detail \(ratio 2\), found ratio 3"),
    ],
)
def test_teachers_of_other_grades_patches_or_detail_are_refused(
    grades: tuple[str, ...], scale: PatchScale, message: str
) -> None:
    keys = GradingKeys(trunk="small", init="random")
    student = GradingNetwork(keys, GRADES, PatchScale(48, 2, 0.5))
    with pytest.raises(UserError, match=message):
        check_teacher(student, GradingNetwork(keys, grades, scale), ResolutionTerms(kd=1.0))
    unknown = GradingNetwork(keys, GRADES, PatchScale(48))
    check_teacher(student, unknown, ResolutionTerms(kd=1.0))


def test_maps_that_were_kept_are_graded_as_those_of_the_forward_pass() -> None:
    model = network()
    with torch.no_grad():
        output = model(pixels(2, 48))
        again = model.grade_maps(output.maps)
    assert torch.equal(output.logits, again.logits) and torch.equal(output.vectors, again.vectors)


def test_outputs_are_single_precision_under_autocast() -> None:
    model = network()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(pixels(2, 48), level=-2)
    assert {x.dtype for x in output[:3]} == {torch.float32}
    assert output.inner.dtype == torch.bfloat16
    maps = find_attention_by_autograd(output.inner, output.logits)
    assert maps.dtype == torch.float32 and maps.max() > 0
    assert model.double()(pixels(1, 48).double()).logits.dtype == torch.float64


@pytest.mark.parametrize(
    ("trunk", "keys"),
    [
        ("small", {"removed_strides": 2, "norm": "layer"}),
        ("small", {"enlarged": True, "normalised": False}),
        ("tf_efficientnet_lite0", {"init": "imagenet_lite0"}),
    ],
)
def test_a_checkpoint_alone_rebuilds_the_network(
    trunk: str, keys: dict[str, object], tmp_path: Path
) -> None:
    model = network(trunk, 64, 4, **keys)
    model.scale = PatchScale(64, 4, 0.5)
    save_checkpoint(tmp_path / "m.pt", model=model.state_dict(), config=model.describe(), epoch=1)
    loaded = load_grading_network(tmp_path / "m.pt")
    assert loaded.grades == GRADES and loaded.scale == PatchScale(64, 4, 0.5)
    assert loaded.keys == model.keys and loaded.statistics == model.statistics
    assert not loaded.training
    x = pixels(2, 16)
    with torch.no_grad():
        assert torch.equal(loaded(x).logits, model.eval()(x).logits)


def test_other_checkpoints_are_refused(tmp_path: Path) -> None:
    model = network()
    described = model.describe() | {"kind": "backbone"}
    save_checkpoint(tmp_path / "m.pt", model=model.state_dict(), config=described, epoch=1)
    with pytest.raises(UserError, match=r"expected a grading network .*found kind 'backbone'"):
        load_grading_network(tmp_path / "m.pt")
