"""mi-Net and MI-Net: multiple instance neural networks (Wang et al., Pattern Recognition 2018,
arXiv 1610.02501).

Three fully connected layers per tile, then either a score per tile that is pooled to the bag's
(mi-Net, `level` = instance), or pooled features that are scored (MI-Net, embedding). Deep
supervision (MI-Net with DS) pools and scores after every layer, trains all three and averages their
probabilities; residual connections (MI-Net with RC) add the pooled features of three equally wide
layers. Pooling is max, mean or log-mean-exp, of probabilities in mi-Net.
Differences: C logits and the task's criterion in place of one sigmoid. With two classes there is
one score, that of class 1, and the logits are (0, its log-odds), which is the same function; with
more, a score a class.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, softplus

from mil.models.layers import Dropout, index_bags, segment_max, segment_sum
from mil.models.output import MILOutput, Packed, Stream, Target, initialise
from wsi_common.errors import UserError, did_you_mean

LEVELS = ("instance", "embedding", "deep", "residual")
POOLINGS = ("max", "mean", "lse")


class MINet(nn.Module):
    """Fully connected layers, pooling, score.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a unit of what is pooled or scored.
        level: `instance` (mi-Net), `embedding` (MI-Net), `deep` (MI-Net with DS), `residual`
            (MI-Net with RC).
        pooling: `max`, `mean` or `lse` (log of the mean of exponentials).
        hidden: width of the first layer; the next two have a half and a quarter, with `residual` a
            half all three.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        dropout: float = 0.5,
        level: str = "embedding",
        pooling: str = "max",
        hidden: int = 256,
    ) -> None:
        super().__init__()
        for name, value, valid in (("level", level, LEVELS), ("pooling", pooling, POOLINGS)):
            if value not in valid:
                raise UserError(f"{name}={value}: {did_you_mean(value, valid)}")
        if hidden < 4:
            raise UserError(
                f"hidden={hidden}: expected at least 4, of which the last layer has a quarter"
            )
        self.level, self.pooling, self.classes = level, pooling, classes
        widths = [hidden // 2] * 3 if level == "residual" else [hidden, hidden // 2, hidden // 4]
        self.layers = nn.ModuleList(
            nn.Linear(a, b) for a, b in zip([dim, *widths], widths, strict=False)
        )
        self.drop = Dropout(dropout)
        scores = 1 if classes == 2 else classes
        self.heads = nn.ModuleList(
            nn.Linear(width, scores) for width in (widths if level == "deep" else widths[-1:])
        )
        initialise(self)

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is the share of the pooled units (mi-Net: scores) that the
        tile supplies.
        """
        offsets = torch.tensor([0, len(features)], device=features.device)
        packed = self.forward_packed(features, offsets)
        given = packed.streams if self.training and target is not None else ()
        streams = tuple((stream.logits[0], stream.weight) for stream in given)
        return MILOutput(packed.logits[0], packed.attention, streams)

    def forward_packed(self, features: Float[Tensor, "t d"], offsets: Int[Tensor, " b1"]) -> Packed:
        """Several bags, their tiles one after the other."""
        bag, lengths = index_bags(offsets), offsets.diff()
        maps = []
        h = features
        for layer in self.layers:
            h = torch.relu(layer(h))
            maps.append(h)
        if self.level == "instance":
            scores = self.heads[0](self.drop(h))  # (T, 1 or C)
            logits = self._two(self._pool_scores(scores, bag, lengths))
            return Packed(logits, self._share(scores, bag, lengths))
        if self.level == "embedding":
            maps = maps[-1:]
        pooled = [self._pool(self.drop(h), bag, lengths) for h in maps]
        share = torch.stack([self._share(h, bag, lengths) for h in maps]).mean(0)
        if self.level == "residual":
            return Packed(self._two(self.heads[0](torch.stack(pooled).sum(0))), share)
        scores = [head(z) for head, z in zip(self.heads, pooled, strict=True)]
        if self.level == "embedding":
            return Packed(self._two(scores[0]), share)
        average = torch.stack([torch.sigmoid(score) for score in scores]).mean(0)
        streams = tuple(Stream(self._two(score), 1.0) for score in scores)
        return Packed(self._two(log_odds(average)), share, streams if self.training else ())

    def _pool(
        self, h: Float[Tensor, "t f"], bag: Int[Tensor, " t"], lengths: Int[Tensor, " b"]
    ) -> Float[Tensor, "b f"]:
        if self.pooling == "max":
            return segment_max(h, bag, len(lengths))
        if self.pooling == "mean":
            return segment_sum(h, bag, len(lengths)) / lengths[:, None]
        return segment_log_mean_exp(h, bag, lengths)

    def _pool_scores(
        self, scores: Float[Tensor, "t k"], bag: Int[Tensor, " t"], lengths: Int[Tensor, " b"]
    ) -> Float[Tensor, "b k"]:
        """Log-odds of the pooled probabilities: max P, mean P, or log mean exp P, which is a
        probability too.
        """
        if self.pooling == "max":
            return segment_max(scores, bag, len(lengths))  # the logarithm's odds rise with P
        if self.pooling == "lse":
            return log_odds(segment_log_mean_exp(torch.sigmoid(scores), bag, lengths))
        # log of the mean P and of the mean 1 - P, without leaving the logarithm
        yes = segment_log_mean_exp(logsigmoid(scores), bag, lengths)
        return yes - segment_log_mean_exp(-softplus(scores), bag, lengths)

    def _two(self, scores: Float[Tensor, "b k"]) -> Float[Tensor, "b c"]:
        """Logits of C classes; of two, class 0 has the logit 0."""
        return torch.cat([torch.zeros_like(scores), scores], dim=1) if self.classes == 2 else scores

    @torch.no_grad()
    def _share(
        self, h: Float[Tensor, "t f"], bag: Int[Tensor, " t"], lengths: Int[Tensor, " b"]
    ) -> Float[Tensor, " t"]:
        """Attention: with max the share of the maxima (ties are shared), else 1/N or the weights of
        the exponentials.
        """
        bags = len(lengths)
        if self.pooling == "mean":
            return (1 / lengths.to(h.dtype))[bag]
        top = segment_max(h, bag, bags)[bag]
        raised = (h == top).to(h.dtype) if self.pooling == "max" else (h - top).exp()
        return (raised / segment_sum(raised, bag, bags)[bag]).mean(1)


def segment_log_mean_exp(
    h: Float[Tensor, "t f"], bag: Int[Tensor, " t"], lengths: Int[Tensor, " b"]
) -> Float[Tensor, "b f"]:
    """log(mean(exp h)) over the tiles of each bag."""
    top = segment_max(h.detach(), bag, len(lengths))
    return top + (segment_sum((h - top[bag]).exp(), bag, len(lengths)) / lengths[:, None]).log()


def log_odds(p: Float[Tensor, "b k"]) -> Float[Tensor, "b k"]:
    """log(p / (1 - p)) with p kept off 0 and 1 by 1e-7, as the authors' framework does."""
    p = p.clamp(1e-7, 1 - 1e-7)
    return p.log() - torch.log1p(-p)
