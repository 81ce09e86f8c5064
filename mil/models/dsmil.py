"""DSMIL: dual-stream multiple instance learning (Li, Li, Eliceiri, CVPR 2021, arXiv 2011.08939).

Instance stream: every tile is classified, the highest logit of each class is the stream's. Bag
stream: tiles are weighted by the softmax of their query's product with the query of that class's
highest tile, the critical instance. Both streams are trained with weight 0.5; the slide's logits
are their mean. As in the authors' code: two-layer query with tanh, values are the tiles themselves
(`passing_v=True`: dropout, linear, ReLU before), the bag classifier sees all classes' bags.
Differences: the task's criterion in place of a sigmoid per class; inference averages logits, not
probabilities; `hidden` > 0 embeds tiles first (Linear, ReLU, dropout), as TS2G-KD and MHIM-MIL do.
"""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models.layers import Dropout, index_bags, segment_pool, segment_softmax
from mil.models.output import MILOutput, Packed, Pooled, Stream, Target, initialise
from wsi_common.checkpoint import load_weights, read_weights
from wsi_common.errors import UserError

QUERY = 128
# names of the authors' state dicts -> ours
NAMES = {
    "i_classifier.fc.0.": "instance.",
    "b_classifier.q.": "query.",
    "b_classifier.v.1.": "value.1.",
    "b_classifier.fcc.": "head.",
}


class DSMIL(nn.Module):
    """Two streams of one bag.

    Args:
        dim: feature width D.
        classes: number of classes C.
        dropout: probability of dropping a unit of the embedding.
        hidden: width of the embedding; 0: none, features are used as they are.
        nonlinear: two-layer query with tanh; False: one linear layer.
        passing_v: values have a layer of their own.
        value_dropout: probability of dropping a unit of that layer's input; null: `dropout`.
    """

    def __init__(
        self,
        dim: int,
        classes: int,
        dropout: float = 0.0,
        hidden: int = 0,
        nonlinear: bool = True,
        passing_v: bool = False,
        value_dropout: float | None = None,
    ) -> None:
        super().__init__()
        width = hidden or dim
        self.embed = (
            nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), Dropout(dropout))
            if hidden
            else nn.Identity()
        )
        self.instance = nn.Linear(width, classes)
        deep = [nn.Linear(width, QUERY), nn.ReLU(), nn.Linear(QUERY, QUERY), nn.Tanh()]
        self.query = nn.Sequential(*deep) if nonlinear else nn.Linear(width, QUERY)
        self.value = (
            nn.Sequential(
                Dropout(dropout if value_dropout is None else value_dropout),
                nn.Linear(width, width),
                nn.ReLU(),
            )
            if passing_v
            else nn.Identity()
        )
        self.head = nn.Conv1d(classes, classes, width)
        initialise(self)

    def forward(
        self,
        features: Float[Tensor, "n d"],
        coords: Int[Tensor, "n 2"] | None = None,
        target: Target | None = None,
    ) -> MILOutput:
        """Slide logits (C,); attention is the bag stream's, the mean over classes."""
        pooled = self.pool(self.embed(features))
        trained = self.training and target is not None
        return MILOutput(pooled.logits, pooled.scores.mean(0), pooled.streams if trained else ())

    def forward_packed(self, features: Float[Tensor, "t d"], offsets: Int[Tensor, " b1"]) -> Packed:
        """Several bags, their tiles one after the other."""
        bag, bags = index_bags(offsets), len(offsets) - 1
        h = self.embed(features)
        tiles, queries = self.instance(h), self.query(h)  # (T, C), (T, 128)
        parts = [part.max(0) for part in tiles.split(offsets.diff().tolist())]
        rows = torch.stack([part.indices for part in parts]) + offsets[:-1, None]
        critical = queries[rows]  # (B, C, 128)
        products = [(queries * critical[bag, c]).sum(1) for c in range(tiles.shape[1])]
        a = segment_softmax(torch.stack(products, 1) / QUERY**0.5, bag, bags)  # (T, C)
        pooled = self.head(segment_pool(a, self.value(h), bag, bags)).squeeze(2)  # (B, C)
        highest = torch.stack([part.values for part in parts])  # (B, C)
        streams = (Stream(highest, 0.5), Stream(pooled, 0.5)) if self.training else ()
        return Packed((pooled + highest) / 2, a.mean(1), streams)

    def pool(self, h: Float[Tensor, "n f"]) -> Pooled:
        """From embedded tiles on; the scores are the bag stream's attention, one row per class. The
        tiles are ranked by the highest of their own logits.
        """
        tiles = self.instance(h)  # (N, C)
        highest, critical = tiles.max(0)  # (C,), (C,)
        queries = self.query(h)  # (N, 128)
        a = torch.softmax(queries[critical] @ queries.T / QUERY**0.5, dim=1)  # (C, N)
        bag = a @ self.value(h)  # (C, F)
        pooled = self.head(bag[None])[0, :, 0]  # (C,)
        streams = ((highest, 0.5), (pooled, 0.5))
        return Pooled((highest + pooled) / 2, bag, a, streams, tiles.amax(1)[None])


def load_published(path: str | Path) -> DSMIL:
    """DSMIL with weights from an aggregator file of the authors' repository; shapes are read from
    the file.
    """
    weights = read_weights(path, "a DSMIL aggregator's weights")
    renamed = {
        new + name.removeprefix(old): w
        for name, w in weights.items()
        for old, new in NAMES.items()
        if name.startswith(old)
    }
    if "head.weight" not in renamed or len(renamed) != len(weights):
        raise UserError(
            f"{path}: expected a DSMIL aggregator (keys i_classifier.*, b_classifier.*), found "
            f"{sorted(weights)[:4]}"
        )
    classes, _, dim = renamed["head.weight"].shape
    shape = {"nonlinear": "query.2.weight" in renamed, "passing_v": "value.1.weight" in renamed}
    model = DSMIL(dim, classes, **shape)
    load_weights(model, renamed, str(path))
    return model.eval()
