"""CLAM-SB and CLAM-MB: clustering-constrained attention MIL (Lu, Williamson et al., Nature BME
2021, arXiv 2004.09666).

Gated attention over embedded tiles: one map for all classes (SB) or one a class (MB, each with its
own one-logit classifier). While training, the B tiles of highest and the B of lowest attention of
the slide's class are classified as evidence for and against it by that class's instance classifier,
with the smooth top-1 SVM loss; loss = 0.7 bag + 0.3 instance. As in the authors' code the attention
branches' dropout is 0.25 whenever `dropout` is not 0. Three or more classes that exclude each other
are the authors' task 2, which asks for `--subtyping`; two are task 1.
Differences: a bag of fewer than B tiles takes all of them (the original stops); Xavier
initialisation, as in the published version (its later default is torch's); the bag loss is the
task's criterion.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.losses.smooth_svm import smooth_top1_svm
from mil.models.layers import Dropout, index_bags, segment_pool, segment_softmax
from mil.models.output import MILOutput, Packed, Target, initialise, select_present


class CLAM(nn.Module):
    """Attention branches, slide classifier, instance classifiers.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a unit of the embedding.
        branches: one attention map a class (CLAM-MB) in place of one for all (CLAM-SB).
        hidden: width of the embedding.
        attention: width of the attention layer (256 small, 384 big).
        instances: B, tiles of highest and of lowest attention that are classified.
        subtyping: classes exclude each other: the most attended tiles are evidence against the
            slide's other classes. None: by task, True for three classes or more. False for two, of
            which one is often "no tumour": tumour slides have such tiles too; and where outputs do
            not exclude each other (labels, thresholds between grades) or say nothing about the
            absent ones (intervals of survival, none of them in a censored slide).
        bag_weight: share of the bag loss.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        dropout: float = 0.25,
        branches: bool = False,
        hidden: int = 512,
        attention: int = 256,
        instances: int = 8,
        subtyping: bool | None = None,
        bag_weight: float = 0.7,
    ) -> None:
        super().__init__()
        inner = 0.25 if dropout else 0.0
        self.embed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), Dropout(dropout))
        self.attend = nn.Sequential(nn.Linear(hidden, attention), nn.Tanh(), Dropout(inner))
        self.gate = nn.Sequential(nn.Linear(hidden, attention), nn.Sigmoid(), Dropout(inner))
        self.score = nn.Linear(attention, classes if branches else 1)
        # MB: row c sees the bag of branch c only
        self.head = nn.Linear(hidden, classes)
        self.instance_heads = nn.ModuleList(nn.Linear(hidden, 2) for _ in range(classes))
        self.branches, self.instances = branches, instances
        self.subtyping, self.bag_weight = subtyping, bag_weight
        initialise(self)

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is the map (MB: of the class with the highest logit)."""
        h = self.embed(features)  # (N, 512)
        a = torch.softmax(self._scores(h).T, dim=1)  # (K, N)
        logits = self._classify((a @ h)[None])[0]
        attention = a[int(logits.argmax()) if self.branches else 0]
        if not self.training or target is None:
            return MILOutput(logits, attention)
        classes = len(self.instance_heads)
        # what is told as a number is one of the classes
        subtyping = self.subtyping
        if subtyping is None:
            subtyping = isinstance(target, int) and classes > 2
        loss = self.instance_loss(h, a, select_present(target, classes), subtyping)
        auxiliary = (1 - self.bag_weight) * loss
        return MILOutput(logits, attention, ((logits, self.bag_weight),), auxiliary)

    def forward_packed(self, features: Float[Tensor, "t d"], offsets: Int[Tensor, " b1"]) -> Packed:
        """Several bags, their tiles one after the other."""
        bag, bags = index_bags(offsets), len(offsets) - 1
        h = self.embed(features)
        a = segment_softmax(self._scores(h), bag, bags)  # (T, K)
        logits = self._classify(segment_pool(a, h, bag, bags))
        chosen = logits.argmax(1)[bag] if self.branches else torch.zeros_like(bag)
        return Packed(logits, a.gather(1, chosen[:, None]).squeeze(1))

    def instance_loss(
        self, h: Float[Tensor, "n f"], a: Float[Tensor, "k n"], targets: list[int], subtyping: bool
    ) -> Float[Tensor, ""]:
        """Sum over classes of their instance classifier's loss; with subtyping the mean.

        Args:
            h: embedded tiles; gradients reach the embedding.
            a: attention maps, one or one a class.
            targets: classes of the slide.
            subtyping: the other classes' loss too.
        """
        size = min(self.instances, len(h))
        # (C, 2, 512); all of them get a gradient
        weight = torch.stack([head.weight for head in self.instance_heads])
        bias = torch.stack([head.bias for head in self.instance_heads])
        losses = []
        for c in range(len(weight)):
            own = a[c if self.branches else 0].detach()
            tiles = own.topk(size).indices
            labels = torch.full((size,), int(c in targets), device=h.device)
            if c in targets:
                tiles = torch.cat([tiles, (-own).topk(size).indices])
                labels = torch.cat([labels, torch.zeros_like(labels)])
            elif not subtyping:
                continue
            losses.append(smooth_top1_svm((h[tiles] @ weight[c].T + bias[c]).float(), labels))
        total = sum(losses, start=0.0 * (weight.sum() + bias.sum()))
        return total / len(weight) if subtyping else total

    def _scores(self, h: Float[Tensor, "n f"]) -> Float[Tensor, "n k"]:
        return self.score(self.attend(h) * self.gate(h))

    def _classify(self, bags: Float[Tensor, "b k f"]) -> Float[Tensor, "b c"]:
        if self.branches:
            return (bags * self.head.weight).sum(2) + self.head.bias
        return self.head(bags[:, 0])
