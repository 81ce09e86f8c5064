"""A trained region encoder on disk: the weights, and beside them what they do not say."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from patch_encoder.models.encoder_table import EncoderRow
from patch_encoder.models.encoder_weights import PREFIXES, load_encoder_weights, read_state
from patch_encoder.prototypes.region_vit import RegionViT
from wsi_common.checkpoint import load_weights
from wsi_common.errors import DamagedFile, UserError
from wsi_common.files import read_json, write_json
from wsi_common.shared_weights import find_weights

DESCRIPTION, WEIGHTS = "region_encoder.json", "backbone.pt"
HEAD_CHANNELS = 32  # of HIPT's vit4k_xs
LAYOUT = {"cls_token", "pos_embed", "phi.0.weight", "blocks.0.attn.qkv.weight"}


@dataclass(frozen=True)
class RegionEncoderDescription:
    """What has to be known of a region encoder to build it and to give it the right regions.

    Attributes:
        in_dim: width of the tile features, D.
        region_tiles: side of a region in tiles, G.
        width: of a region's vector, W.
        depth, heads: of the transformer.
        grid: side in tiles that its positions were learned for.
        standardise: how the store standardised features, `none` or `slide`.
        encoder: name of the tile encoder, for messages; empty where the regions do not say.
    """

    in_dim: int
    region_tiles: int
    width: int
    depth: int
    heads: int
    grid: int
    standardise: str
    encoder: str = ""

    def build(self, drop_path: float = 0.0) -> RegionViT:
        """The network with random weights."""
        sizes = (self.in_dim, self.width, self.depth, self.heads, self.grid)
        return RegionViT(*sizes, drop_path=drop_path)


def write_region_encoder(folder: Path, description: RegionEncoderDescription) -> None:
    """Write the description beside the weights."""
    write_json(folder / DESCRIPTION, asdict(description))


def build_region_encoder(run: str | Path) -> tuple[RegionViT, RegionEncoderDescription]:
    """The region encoder of a run of `pretrain_slpd`, ready to embed.

    Args:
        run: its directory, or one of the backbone files in it.

    Returns:
        The network (B, D + 1, G, G) -> (B, W) in eval mode on the CPU, and its description.

    Raises:
        UserError: no such file, or one that holds something else.
    """
    path = Path(run)
    file = find_region_weights(path)
    described = file.parent / DESCRIPTION
    if path.is_dir() and not described.is_file():
        raise UserError(
            f"weights={path}: expected a run directory of pretrain_slpd with {DESCRIPTION}, found "
            "none; HIPT's weights are given as their file"
        )
    content = read_json(described, "the description of a region encoder")
    known = {field.name for field in fields(RegionEncoderDescription)}
    if not isinstance(content, dict) or not known >= content.keys() >= known - {"encoder"}:
        raise DamagedFile(
            f"{described}: expected the description of a region encoder ({', '.join(sorted(known))}"
            f"), found {sorted(content) if isinstance(content, dict) else content!r}"
        )
    description = RegionEncoderDescription(**content)
    network = description.build()
    load_weights(network, read_state(file), str(file))
    return network.eval().requires_grad_(False), description


def find_region_weights(path: Path) -> Path:
    """The weights file that a path to a region encoder means."""
    backbone = path / WEIGHTS
    return backbone if backbone.is_file() else find_weights(path)


def open_region_encoder(weights: str) -> tuple[RegionViT, RegionEncoderDescription | None, Path]:
    """A region encoder in eval mode on the CPU, how it was trained, and its weights file.

    Args:
        weights: as `build_region_encoder`, or a file in the layout of HIPT's vit4k_xs, which does
            not say how it was trained: the description is None.

    Raises:
        UserError: no region encoder there.
    """
    path = Path(weights)
    file = find_region_weights(path)
    if path.is_dir() or (file.parent / DESCRIPTION).is_file():
        return *build_region_encoder(path), file
    return read_hipt(file), None, file


def read_hipt(file: Path) -> RegionViT:
    """The network of a file in the layout of HIPT's vit4k_xs, whose sizes are read off its shapes.

    Raises:
        UserError: another layout.
    """
    state = read_state(file)
    for prefix in PREFIXES:
        shapes = {
            name.removeprefix(prefix): tuple(value.shape)
            for name, value in state.items()
            if name.startswith(prefix)
        }
        if shapes.keys() >= LAYOUT:
            width, in_dim = shapes["phi.0.weight"]
            depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
            grid = math.isqrt(shapes["pos_embed"][1] - 1)
            network = RegionViT(in_dim, width, depth, width // HEAD_CHANNELS, grid)
            load_encoder_weights(network, EncoderRow("timm", "", "", 0), state, str(file))
            return network.eval().requires_grad_(False)
    raise UserError(
        f"weights={file}: expected a run directory of pretrain_slpd, a backbone file beside its "
        f"{DESCRIPTION}, or HIPT's vit4k_xs (with keys {', '.join(sorted(LAYOUT))}), found "
        f"{list(state)[:3]}"
    )
