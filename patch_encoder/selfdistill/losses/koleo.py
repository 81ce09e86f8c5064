"""KoLeo: each feature is pushed away from its nearest neighbour in the batch.

Sablayrolles et al., Spreading Vectors for Similarity Search (ICLR 2019), after the
entropy estimator of Kozachenko and Leonenko; a term of DINOv2 with weight 0.1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from patch_encoder.selfdistill.losses.precision import at_least_float32, no_autocast

EPSILON = 1e-8


def koleo_loss(features: Float[Tensor, "b d"]) -> Float[Tensor, ""]:
    """-mean_i log ||z_i - z_nn(i)|| over features of unit length, to be minimised.

    Args:
        features: (B, D) of one view of this process, B at least 2: two views of one tile would be
            each other's neighbours.
    """
    assert len(features) > 1, "a feature alone has no neighbour"
    with no_autocast(features):
        z = nn.functional.normalize(at_least_float32(features), dim=-1, eps=EPSILON)
        with torch.no_grad():
            nearest = (z @ z.T).fill_diagonal_(-2).argmax(dim=1)
        return -(torch.linalg.vector_norm(z - z[nearest], dim=-1) + EPSILON).log().mean()
