"""From the teacher's resolution to the student's: the mean of whole squares of pixels.

AT+ reduces by average pooling and then enlarges the result to the teacher's size again, so that the
student costs as much as the teacher; here the reduced pixels are what there is. AT+ also floors the
ratio: a target of 200 px of 512 px silently becomes 256 px. Here such a size is refused.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from wsi_common.errors import UserError


def reduce_resolution(pixels: Float[Tensor, "b 3 h w"], ratio: int) -> Float[Tensor, "b 3 h2 w2"]:
    """Mean of every ratio x ratio square: (B, 3, H, W) -> (B, 3, H / ratio, W / ratio).

    Pixels stay linear in what they were (0..1 or 0..255). A ratio of 1 gives the same tensor.

    Raises:
        UserError: the ratio does not divide height and width.
    """
    height, width = pixels.shape[-2:]
    if ratio < 1 or height % ratio or width % ratio:
        raise UserError(
            f"ratio={ratio}: expected a whole number that divides {height} x {width} px, found "
            "none; choose another ratio or another size of the patches"
        )
    return pixels if ratio == 1 else F.avg_pool2d(pixels, ratio)
