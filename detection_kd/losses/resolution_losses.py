"""What a student at low resolution learns from: labels, and its teacher's predictions, features and
attention maps.

Source: as in `attention_transfer`; KD is Hinton et al., 2015. CE is always there; a term of weight
0 is not computed. Differences from the original: the temperature softens both sides and the loss is
multiplied by its square; terms of maps accept a student whose map is smaller than its teacher's; a
negative weight is refused, where it silently meant none; the terms that are logged add up to the
total. `one_sided`, `align_corners`, `normalisation=none` and `level` bring back what the original
does or can do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from detection_kd.losses.attention_transfer import (
    NORMALISATIONS,
    activation_attention_loss,
    attention_loss,
    find_attention,
    find_attention_by_autograd,
    resize_maps,
    root_mean_square,
)
from wsi_common.config import key
from wsi_common.errors import UserError

LAST = -1  # level of the maps that are pooled


class GradingOutput(NamedTuple):
    """What a grading network says about patches.

    Attributes:
        maps: activations that are pooled (B, K, h, w).
        vectors: their averages (B, K).
        logits: of the grades (B, C).
        inner: activations of an earlier level (B, J, u, v), where one was asked for.
    """

    maps: Float[Tensor, "b k h w"]
    vectors: Float[Tensor, "b k"]
    logits: Float[Tensor, "b c"]
    inner: Float[Tensor, "b j u v"] | None = None


@dataclass
class ResolutionTerms:
    """Weights of the terms beside the labels' cross-entropy, 0: off; and how they are computed."""

    kd: float = key(0.0, "weight of the teacher's softened predictions")
    fm: float = key(0.0, "weight of feature matching: differences of the last maps")
    sr: float = key(0.0, "weight of the student's vector seen through the teacher's last layer")
    at: float = key(0.0, "weight of activation attention (AT)")
    grad_cam: float = key(0.0, "weight of Grad-CAM maps: sum over channels, then clip")
    at_plus: float = key(0.0, "weight of AT+ maps: clip, then sum over channels (published: 10)")
    temperature: float = key(1.0, "of kd, on both sides (published: 1)")
    one_sided: bool = key(
        False, "soften the teacher only in kd and leave out the square, as published"
    )
    normalisation: str = key(
        "minmax", "of at_plus and grad_cam; minmax is joint over classes", choices=NORMALISATIONS
    )
    level: int = key(
        LAST, "maps of at_plus and grad_cam; -1: the last, in closed form; -2 ...: earlier ones"
    )
    align_corners: bool = key(
        False, "resize a student's maps with corners on corners, as published"
    )

    def weights(self) -> dict[str, float]:
        """The weight of every term that is on.

        Raises:
            UserError: a weight below 0, a temperature not above 0, or a level that is none.
        """
        found = {name: float(getattr(self, name)) for name in TERMS}
        if min(found.values()) < 0 or self.temperature <= 0 or self.level > LAST:
            raise UserError(
                "terms: expected weights of at least 0, a temperature above 0 and a level of at "
                f"most {LAST}, found {found}, temperature={self.temperature:g}, level={self.level}"
            )
        return {name: weight for name, weight in found.items() if weight > 0}

    def needs_inner(self) -> bool:
        """Whether a term compares maps of an earlier level."""
        return self.level != LAST and (self.at_plus > 0 or self.grad_cam > 0)


@dataclass(frozen=True)
class PairedOutputs:
    """What student and teacher say about the same patches, and how to compare it."""

    student: GradingOutput
    teacher: GradingOutput
    student_head: nn.Linear
    teacher_head: nn.Linear
    settings: ResolutionTerms

    def attention_loss(self, order: str) -> Float[Tensor, ""]:
        """Difference of attention maps of the level that is set."""
        settings = self.settings
        if settings.level == LAST:
            student = find_attention(self.student.maps, self.student_head.weight, order)
            teacher = find_attention(
                self.teacher.maps.detach(), self.teacher_head.weight.detach(), order
            )
        else:
            assert self.student.inner is not None and self.teacher.inner is not None
            student = find_attention_by_autograd(
                self.student.inner, self.student.logits, order, create_graph=True
            )
            teacher = find_attention_by_autograd(self.teacher.inner, self.teacher.logits, order)
        return attention_loss(student, teacher, settings.normalisation, settings.align_corners)


def softened_prediction_loss(
    student: Float[Tensor, "b c"],
    teacher: Float[Tensor, "b c"],
    temperature: float = 1.0,
    one_sided: bool = False,
) -> Float[Tensor, ""]:
    """T^2 mean_b KL(softmax(teacher / T) | softmax(student / T)) (KD).

    Args:
        student, teacher: logits; the teacher's gradient is not used.
        temperature: T.
        one_sided: mean_b of the cross-entropy between softmax(teacher / T) and softmax(student),
            as published.
    """
    target = (teacher.detach() / temperature).softmax(dim=1)
    if one_sided:
        return F.cross_entropy(student, target)
    found = (student / temperature).log_softmax(dim=1)
    return temperature**2 * F.kl_div(found, target, reduction="batchmean")


def feature_matching_loss(
    student: Float[Tensor, "b k h w"],
    teacher: Float[Tensor, "b k _h _w"],
    align_corners: bool = False,
) -> Float[Tensor, ""]:
    """Root mean square over everything of resized student minus teacher (FM)."""
    resized = resize_maps(student, (teacher.shape[2], teacher.shape[3]), align_corners)
    return root_mean_square(resized - teacher.detach())


def regressed_prediction_loss(
    vectors: Float[Tensor, "b k"], teacher_head: nn.Linear, teacher: Float[Tensor, "b c"]
) -> Float[Tensor, ""]:
    """Root mean square of W_t z_s + b_t - l_t: the student's vector through the teacher's last
    layer, against the teacher's logits (SR, softmax regression).

    Args:
        vectors: z_s.
        teacher_head: W_t and b_t, which get no gradient.
        teacher: l_t.
    """
    bias = None if teacher_head.bias is None else teacher_head.bias.detach()
    found = F.linear(vectors, teacher_head.weight.detach(), bias)
    return root_mean_square(found - teacher.detach())


TERMS: dict[str, Callable[[PairedOutputs], Tensor]] = {
    "kd": lambda c: softened_prediction_loss(
        c.student.logits, c.teacher.logits, c.settings.temperature, c.settings.one_sided
    ),
    "fm": lambda c: feature_matching_loss(c.student.maps, c.teacher.maps, c.settings.align_corners),
    "sr": lambda c: regressed_prediction_loss(c.student.vectors, c.teacher_head, c.teacher.logits),
    "at": lambda c: activation_attention_loss(
        c.student.maps, c.teacher.maps, c.settings.align_corners
    ),
    "grad_cam": lambda c: c.attention_loss("grad_cam"),
    "at_plus": lambda c: c.attention_loss("at_plus"),
}


def resolution_loss(
    logits: Float[Tensor, "b c"],
    labels: Int[Tensor, " b"],
    weights: dict[str, float],
    pair: PairedOutputs | None = None,
    graded_share: float = 1.0,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """The loss, and the terms that add up to it.

    Args:
        logits: the student's.
        labels: ordered grades, 0 the lowest; -100, ungraded, takes part in the other terms alone.
        weights: of the terms that are on, see `ResolutionTerms.weights`.
        pair: student and teacher; may be left out where no term is on.
        graded_share: of the patches of an epoch. The cross-entropy is divided by it, and by the
            patches of the batch: the mean over an epoch is that of its graded patches, and several
            processes whose batches hold different numbers of these train as one.

    Returns:
        The sum, and its terms by name (`ce` and those of `weights`), each with its weight applied.
    """
    assert pair is not None or not weights
    found = F.cross_entropy(logits, labels, reduction="sum")  # 0 for a label of -100
    terms = {"ce": found / (graded_share * len(labels))}
    for name, weight in weights.items():
        terms[name] = weight * TERMS[name](pair)  # type: ignore[arg-type]
    return sum(terms.values(), logits.new_zeros(())), terms
