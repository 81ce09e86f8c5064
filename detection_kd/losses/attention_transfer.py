"""Attention maps of a grading network, and how far a student's are from its teacher's (AT+).

Source: "Attention to Detail: Inter-Resolution Knowledge Distillation" (EUSIPCO 2023, arXiv
2401.06010; code cvblab/kd_resolution). The map of class c is M_c = sum_k relu(g_ck A_k):
activations A_k times the spatial mean g_ck of the gradient of the class's logit, clipped per
channel *before* the sum over channels. Negative activation times negative gradient is thus positive
evidence. Grad-CAM (Selvaraju et al., ICCV 2017) clips after the sum; AT (Zagoruyko and Komodakis,
ICLR 2017) compares activations alone.

Differences: below average pooling and a linear layer, g_ck is the constant w_ck / (H W), and

    M = (relu(W) * relu(A) + relu(-W) * relu(-A)) / (H W)

where * is a 1x1 convolution. Nothing has to be differentiated twice, and after a ReLU the second
convolution vanishes. `find_attention_by_autograd` is the same for earlier layers and other heads.
A flat map is normalised to zeros where the original divides by zero, and the square root has
gradient 0 at 0. Maps of two sizes are compared on the teacher's cells.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from wsi_common.distributed import mean_with_gradient

ORDERS = ("at_plus", "grad_cam")  # clip, then sum over channels; sum, then clip
NORMALISATIONS = ("minmax", "none")
FLAT = 1e-6  # span of a map, as a share of its largest value, below which it says nothing


def find_attention(
    activations: Float[Tensor, "b k h w"],
    weight: Float[Tensor, "c k"],
    order: str = "at_plus",
    rectified: bool = False,
) -> Float[Tensor, "b c h w"]:
    """Attention maps below average pooling and a linear layer, in closed form.

    Args:
        activations: what is pooled.
        weight: of the linear layer.
        order: one of `ORDERS`.
        rectified: activations come from a ReLU, none is below 0; saves AT+ one of two convolutions.
    """
    cells, kernel = activations[0, 0].numel(), weight[:, :, None, None]
    if order == "grad_cam":
        return F.conv2d(activations, kernel).relu() / cells
    maps = F.conv2d(activations.relu(), kernel.relu())
    if not rectified:
        maps = maps + F.conv2d((-activations).relu(), (-kernel).relu())
    return maps / cells


def find_attention_by_autograd(
    activations: Float[Tensor, "b k h w"],
    logits: Float[Tensor, "b c"],
    order: str = "at_plus",
    create_graph: bool = False,
) -> Float[Tensor, "b c h w"]:
    """Attention maps of any layer below any head, by one backward pass per class.

    Args:
        activations: of a layer that `logits` were computed from.
        logits: before the softmax; the graph between both is kept.
        order: one of `ORDERS`.
        create_graph: the maps will be differentiated (a student's); else they come detached.
    """
    maps = []
    for each in logits.sum(dim=0):  # samples do not depend on each other
        (gradient,) = torch.autograd.grad(
            each, activations, retain_graph=True, create_graph=create_graph
        )
        evidence = gradient.mean(dim=(2, 3), keepdim=True) * activations  # (B, K, H, W)
        maps.append(evidence.relu().sum(1) if order == "at_plus" else evidence.sum(1).relu())
    found = torch.stack(maps, dim=1)
    found = found.to(torch.promote_types(found.dtype, torch.float32))  # half under autocast
    return found if create_graph else found.detach()


def normalise_jointly(
    maps: Float[Tensor, "b c h w"], epsilon: float = FLAT
) -> Float[Tensor, "b c h w"]:
    """(x - min) / (max - min) per sample, over classes and cells together.

    Args:
        maps: of any scale.
        epsilon: a sample whose span is at most this share of its largest absolute value is flat; it
            becomes 0 with gradient 0, where the original gives NaN.
    """
    low, high = maps.amin(dim=(1, 2, 3), keepdim=True), maps.amax(dim=(1, 2, 3), keepdim=True)
    flat = (high - low) <= epsilon * torch.maximum(low.abs(), high.abs())
    span = torch.where(flat, 1.0, high - low)  # a division by 0 would poison the gradient
    return torch.where(flat, 0.0, (maps - low) / span)


def resize_maps(
    maps: Float[Tensor, "b c h w"], size: tuple[int, int], align_corners: bool = False
) -> Float[Tensor, "b c _h _w"]:
    """The maps with another number of rows and columns, bilinear.

    Args:
        maps: a student's.
        size: rows and columns of its teacher's.
        align_corners: centres of corner cells on each other, as published; this shifts the cells of
            maps that cover the same tissue by up to half of one.
    """
    if maps.shape[-2:] == size:
        return maps
    return F.interpolate(maps, size, mode="bilinear", align_corners=align_corners)


def root_mean_square(
    difference: Float[Tensor, "b ..."], per_sample: bool = False
) -> Float[Tensor, ""]:
    """sqrt(mean of squares), with gradient 0 instead of NaN where all differences are 0.

    Args:
        difference: student minus teacher.
        per_sample: the mean over the batch is taken after the root, else before.
    """
    squares = difference.square()
    if per_sample:
        means = squares.flatten(1).mean(dim=1)
    else:
        means = mean_with_gradient(squares.mean())  # the root is not the mean of processes' roots
    zero = means == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, means).sqrt()).mean()


def attention_loss(
    student: Float[Tensor, "b c h w"],
    teacher: Float[Tensor, "b c _h _w"],
    normalisation: str = "minmax",
    align_corners: bool = False,
) -> Float[Tensor, ""]:
    """mean_b sqrt(mean over classes and cells of (student - teacher)^2), after normalisation.

    Args:
        student: attention maps, of any number of cells.
        teacher: attention maps, whose gradient is not used.
        normalisation: one of `NORMALISATIONS`.
        align_corners: how the student's maps are resized, see `resize_maps`.
    """
    if normalisation == "none":
        # maps sum to the evidence of an image: of fewer cells, each holds more
        student = student * (student[0, 0].numel() / teacher[0, 0].numel())
    found = resize_maps(student, (teacher.shape[2], teacher.shape[3]), align_corners)
    wanted = teacher.detach()
    if normalisation == "minmax":
        found, wanted = normalise_jointly(found), normalise_jointly(wanted)
    return root_mean_square(found - wanted, per_sample=True)


def activation_attention_loss(
    student: Float[Tensor, "b k h w"],
    teacher: Float[Tensor, "b d _h _w"],
    align_corners: bool = False,
) -> Float[Tensor, ""]:
    """AT: mean over samples and cells of the squared difference of both maps mean_k A_k^2, each
    divided by its Euclidean norm (its paper's equation 2 with p = 2, averaged as in its code).

    Args:
        student: activations; channels need not be as many as the teacher's.
        teacher: activations, whose gradient is not used.
        align_corners: how the student's map is resized, see `resize_maps`.
    """
    size = (teacher.shape[2], teacher.shape[3])
    own = resize_maps(student.square().mean(dim=1, keepdim=True), size, align_corners)
    wanted = teacher.detach().square().mean(dim=1, keepdim=True)
    difference = F.normalize(own.flatten(1), dim=1) - F.normalize(wanted.flatten(1), dim=1)
    return difference.square().mean()
