"""What tells a healthy self-distillation from one that has collapsed, in a few numbers per step.

A collapsed network gives every tile the same answer. Then the teacher's targets carry no
information about the tile, whether they all are one prototype (no centring) or uniform (no
sharpening): Caron et al. (ICCV 2021), section 5.3 and figure 7. And the features have no spread:
Chen, He, SimSiam (CVPR 2021), section 4.1. Entropies are in nats.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patch_encoder.selfdistill.losses.precision import at_least_float32
from wsi_common.distributed import all_reduce_mean

# 1 when features are spread over the whole sphere; networks start with .4 to .9
MIN_FEATURE_STD = 0.01
# nats that a target tells about its tile; networks start with .3 to 1, a training without warm-up
# was seen to dip to 2e-4 and recover, and collapsed ones fell to 1e-5 and below
MIN_INFORMATION = 1e-4
# share of log K from which on targets are called uniform, and up to which one prototype
UNIFORM, ONE_PROTOTYPE = 0.99, 0.01


def _entropy(probabilities: Float[Tensor, "*b k"]) -> Float[Tensor, "*b"]:
    return torch.special.entr(probabilities).sum(dim=-1)


@torch.no_grad()
def measure_targets(targets: Float[Tensor, "t b k"]) -> dict[str, Float[Tensor, ""]]:
    """Entropies of the teacher's targets over all processes.

    Args:
        targets: (T, B, K) probabilities.

    Returns:
        teacher_entropy: mean entropy of a target; log K when uniform, 0 when one prototype.
        mean_target_entropy: entropy of the mean target; low when few prototypes are in use.
        target_information: mean KL divergence of a target from the mean target, which is the
            second less the first; 0 when all tiles have the same target.
    """
    flat = at_least_float32(targets).flatten(0, 1)
    mean_target = all_reduce_mean(flat.mean(dim=0))
    sharpness = all_reduce_mean(_entropy(flat).mean())
    spread = _entropy(mean_target)
    return {
        "teacher_entropy": sharpness,
        "mean_target_entropy": spread,
        "target_information": spread - sharpness,
    }


@torch.no_grad()
def feature_std(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Standard deviation of unit-length features over samples, averaged over dimensions, times
    sqrt(D): 1 when they are spread over the whole sphere, 0 when all are the same.

    Args:
        features: (N, D), N at least 2; of one view, or of several one below the other.
    """
    z = nn.functional.normalize(at_least_float32(features), dim=-1)
    return z.std(dim=0).mean() * math.sqrt(z.shape[1])


@torch.no_grad()
def rankme(features: Float[Tensor, "n d"]) -> Float[Tensor, ""]:
    """Effective rank: exp of the entropy of the normalised singular values, 1 to min(N, D).

    Garrido et al., RankMe (ICML 2023): it follows downstream accuracy without labels. Compare it
    only between equal N and D, and take N a few times D where it is used to choose.
    """
    singular = torch.linalg.svdvals(at_least_float32(features))
    return _entropy(singular / singular.sum().clamp(min=1e-12) + 1e-7).exp()


def describe_collapse(values: Mapping[str, float], prototypes: int) -> str | None:
    """One clause that says how a training has collapsed; None as long as it has not.

    Call it on means over tens of steps: a single step can come close to a threshold and recover.
    Targets that collapse need not take the features with them.

    Args:
        values: `feature_std`, and what `measure_targets` returns.
        prototypes: K.
    """
    entropy, spread = values["teacher_entropy"], values["feature_std"]
    if values["target_information"] < MIN_INFORMATION:
        found = f"teacher_entropy {entropy:.3g} of log K {math.log(prototypes):.3g}"
        if entropy > UNIFORM * math.log(prototypes):
            return f"all targets are uniform ({found})"
        if entropy < ONE_PROTOTYPE * math.log(prototypes):
            return f"all targets are one prototype ({found})"
        return f"all tiles have the same target ({found})"
    if spread < MIN_FEATURE_STD:
        return f"all features are alike (feature_std {spread:.2g}, 1 when spread)"
    return None
