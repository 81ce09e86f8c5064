"""KDE: a kernel density estimate on the sphere, which is low where the features spread.

The uniformity of Wang and Isola (ICML 2020) with the von Mises-Fisher kernel. It takes KoLeo's
place in Virchow2 (Zimmermann et al., arXiv 2408.00738): among tiles there are near duplicates, and
KoLeo's logarithm diverges at them. OpenMidnight computes its negative and adds that, which rewards
crowding; here lower is more spread.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from patch_encoder.selfdistill.losses.precision import at_least_float32, no_autocast


def kde_loss(features: Float[Tensor, "b d"], kappa: float = 5.0) -> Float[Tensor, ""]:
    """mean_i log sum_{j != i} exp(kappa z_i . z_j) over features of unit length, to be minimised.

    Args:
        features: (B, D) of one view of this process, B at least 2.
        kappa: concentration of the kernel; the term j = i is the constant exp(kappa) and left out.
    """
    assert len(features) > 1, "a density needs other features"
    with no_autocast(features):
        z = nn.functional.normalize(at_least_float32(features), dim=-1)
        return (kappa * z @ z.T).fill_diagonal_(-float("inf")).logsumexp(dim=1).mean()
