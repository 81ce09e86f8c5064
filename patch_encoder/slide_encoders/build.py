"""One small interface over every slide encoder: a module (features, places) -> vector, what
bags it takes, and its provenance.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from patch_encoder.models.encoders import digest_weights
from patch_encoder.slide_encoders.chief import load_chief
from patch_encoder.slide_encoders.feather import PREFIX, load_feather
from patch_encoder.slide_encoders.gigapath import load_gigapath
from patch_encoder.slide_encoders.madeleine import load_madeleine
from patch_encoder.slide_encoders.pools import TilePool
from patch_encoder.slide_encoders.published_file import find_weights, read_published
from patch_encoder.slide_encoders.remote_code import load_remote
from patch_encoder.slide_encoders.slpd import load_slpd
from patch_encoder.slide_encoders.table import POOLS, SLIDE_ENCODERS, SlideEncoderRow
from wsi_common.errors import UserError, did_you_mean


@dataclass(frozen=True)
class SlideEncoder:
    """What the loop over bags needs of a slide encoder.

    Attributes:
        name: of its row.
        row: what it was trained on.
        module: (features (N, D), their places or None) -> (W,).
        tile_encoders: names of the tile encoders whose bags it takes; empty: any.
        in_dim: width of these bags; None: any.
        provenance: name, digest of the weights, pool: what decides the numbers.
    """

    name: str
    row: SlideEncoderRow
    module: nn.Module
    tile_encoders: tuple[str, ...]
    in_dim: int | None
    provenance: dict[str, str]


def build_slide_encoder(
    name: str,
    weights: str = "",
    pool: str = "published",
    organ: str = "",
    trust_remote_code: bool = False,
) -> SlideEncoder:
    """A slide encoder by name.

    Args:
        name: a row of `table.SLIDE_ENCODERS`.
        weights: local file or folder; empty: from the encoder's hub.
        pool: `mean` for the mean of GigaPath's tiles in place of its class token.
        organ: CHIEF's anatomy-aware vector of this organ.
        trust_remote_code: the authors' Python code may run (TITAN, PRISM).

    Raises:
        UserError: unknown name, an option that the encoder does not have, weights that are missing
            or of another layout.
    """
    if name not in SLIDE_ENCODERS:
        raise UserError(f"slide_encoder={name}: {did_you_mean(name, SLIDE_ENCODERS)}")
    row = SLIDE_ENCODERS[name]
    _refuse_options(name, {"pool": pool != "published", "organ": bool(organ)})
    takes, in_dim = row.tile_encoders, row.in_dim
    extra: dict[str, str] = {}
    if name in POOLS:
        if weights:
            raise UserError(f"weights={weights}: slide encoder {name} has none; leave it out")
        module: nn.Module = TilePool(name)
    elif name == "slpd":
        module, _ = load_slpd(weights)
        takes, in_dim = tuple(filter(None, [module.tile_encoder])), module.in_dim
        extra["regions"] = f"{module.region_tiles} tiles, standardise {module.standardise}"
    elif row.remote_code:
        module, extra["code_sha256"] = load_remote(name, row, weights, trust_remote_code)
    else:
        path = find_weights(name, row, weights)
        module = _load(name, path, pool, organ)
    module = module.eval().requires_grad_(False)
    extra |= {"pool": pool} if pool != "published" else {}
    extra |= {"organ": organ} if organ else {}
    digest = "none" if name in POOLS else digest_weights(module)
    provenance = {
        "encoder": name,
        "weights_sha256": digest,
        "licence": row.licence or "none",
    } | extra
    return SlideEncoder(name, row, module, takes, in_dim, provenance)


def _load(name: str, path: Path, pool: str, organ: str) -> nn.Module:
    source = str(path)
    loaders: dict[str, Callable[[], nn.Module]] = {
        "chief": lambda: load_chief(read_published(path), source, organ),
        "madeleine": lambda: load_madeleine(read_published(path), source),
        "gigapath": lambda: load_gigapath(read_published(path), source, pool),
    }
    if name in loaders:
        return loaders[name]()
    return load_feather(read_published(path, PREFIX), source)


# who has the option
OPTIONS = {"pool": ("gigapath",), "organ": ("chief",)}


def _refuse_options(name: str, given: dict[str, bool]) -> None:
    for option, there in given.items():
        if there and name not in OPTIONS[option]:
            raise UserError(
                f"{option}: expected only with slide_encoder={' or '.join(OPTIONS[option])}, found "
                f"it with {name}; leave it out"
            )
