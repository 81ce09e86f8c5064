"""From a network to one vector a tile: stages of a ResNet, tokens of a transformer, the image half
of CLIP.

Tokens are taken after the last normalisation: `cls` is the class token, `mean` the mean of the
patch tokens (registers left out), `cls_mean` both, concatenated (Virchow: Vorontsov et al., 2024;
Midnight: Karasikov et al., 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

POOLS = ("published", "cls", "mean", "cls_mean")


def pool_tokens(tokens: Tensor, pool: str, prefix: int) -> Tensor:
    """(B, prefix + N, D) -> (B, D), cls_mean (B, 2 D); `prefix`: class token and registers."""
    parts = {"cls": tokens[:, 0], "mean": tokens[:, prefix:].mean(dim=1)}
    return torch.cat([parts[part] for part in pool.split("_")], dim=-1)


class TruncatedResNet(nn.Module):
    """A timm ResNet up to `out_stage` (1..4), global average pooled: (B, 3, H, W) -> (B, C)."""

    def __init__(self, trunk: nn.Module, out_stage: int) -> None:
        super().__init__()
        for stage in range(out_stage + 1, 5):
            setattr(trunk, f"layer{stage}", nn.Identity())
        self.trunk = trunk

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, C)."""
        return self.trunk.forward_features(pixels).mean(dim=(2, 3))  # type: ignore[operator]


class TokenPool(nn.Module):
    """A timm transformer and how its tokens become a feature: (B, 3, H, W) -> (B, D)."""

    def __init__(self, trunk: nn.Module, pool: str) -> None:
        super().__init__()
        self.trunk, self.pool = trunk, pool

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        tokens = self.trunk.forward_features(pixels)  # type: ignore[operator]
        # networks that average normalise afterwards
        normalise = getattr(self.trunk, "fc_norm", nn.Identity())
        prefix = self.trunk.num_prefix_tokens
        if self.pool == "cls_mean":
            return torch.cat(
                [normalise(pool_tokens(tokens, part, prefix)) for part in ("cls", "mean")], dim=-1
            )
        return normalise(pool_tokens(tokens, self.pool, prefix))


class TransformersPool(nn.Module):
    """A transformers vision model: (B, 3, H, W) -> (B, D).

    `pool` empty: the projected image embedding (CLIP), the pooled feature map (ConvNeXt, ResNet),
    else the class token.
    """

    def __init__(self, model: nn.Module, pool: str) -> None:
        super().__init__()
        self.model, self.pool = model, pool

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, D)."""
        output = self.model(pixel_values=pixels)
        if not self.pool and getattr(output, "image_embeds", None) is not None:
            return output.image_embeds
        tokens = output.last_hidden_state
        if tokens.ndim == 4:
            return tokens.mean(dim=(2, 3))
        prefix = 1 + getattr(self.model.config, "num_register_tokens", 0)
        return pool_tokens(tokens, self.pool or "cls", prefix)
