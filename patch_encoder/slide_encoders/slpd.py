"""Our own slide encoder: the mean of a slide's regions, encoded by a network of pretrain_slpd.

The tiles of a bag are cut into regions as build_regions does with its defaults, and every region is
encoded as extract_regions does: the vector is the one of `extract_regions pool=mean`, without a
folder of regions in between.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from patch_encoder.prototypes.region_batches import read_batches
from patch_encoder.prototypes.region_encoder import RegionEncoderDescription, open_region_encoder
from patch_encoder.prototypes.region_packing import pack_regions
from patch_encoder.prototypes.region_vit import RegionViT
from patch_encoder.regions.files import gather_tiles
from patch_encoder.regions.grid import lay_regions
from patch_encoder.regions.store import make_ram_store
from patch_encoder.slide_encoders.places import PlacedTiles
from wsi_common.errors import UserError

MIN_FILL = 0.1  # smallest share of a region's cells that hold a tile, as in build_regions
BATCH = 64  # regions
HIPT_TILES = 16  # side of HIPT's regions; its weights do not say it


class RegionMean(nn.Module):
    """Regions of tiles to one vector.

    Args:
        network: a region encoder (B, D + 1, G, G) -> (B, W).
        trained: how it was trained; None: HIPT's file, which does not say it.
    """

    def __init__(self, network: RegionViT, trained: RegionEncoderDescription | None) -> None:
        super().__init__()
        self.network = network
        self.region_tiles = trained.region_tiles if trained else HIPT_TILES
        self.standardise = trained.standardise if trained else "none"
        self.tile_encoder = trained.encoder if trained else ""

    @property
    def in_dim(self) -> int:
        """Width of the tile features, D."""
        return self.network.phi[0].in_features

    def forward(self, features: Float[Tensor, "n d"], places: PlacedTiles) -> Float[Tensor, " w"]:
        """The slide's vector.

        Raises:
            UserError: no region has enough tiles.
        """
        corners = places.corners.numpy()
        regions = lay_regions(corners, places.grid, self.region_tiles, min_fill=MIN_FILL)
        if not len(regions.rows):
            raise UserError(
                f"slpd: expected a region of {self.region_tiles} x {self.region_tiles} tiles with "
                f"{MIN_FILL:.0%} of them there, found none among {len(corners)} tiles"
            )
        tiles = gather_tiles(features.cpu().half(), regions.rows)
        valid = torch.from_numpy(regions.rows >= 0)
        cells = tiles.view(*valid.shape, -1)
        count = len(valid)
        store = make_ram_store(cells, valid, ["slide"], [count], standardise=self.standardise)
        batches = np.split(np.arange(count), range(BATCH, count, BATCH))
        rows = [
            self.network(pack_regions(batch.features, batch.valid)).float()
            for batch in read_batches(store, batches, features.device)
        ]
        return torch.cat(rows).mean(0)


def load_slpd(weights: str) -> tuple[RegionMean, Path]:
    """The encoder of a run of pretrain_slpd (or HIPT's vit4k_xs file), and its weights file.

    Raises:
        UserError: no weights are given, or others are there.
    """
    if not weights:
        raise UserError(
            "weights: slide encoder slpd expected the run directory of pretrain_slpd, found none"
        )
    network, trained, file = open_region_encoder(weights)
    return RegionMean(network, trained), file
