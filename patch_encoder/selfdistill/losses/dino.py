"""The loss of DINO: the student predicts, from one view, the teacher's target for another one.

Caron et al., Emerging Properties in Self-Supervised Vision Transformers (ICCV 2021), equation 3:

    L = 1 / pairs * sum_u sum_{v != u} mean_b H(q_u, p_v),    p_v = softmax(s_v / temperature)

over teacher views u and student views v. The published loop keeps a log-softmax for each of the
pairs; here the sum over pairs is written as "all with all, less each view with itself", which is
the same number and keeps one log-softmax per view for the backward pass:

    sum_u sum_{v != u} q_u . log p_v = (sum_u q_u) . (sum_v log p_v) - sum_u q_u . log p_u
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from patch_encoder.selfdistill.losses.precision import at_least_float32


def dino_loss(
    student_logits: Float[Tensor, "v b k"],
    teacher_targets: Float[Tensor, "t b k"],
    temperature: float = 0.1,
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats over all pairs of two different views.

    Args:
        student_logits: (V, B, K); the first T views are those that the teacher saw, in its order.
        teacher_targets: (T, B, K) probabilities, without gradient; T is 2, or 3 with a third
            global view.
        temperature: of the student's softmax.
    """
    views, batch, _ = student_logits.shape
    teacher_views = len(teacher_targets)
    assert 1 <= teacher_views <= views and views > 1, (teacher_views, views)
    log_p = (at_least_float32(student_logits) / temperature).log_softmax(dim=-1)
    all_pairs = (teacher_targets.sum(dim=0) * log_p.sum(dim=0)).sum()
    same_view = (teacher_targets * log_p[:teacher_views]).sum()
    return (same_view - all_pairs) / (teacher_views * (views - 1) * batch)
