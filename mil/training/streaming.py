"""A bag of any size through a trained model, block by block: memory of one block and a few numbers
per tile, the same answer.

Softmax pooling in one pass as in "Online normalizer calculation for softmax" (Milakov, Gimelshein,
2018): sums are kept relative to the highest score so far. Models whose slide statistic is such a
reduction have an entry in STREAMED; ILRA goes over the bag once a layer. TransMIL (the tiles'
square is convolved and goes through two layers), RRT-MIL (attention within a region is quadratic in
its tiles), HIPT (attention is quadratic in the regions), DeformMIL (tiles look around) and the
small MI-Nets have none. Scores stay in memory: 4 bytes a tile and map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.models import ABMIL, CLAM, DSMIL, DTFD, ILRA, MHIM, MaxMIL, MeanMIL, Standardised
from mil.models.fusion import Fused, NoTiles
from mil.models.ilra import GAB, CrossAttention
from mil.models.layers import find_standardised, inner_model
from mil.models.output import MILOutput, normalise_attention
from patch_encoder.bags.bag import Bag
from wsi_common.errors import UserError

BLOCK = 2048  # tiles at a time: 8 MB of 1,024 float32 features
KEPT_BYTES = 256 << 20  # of embeddings that a second pass finds again: 131,072 tiles of 512 numbers


class Reader:
    """Float32 features of a bag on the device, standardised where the model wants it; each pass
    reads the bag anew.
    """

    def __init__(
        self, bag: Bag, device: torch.device, wrapper: Standardised | None, tiles: int
    ) -> None:
        self.bag, self.device, self.wrapper, self.tiles = bag, device, wrapper, tiles

    def __len__(self) -> int:
        return len(self.bag)

    def __iter__(self) -> Iterator[Float[Tensor, "_ d"]]:
        return (self._ready(block) for block in self.bag.blocks(self.tiles))

    def rows(self, index: Int[Tensor, " k"]) -> Float[Tensor, "k d"]:
        """Features of some tiles."""
        return self._ready(self.bag.rows(index.cpu()))

    def _ready(self, block: Tensor) -> Tensor:
        block = block.to(self.device).float()
        return block if self.wrapper is None else self.wrapper.standardised(block)


class BlockwiseResult:
    """What is made of a bag's blocks; further passes make it anew only where it takes more than
    KEPT_BYTES.

    Args:
        make: (n, E) to (n, F).
        blocks: what it is made of; let go of once the result is kept.
        tiles: of the bag.
    """

    def __init__(
        self, make: Callable[[Tensor], Tensor], blocks: Iterable[Tensor], tiles: int
    ) -> None:
        self.make, self.blocks, self.tiles = make, blocks, tiles
        self.kept = False

    def __iter__(self) -> Iterator[Float[Tensor, "_ f"]]:
        if self.kept:
            yield from self.blocks
            return
        made = []
        for block in self.blocks:
            h = self.make(block)
            if 4 * self.tiles * h.shape[1] <= KEPT_BYTES:
                made.append(h)
            yield h
        if made:
            self.blocks, self.kept = made, True


class WeightedSum:
    """sum_n softmax(s)_n v_n of K maps over blocks; `sums` is (K, F) and `weights` the (K, N)
    softmax at the end.
    """

    def __init__(self, tiles: int) -> None:
        self.tiles, self.seen = tiles, 0
        # one piece for all: many small ones between the blocks would keep the heap from shrinking
        self.scores = torch.empty(0)
        self.top = self.total = self.sums = torch.empty(0)

    def add(self, scores: Float[Tensor, "k n"], values: Float[Tensor, "*k n f"]) -> None:
        """Scores of a block, and its values: one for all maps, or (K, N, F)."""
        top = scores.amax(1) if not self.seen else torch.maximum(self.top, scores.amax(1))
        raised = (scores - top[:, None]).exp()
        sums = (raised[:, None] @ values)[:, 0] if values.ndim == 3 else raised @ values
        if self.seen:
            kept = (self.top - top).exp()
            self.total = self.total * kept + raised.sum(1)
            self.sums = self.sums * kept[:, None] + sums
        else:
            self.total, self.sums = raised.sum(1), sums
            self.scores = scores.new_empty(len(scores), self.tiles)
        self.top = top
        self.scores[:, self.seen : self.seen + scores.shape[1]] = scores
        self.seen += scores.shape[1]

    def pooled(self) -> Float[Tensor, "k f"]:
        """The weighted sums."""
        return self.sums / self.total[:, None]

    def weights(self) -> Float[Tensor, "k n"]:
        """The weight of every tile."""
        return (self.scores - self.top[:, None]).exp_().div_(self.total[:, None])


@torch.inference_mode()
def stream(
    model: nn.Module,
    bag: Bag,
    device: torch.device,
    tiles: int = BLOCK,
    covariates: Float[Tensor, " v"] | None = None,
) -> MILOutput:
    """Logits and attention of a bag that need not fit into memory, on the CPU.

    Args:
        model: in evaluation mode, on `device`.
        bag: in memory or on disk.
        device: where to compute.
        tiles: number of tiles in a block.
        covariates: of the slide, encoded, for a model that is fused with them.

    Raises:
        UserError: the model has no entry in STREAMED.
    """
    assert not model.training
    wrapper, inner = find_standardised(model), _find_applied(model)
    way = STREAMED.get(type(inner))
    if way is None:
        raise UserError(
            f"{type(inner).__name__}: expected a model that is a reduction over tiles to stream a "
            "bag, found one that has no such form here; use one of "
            f"{', '.join(kind.__name__ for kind in STREAMED)}"
        )
    output = way(inner, Reader(bag, device, wrapper, tiles))
    if isinstance(model, Fused):
        output = output._replace(logits=output.logits + model.logits(covariates))
    return MILOutput(output.logits.float().cpu(), output.attention.float().cpu())


def can_stream(model: nn.Module) -> bool:
    """Whether `stream` takes the model."""
    return type(_find_applied(model)) in STREAMED


def _find_applied(model: nn.Module) -> nn.Module:
    inner = inner_model(model)
    return inner.student if isinstance(inner, MHIM) else inner


def _mean(model: MeanMIL, bag: Reader) -> MILOutput:
    total = sum(model.tile(block).sum(0, dtype=torch.float64) for block in bag)
    return MILOutput(total / len(bag), torch.full((len(bag),), 1 / len(bag)))


def _no_tiles(model: NoTiles, bag: Reader) -> MILOutput:
    return MILOutput(model.prior, torch.full((len(bag),), 1 / len(bag)))


def _max(model: MaxMIL, bag: Reader) -> MILOutput:
    highest, winners = _highest(model.tile(block) for block in bag)
    share = torch.bincount(winners, minlength=len(bag)) / len(winners)
    return MILOutput(highest, share)


def _highest(blocks: Iterator[Tensor]) -> tuple[Float[Tensor, " c"], Int[Tensor, " c"]]:
    """Largest value of each column, and its row: the first of equal ones."""
    start, best, place = 0, None, None
    for block in blocks:
        values, rows = block.max(0)
        if best is None:
            best, place = values, rows
        else:
            better = values > best
            best = torch.where(better, values, best)
            place = torch.where(better, rows + start, place)
        start += len(block)
    assert best is not None and place is not None
    return best, place


def _pool_attention(model: ABMIL | CLAM, bag: Reader) -> WeightedSum:
    pool = WeightedSum(len(bag))
    for block in bag:
        h = model.embed(block)
        pool.add(model._scores(h).T, h)
    return pool


def _abmil(model: ABMIL, bag: Reader) -> MILOutput:
    pool = _pool_attention(model, bag)
    return MILOutput(model.head(pool.pooled().flatten()), pool.weights().mean(0))


def _clam(model: CLAM, bag: Reader) -> MILOutput:
    pool = _pool_attention(model, bag)
    logits = model._classify(pool.pooled()[None])[0]
    return MILOutput(logits, pool.weights()[int(logits.argmax()) if model.branches else 0])


def _dsmil(model: DSMIL, bag: Reader) -> MILOutput:
    """First pass: the critical tiles; second: what their queries weigh."""
    embedded = BlockwiseResult(model.embed, bag, len(bag))
    highest, critical = _highest(model.instance(h) for h in embedded)
    asked = model.query(model.embed(bag.rows(critical)))  # (C, 128)
    pool = WeightedSum(len(bag))
    for h in embedded:
        pool.add(asked @ model.query(h).T / asked.shape[1] ** 0.5, model.value(h))
    logits = (highest + model.head(pool.pooled()[None])[0, :, 0]) / 2
    return MILOutput(logits, pool.weights().mean(0))


def _dtfd(model: DTFD, bag: Reader) -> MILOutput:
    """First pass: the pseudo-bags; second, where tiles are ranked by class activation: the
    ranks.
    """
    group = model.split(len(bag)).to(bag.device)
    count = min(model.groups, len(bag))
    pools, start = [WeightedSum(int((group == g).sum())) for g in range(count)], 0
    a = torch.empty(len(bag), device=bag.device)
    embedded = BlockwiseResult(model.embed, bag, len(bag))
    for h in embedded:
        part = slice(start, start + len(h))
        a[part], here = model.attention(h).squeeze(1), group[part]
        for g in here.unique().tolist():
            pools[g].add(a[part][here == g][None], h[here == g])
        start += len(h)
    for g, pool in enumerate(pools):
        a[group == g] = pool.weights()[0]
    pooled = torch.cat([pool.pooled() for pool in pools])
    handed, origin = _hand_over(model, bag, embedded, a, group, pooled)
    b = model.attention2(handed).softmax(0).squeeze(1)
    share = b.new_zeros(count).index_add(0, origin, b)
    return MILOutput(model.head2(b @ handed), a * share[group])


def _hand_over(
    model: DTFD, bag: Reader, embedded: BlockwiseResult, a: Tensor, group: Tensor, pooled: Tensor
) -> tuple[Tensor, Tensor]:
    if model.distil == "afs":
        return pooled, torch.arange(len(pooled), device=bag.device)
    ranks, tier1, start = a, model.head(pooled), 0
    if model.distil != "mas":
        ranks = torch.empty_like(a)
        for h in embedded:
            part = slice(start, start + len(h))
            ranks[part] = model.activation(h, a[part], group[part], tier1)
            start += len(h)
    chosen = model.chosen(ranks, group, len(pooled))
    return model.embed(bag.rows(chosen)), group[chosen]


def _attend(
    layer: CrossAttention, queries: Tensor, keys: Iterable[Tensor], tiles: int
) -> tuple[Tensor, Tensor]:
    """`CrossAttention.forward` over blocks of keys: its output, and the mean over heads of the
    first query's attention.
    """
    mha = layer.attention
    width, heads = mha.embed_dim, mha.num_heads
    w_q, w_k, w_v = mha.in_proj_weight.split(width)
    b_q, b_k, b_v = mha.in_proj_bias.split(width)
    q = layer.fc_q(queries)

    def split(x: Tensor) -> Tensor:
        return x.unflatten(1, (heads, -1)).transpose(0, 1)  # (H, rows, F / H)

    asked = split(q @ w_q.T + b_q) * (width // heads) ** -0.5
    pools = [WeightedSum(tiles) for _ in range(len(queries))]
    for block in keys:
        k, v = split(layer.fc_k(block) @ w_k.T + b_k), split(layer.fc_v(block) @ w_v.T + b_v)
        scores = asked @ k.transpose(1, 2)  # (H, r, n)
        for r, pool in enumerate(pools):
            pool.add(scores[:, r], v)
    seen = mha.out_proj(torch.stack([pool.pooled().flatten() for pool in pools]))
    return layer.finish(queries, q, seen), pools[0].weights().mean(0)


def _ilra(model: ILRA, bag: Reader) -> MILOutput:
    """A pass over the tiles for each layer, and one for the pooling."""
    tiles: Iterable[Tensor] = bag
    for gab in model.blocks:
        low, _ = _attend(gab.project_forward, gab.latent, tiles, len(bag))
        tiles = BlockwiseResult(partial(_hand_back, gab, low), tiles, len(bag))
    out, attention = _attend(model.pooling, model.query, tiles, len(bag))
    return MILOutput(model.head(out[0]), normalise_attention(attention))


def _hand_back(
    gab: GAB, low: Float[Tensor, "r f"], block: Float[Tensor, "n e"]
) -> Float[Tensor, "n f"]:
    return gab.project_backward(block, low)[0]


STREAMED: dict[type[nn.Module], Callable[[Any, Reader], MILOutput]] = {
    MeanMIL: _mean,
    NoTiles: _no_tiles,
    MaxMIL: _max,
    ABMIL: _abmil,
    CLAM: _clam,
    DSMIL: _dsmil,
    DTFD: _dtfd,
    ILRA: _ilra,
}
