"""Encodes all regions of a store with the teacher, shared out over processes.

Blocks of regions are the same whatever the number of processes, so that an embedding has the same
bits for one process and for several.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from patch_encoder.prototypes.region_batches import read_batches
from patch_encoder.prototypes.region_packing import cut_cluster_view, pack_regions
from patch_encoder.regions.store import RegionStore
from wsi_common.device import autocast
from wsi_common.distributed import World, all_reduce_sum

BLOCK = 256  # regions of a forward pass


@dataclass(frozen=True)
class RegionEmbeddings:
    """What the teacher makes of all regions, in the order of the store.

    Attributes:
        features: of the backbone, float32.
        units: of the head's bottleneck, of length 1; 0 for a region without valid tiles.
    """

    features: Float[Tensor, "m w"]
    units: Float[Tensor, "m d"]


@torch.no_grad()
def encode_regions(
    teacher: nn.Module, store: RegionStore, world: World, precision: str, view: str = "full"
) -> RegionEmbeddings:
    """Embed every region without augmentation; all processes call this and get all rows.

    Args:
        teacher: `backbone` and `head`.
        store: where regions come from.
        world: this process.
        precision: of the computation.
        view: what of a region is encoded, as in `cut_cluster_view`.
    """
    blocks = np.array_split(np.arange(total := int(store.counts.sum())), range(BLOCK, total, BLOCK))
    own = blocks[world.rank :: world.size]
    table = torch.zeros(0, device=world.device)
    was_training = teacher.training
    teacher.eval()
    for batch in read_batches(store, own, world.device):
        packed = cut_cluster_view(pack_regions(batch.features, batch.valid), view)
        with autocast(world.device, precision):
            features = teacher.backbone(packed)
            units = teacher.head.embed(features)
        seen = packed[:, -1].flatten(1).any(dim=1, keepdim=True)
        rows = torch.cat([features.float(), units.float() * seen], dim=1)
        if not len(table):
            table = torch.zeros(total, rows.shape[1], device=world.device)
        table[torch.from_numpy(batch.ids).to(world.device)] = rows
    teacher.train(was_training)
    width = int(teacher.backbone.num_features)
    if not len(table):  # fewer blocks than processes
        bottleneck = teacher.head.last_layer.weight_v.shape[1]
        table = torch.zeros(total, width + bottleneck, device=world.device)
    table = all_reduce_sum(table)  # every row is 0 but on one process
    return RegionEmbeddings(*table.split([width, table.shape[1] - width], dim=1))
