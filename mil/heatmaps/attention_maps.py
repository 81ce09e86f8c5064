"""Every attention map of a model over a bag, by class or by head, and its scores before the
softmax.

`MILOutput.attention` is one map per slide, a mean over heads or the map of the called class. Here
are the maps that it comes from. What a map means, and which models have scores before a softmax:

| models | maps | scores |
|---|---|---|
| abmil, gated_abmil, multihead_abmil, mhim_abmil | one per head | yes |
| clam_sb, clam_mb | one; one per class | yes |
| dsmil, mhim_dsmil | one per class: likeness to the class's critical tile | yes |
| dtfd | one per pseudo-bag (0 outside of it), tier 1 | yes, of all tiles |
| ilra, deform_mil | one per head of the slide's query | yes |
| rrt, hipt | one, of the pooling | yes |
| transmil, mhim_transmil | one per head of the class token in the last layer | no: Nystrom |

Mean-MIL, Max-MIL and the mi-Nets weigh tiles by a fixed rule and have none. Bags are read whole.
Of slides that a model sees as one bag, each gets its part of the maps of all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mil.datasets.case_bags import CaseSlide, open_in_case
from mil.models.abmil import ABMIL
from mil.models.clam import CLAM
from mil.models.deform_mil import DeformMIL
from mil.models.dsmil import DSMIL, QUERY
from mil.models.dtfd import DTFD
from mil.models.hipt import HIPT
from mil.models.ilra import ILRA
from mil.models.layers import find_standardised, inner_model
from mil.models.mhim import MHIM
from mil.models.rrt import RRT
from mil.models.transmil import TransMIL
from patch_encoder.bags.bag import Bag, slide_grid
from patch_encoder.cohort.failures import Failures
from patch_encoder.tiles.slide_grid import SlideGrid
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes, sha256_file
from wsi_common.hdf5 import open_hdf5, write_small_hdf5
from wsi_common.progress import progress
from wsi_common.provenance import can_reuse

digest_weights = lru_cache(maxsize=64)(sha256_file)  # many slides share a model's file
HEAD, CLASS, POOLING, GROUP = "head", "class", "pooling", "pseudo-bag"


class AttentionMaps(NamedTuple):
    """K maps over the N tiles of a bag.

    Attributes:
        kind: what a map is of: `head`, `class`, `pooling` (there is one) or `pseudo-bag`.
        weights: (K, N); each sums to 1, but for TransMIL's, which are approximate.
        scores: (K, N) before the softmax; None where there is none.
    """

    kind: str
    weights: Float[Tensor, "k n"]
    scores: Float[Tensor, "k n"] | None

    def of_rows(self, rows: slice) -> AttentionMaps:
        """The part of some tiles."""
        scores = None if self.scores is None else self.scores[:, rows]
        return AttentionMaps(self.kind, self.weights[:, rows], scores)


class MapJob(NamedTuple):
    """A slide whose maps are wanted, of the models of these checkpoints.

    `case` has the slides that the models see as one bag, in their order; empty: this one alone.
    """

    slide: CaseSlide
    checkpoints: Sequence[Path]
    case: Sequence[CaseSlide] = ()


class Tiles(NamedTuple):
    """A bag as a model gets it: features, standardised where it wants that, and their places."""

    features: Float[Tensor, "n d"]
    coords: Int[Tensor, "n 2"] | None
    grid: SlideGrid | None


@torch.inference_mode()
def find_attention_maps(model: nn.Module, bag: Bag) -> AttentionMaps:
    """All attention maps of a model over a bag, on the CPU.

    Args:
        model: in evaluation mode, on any device.
        bag: in memory or on disk, read whole.

    Raises:
        UserError: the model has none, or needs coordinates that the bag does not have.
    """
    assert not model.training
    check_maps(model)
    inner, standardised = inner_model(model), find_standardised(model)
    inner = inner.student if isinstance(inner, MHIM) else inner
    device = next(model.parameters()).device
    features = bag.read().to(device).float()
    features = features if standardised is None else standardised.standardised(features)
    places = None if bag.coords is None else bag.coords.to(device)
    grid = slide_grid(bag) if isinstance(inner, DeformMIL) else None
    found = MAPS[type(inner)](inner, Tiles(features, places, grid))
    scores = None if found.scores is None else found.scores.float().cpu()
    return found._replace(weights=found.weights.float().cpu(), scores=scores)


def check_maps(model: nn.Module) -> None:
    """Refuse a model that has no attention maps."""
    inner = inner_model(model)
    inner = inner.student if isinstance(inner, MHIM) else inner
    if type(inner) not in MAPS:
        raise UserError(
            f"{type(inner).__name__}: expected a model with attention maps to write, found one "
            "that weighs tiles by a fixed rule; models with maps: "
            f"{', '.join(kind.__name__ for kind in MAPS)}"
        )


def name_maps(found: AttentionMaps, names: Sequence[str]) -> list[str]:
    """A name for each map: of its class where there is one map a class, else its number."""
    if found.kind == CLASS and len(names) == len(found.weights):
        return list(names)
    return [f"{found.kind}{number}" for number in range(len(found.weights))]


def _softmax_maps(kind: str, scores: Float[Tensor, "k n"]) -> AttentionMaps:
    return AttentionMaps(kind, scores.softmax(1), scores)


def _abmil(model: ABMIL, tiles: Tiles) -> AttentionMaps:
    return _softmax_maps(HEAD, model._scores(model.embed(tiles.features)).T)


def _clam(model: CLAM, tiles: Tiles) -> AttentionMaps:
    scores = model._scores(model.embed(tiles.features)).T
    return _softmax_maps(CLASS if model.branches else POOLING, scores)


def _dsmil(model: DSMIL, tiles: Tiles) -> AttentionMaps:
    h = model.embed(tiles.features)
    queries = model.query(h)
    critical = queries[model.instance(h).argmax(0)]
    return _softmax_maps(CLASS, critical @ queries.T / QUERY**0.5)


def _dtfd(model: DTFD, tiles: Tiles) -> AttentionMaps:
    scores = model.attention(model.embed(tiles.features)).squeeze(1)
    group = model.split(len(scores)).to(scores.device)
    own = torch.arange(int(group.max()) + 1, device=scores.device)[:, None] == group
    weights = scores.masked_fill(~own, -torch.inf).softmax(1)
    return AttentionMaps(GROUP, weights, scores.expand(len(own), -1))


def _ilra(model: ILRA, tiles: Tiles) -> AttentionMaps:
    x = tiles.features
    for block in model.blocks:
        x = block(x)
    layer = model.pooling
    mha = layer.attention
    width, heads = mha.embed_dim, mha.num_heads
    (w_q, w_k, _), (b_q, b_k, _) = mha.in_proj_weight.split(width), mha.in_proj_bias.split(width)
    q = (layer.fc_q(model.query) @ w_q.T + b_q).view(heads, -1)  # (H, F / H) of the one query
    k = (layer.fc_k(x) @ w_k.T + b_k).unflatten(1, (heads, -1))  # (N, H, F / H)
    return _softmax_maps(HEAD, torch.einsum("hd,nhd->hn", q, k) / q.shape[1] ** 0.5)


def _rrt(model: RRT, tiles: Tiles) -> AttentionMaps:
    embedded = model.pooling.embed(tiles.features)
    x = model.cross(model.region(embedded))
    x = model.norm(x + embedded if model.shortcut else x)
    return _softmax_maps(POOLING, model.pooling._scores(x).T)


def _hipt(model: HIPT, tiles: Tiles) -> AttentionMaps:
    h = model.layers(model.embed(tiles.features))
    return _softmax_maps(POOLING, model.score(model.attend(h) * model.gate(h)).T)


def _transmil(model: TransMIL, tiles: Tiles) -> AttentionMaps:
    return AttentionMaps(HEAD, model.pool(model.embed(tiles.features), layer=1).scores, None)


def _deform_mil(model: DeformMIL, tiles: Tiles) -> AttentionMaps:
    """The class query's scores, caught where its decoder makes them."""
    kept: list[Any] = []
    handle = model.decoder.register_forward_hook(lambda _, args, out: kept.append(args))
    try:
        model(tiles.features, tiles.coords, grid=tiles.grid)
    finally:
        handle.remove()
    x, position, _ = kept[0]
    return _softmax_maps(HEAD, model.decoder.scores(x, position).T)


MAPS: dict[type[nn.Module], Callable[[Any, Tiles], AttentionMaps]] = {
    ABMIL: _abmil,
    CLAM: _clam,
    DSMIL: _dsmil,
    DTFD: _dtfd,
    ILRA: _ilra,
    RRT: _rrt,
    HIPT: _hipt,
    TransMIL: _transmil,
    DeformMIL: _deform_mil,
}


def write_attention_maps(
    path: Path,
    found: Mapping[str, AttentionMaps],
    names: Sequence[str],
    bag: Bag,
    made_from: str,
) -> None:
    """Write the maps of a slide, a group per model (docs/reference/files.md describes the file).

    Args:
        path: `attention/<slide_id>.h5`.
        found: name of the model -> its maps.
        names: the task's classes or labels.
        bag: whose tiles they are of, in its order.
        made_from: digest of what decides the maps.
    """
    with write_small_hdf5(path) as file:
        file.attrs["made_from"] = made_from
        if bag.coords is not None:
            file.create_dataset("coords", data=bag.coords.numpy())
        for model, maps in found.items():
            group = file.create_group(model)
            group.attrs["kind"] = maps.kind
            group.attrs["names"] = name_maps(maps, names)
            group.create_dataset("weights", data=maps.weights.numpy())
            if maps.scores is not None:
                group.create_dataset("scores", data=maps.scores.numpy())


def write_all_maps(
    folder: Path,
    jobs: Sequence[MapJob],
    load: Callable[[Path], nn.Module],
    names: Sequence[str],
    failures: Failures,
    *,
    overwrite: bool,
) -> None:
    """Write the maps of slides, those that are there excepted.

    Args:
        folder: of the files.
        jobs: the slides.
        load: makes the model of a checkpoint.
        names: the task's classes or labels.
        failures: gets the slides whose maps cannot be made.
        overwrite: write those again that are of other models or bags.
    """
    for slide, checkpoints, case in progress(jobs, "attention", len(jobs), "slides"):
        path = folder / f"{slide.slide_id}.h5"
        try:
            seen = open_in_case(slide, case)
            digests = [bag.digest() for bag in seen.parts.values()]
            digests += [digest_weights(file) for file in checkpoints]
            if case:  # the same bags make other maps of each slide
                digests.insert(0, slide.slide_id)
            made_from = sha256_bytes(*(text.encode() for text in digests))
            if can_reuse_maps(path, made_from, overwrite=overwrite):
                continue
            each = {file.parent.name: load(file) for file in checkpoints}
            found = {
                name: find_attention_maps(model, seen.whole).of_rows(seen.rows)
                for name, model in each.items()
            }
            write_attention_maps(path, found, names, seen.own, made_from)
        except (UserError, OSError) as error:
            failures.add(slide.slide_id, str(error))


def can_reuse_maps(path: Path, made_from: str, *, overwrite: bool) -> bool:
    """Whether a slide's maps are there.

    Raises:
        UserError: they are of other models or of another bag.
    """

    def read() -> dict[str, str]:
        with open_hdf5(path, "attention maps") as file:
            return {"made_from": str(file.attrs.get("made_from", ""))}

    wanted = {"made_from": made_from}
    return can_reuse(path, read, wanted, "maps of other models or bags", overwrite=overwrite)
