"""DTFD-MIL: double-tier feature distillation MIL (Zhang et al., CVPR 2022, arXiv 2203.12081).

Tier 1: the bag is split at random into pseudo-bags that inherit the slide's label; each is pooled
by gated attention and classified. Tier 2: gated attention over what the pseudo-bags distil, by the
class activation (softmax of W a_k h_k) or the attention of their tiles: `maxs` the highest tile,
`maxmins` the highest and the lowest, `mas` the most attended, `afs` the pooled feature. Loss: mean
cross-entropy of tier 1 plus that of tier 2.

Gradients: the distilled features are detached. The authors' two optimisers drop tier 2's gradients
into tier 1 at every step, so that this is their algorithm, and one Adam over both tiers makes the
same steps (it is elementwise).
Differences: in evaluation tile i belongs to pseudo-bag i mod G (the original shuffles, so that its
answers depend on the generator); MAS is in the paper and not in the code; with more than two
classes tiles are ranked by the class that their pseudo-bag is taken for (with two by the last
class, as there); pseudo-bags are never empty.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models.layers import Dropout, segment_pool, segment_softmax
from mil.models.output import MILOutput, Packed, Stream, Target, initialise
from wsi_common.checkpoint import load_weights, read_weights
from wsi_common.errors import UserError, did_you_mean

DISTIL = ("afs", "maxs", "maxmins", "mas")
# names of the authors' checkpoint -> ours
NAMES = {
    "dim_reduction.fc1.": "embed.0.",
    "attention.attention_V.0.": "attention.v.",
    "attention.attention_U.0.": "attention.u.",
    "attention.attention_weights.": "attention.w.",
    "classifier.fc.": "head.",
    "att_classifier.attention.attention_V.0.": "attention2.v.",
    "att_classifier.attention.attention_U.0.": "attention2.u.",
    "att_classifier.attention.attention_weights.": "attention2.w.",
    "att_classifier.classifier.fc.": "head2.",
}


class Gated(nn.Module):
    """Scores w (tanh(V h) * sigmoid(U h)) before the softmax (ABMIL's gate)."""

    def __init__(self, hidden: int, attention: int) -> None:
        super().__init__()
        self.v, self.u = nn.Linear(hidden, attention), nn.Linear(hidden, attention)
        self.w = nn.Linear(attention, 1)

    def forward(self, h: Float[Tensor, "n f"]) -> Float[Tensor, "n 1"]:
        """One score a row."""
        return self.w(torch.tanh(self.v(h)) * torch.sigmoid(self.u(h)))


class DTFD(nn.Module):
    """Two tiers of gated attention.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a unit before either classifier.
        distil: `afs`, `maxs`, `maxmins` or `mas`.
        groups: number G of pseudo-bags.
        instances: tiles that all pseudo-bags together hand on (from each end, for `maxmins`).
        hidden: width of the embedding.
        attention: width of the attention layers.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        dropout: float = 0.0,
        distil: str = "afs",
        groups: int = 4,
        instances: int = 4,
        hidden: int = 512,
        attention: int = 128,
    ) -> None:
        super().__init__()
        if distil not in DISTIL:
            raise UserError(f"distil={distil}: {did_you_mean(distil, DISTIL)}")
        if groups < 1 or instances < 1:
            raise UserError(f"groups={groups}, instances={instances}: expected at least 1 of both")
        self.distil, self.groups, self.each = distil, groups, max(1, instances // groups)
        self.embed = nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.ReLU())
        self.drop = Dropout(dropout)
        self.attention, self.head = Gated(hidden, attention), nn.Linear(hidden, classes)
        self.attention2, self.head2 = Gated(hidden, attention), nn.Linear(hidden, classes)
        initialise(self)

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,) of tier 2; attention is the tile's in its pseudo-bag times that of what
        the pseudo-bag hands on.
        """
        offsets = torch.tensor([0, len(features)], device=features.device)
        packed = self.forward_packed(features, offsets)
        if not packed.streams or target is None:
            return MILOutput(packed.logits[0], packed.attention)
        tier2, tier1 = (stream.logits for stream in packed.streams)
        streams = ((tier2[0], 1.0), *((row, 1 / len(tier1)) for row in tier1))
        return MILOutput(tier2[0], packed.attention, streams)

    def forward_packed(self, features: Float[Tensor, "t d"], offsets: Int[Tensor, " b1"]) -> Packed:
        """Several bags, their tiles one after the other, and so their pseudo-bags."""
        h = self.embed(features)  # (T, 512)
        lengths = offsets.diff().tolist()
        counts = torch.tensor([min(self.groups, n) for n in lengths])
        starts = counts.cumsum(0) - counts  # first pseudo-bag of each bag
        local = zip((self.split(n) for n in lengths), starts.tolist(), strict=True)
        # pseudo-bag of each tile, and bag of each pseudo-bag
        group = torch.cat([places + start for places, start in local]).to(h.device)
        bag, groups = torch.repeat_interleave(counts).to(h.device), int(counts.sum())
        a = segment_softmax(self.attention(h), group, groups)  # (T, 1)
        pooled = segment_pool(a, h, group, groups)[:, 0]  # (G, 512)
        tier1 = self.head(self.drop(pooled))  # (G, C)
        handed, origin = self.distilled(
            h.detach(), a.detach().squeeze(1), group, pooled.detach(), tier1.detach()
        )
        b = segment_softmax(self.attention2(handed), bag[origin], len(lengths))  # (M, 1)
        logits = self.head2(self.drop(segment_pool(b, handed, bag[origin], len(lengths))[:, 0]))
        # tier-2 attention of each pseudo-bag
        share = b.new_zeros(groups).index_add(0, origin, b.squeeze(1))
        streams = (Stream(logits, 1.0), Stream(tier1, 1.0, bag)) if self.training else ()
        return Packed(logits, a.squeeze(1) * share[group], streams)

    def split(self, n: int) -> Int[Tensor, " n"]:
        """Pseudo-bag of each tile: sizes differ by one at most; at random while training."""
        return (torch.randperm(n) if self.training else torch.arange(n)) % min(self.groups, n)

    def distilled(
        self,
        h: Float[Tensor, "n f"],
        a: Float[Tensor, " n"],
        group: Int[Tensor, " n"],
        pooled: Float[Tensor, "g f"],
        tier1: Float[Tensor, "g c"],
    ) -> tuple[Float[Tensor, "m f"], Int[Tensor, " m"]]:
        """What tier 2 sees, and the pseudo-bag it comes from.

        Args:
            h, a, group: embedded tiles, their attention and pseudo-bag.
            pooled, tier1: the pseudo-bags' features and logits.
        """
        if self.distil == "afs":
            return pooled, torch.arange(len(pooled), device=h.device)
        scores = a if self.distil == "mas" else self.activation(h, a, group, tier1)
        chosen = self.chosen(scores, group, len(pooled))
        return h[chosen], group[chosen]

    def chosen(
        self, scores: Float[Tensor, " n"], group: Int[Tensor, " n"], count: int
    ) -> Int[Tensor, " m"]:
        """The tiles that each of `count` pseudo-bags hands on: highest (and lowest) scores, ties in
        order of the bag.
        """
        tiles = []
        for g in range(count):
            members = torch.nonzero(group == g).squeeze(1)
            order = members[scores[members].sort(descending=True, stable=True).indices]
            tiles.append(order[: self.each])
            if self.distil == "maxmins":
                tiles.append(order[-self.each :])
        return torch.cat(tiles)

    @torch.no_grad()
    def activation(
        self,
        h: Float[Tensor, "n f"],
        a: Float[Tensor, " n"],
        group: Int[Tensor, " n"],
        tier1: Float[Tensor, "g c"],
    ) -> Float[Tensor, " n"]:
        """Class activation of each tile, by which the pseudo-bag's tiles are ranked."""
        cam = (a[:, None] * h) @ self.head.weight.T  # (N, C)
        classes = cam.shape[1]
        if classes == 1:
            return cam[:, 0]
        ranked = torch.full_like(group, classes - 1) if classes == 2 else tier1.argmax(1)[group]
        return cam.softmax(1).gather(1, ranked[:, None]).squeeze(1)


def load_published(path: str | Path, **options: Any) -> DTFD:
    """DTFD with weights from a checkpoint of the authors' repository; widths are read from the
    file.

    Args:
        path: file with the dicts classifier, dim_reduction, attention, att_classifier.
        options: `distil`, `groups`, `instances`, which the file does not hold.
    """
    content = read_weights(path, "a DTFD-MIL checkpoint")
    nested = {
        f"{part}.{name}": w
        for part, block in content.items()
        if isinstance(block, dict)
        for name, w in block.items()
    }
    renamed = {
        new + name.removeprefix(old): w
        for name, w in nested.items()
        for old, new in NAMES.items()
        if name.startswith(old)
    }
    if "embed.0.weight" not in renamed or len(renamed) != len(nested):
        raise UserError(
            f"{path}: expected a DTFD-MIL checkpoint (dim_reduction, attention, ...), found "
            f"{sorted(nested)[:4]}"
        )
    hidden, dim = renamed["embed.0.weight"].shape
    classes, attention = len(renamed["head.bias"]), len(renamed["attention.v.bias"])
    model = DTFD(dim, classes, hidden=hidden, attention=attention, **options)
    load_weights(model, renamed, str(path))
    return model.eval()
