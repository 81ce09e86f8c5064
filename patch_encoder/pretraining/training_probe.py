"""A probe of the teacher while it trains: k-NN on a small set of labelled pictures.

It watches the run and may choose the epoch that is kept. What is measured on the same pictures
afterwards is then chosen on them: report results of other ones.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from patch_encoder.models.encoder_table import Statistics
from patch_encoder.models.encoders import Encoder, PixelEncoder
from patch_encoder.models.transforms import ToInputSize
from patch_encoder.probing.knn import probe_features, require_folds
from patch_encoder.probing.pictures import encode_pictures, read_picture
from patch_encoder.probing.tile_sets import TileSet, read_picture_set
from wsi_common.config import key

SCORE = "knn_balanced_accuracy"


@dataclass
class TrainingProbeKeys:
    """Labelled pictures that the teacher is probed on."""

    tile_set: str = key(
        "",
        "labelled tiles; a folder with one sub-folder of pictures per class, or a CSV "
        "(image,label[,group]); empty: no probe",
        path=True,
    )
    where: str = key(
        "", "regular expression; only tiles with a match in their name are taken; empty: all"
    )
    every: int = key(1, "epochs between probes; the last one is always probed", least=1)
    keep_best: bool = key(
        True, "keep the backbone of the best epoch, too, as backbone_best.pt", runtime=True
    )


@dataclass
class TrainingProbe:
    """The probe of one run.

    Attributes:
        tiles: labelled pictures.
        side: what they are resized to, px: the side of the global views.
        statistics: of the network's input.
        device, precision: resolved.
    """

    tiles: TileSet
    side: int
    statistics: Statistics
    device: torch.device
    precision: str

    def score(self, backbone: nn.Module) -> dict[str, float]:
        """Mean AUC, average precision and balanced accuracy of the folds of `probe_features`."""
        network = PixelEncoder(copy.deepcopy(backbone).eval(), self.statistics)
        transform = ToInputSize(self.side)
        width = int(backbone.num_features)  # type: ignore[arg-type]
        encoder = Encoder("teacher", width, transform, network, {})
        features = encode_pictures(self.tiles.pictures, encoder, self.device, self.precision)
        return probe_features(features, self.tiles.targets, self.tiles.groups, balanced=True)


def make_training_probe(
    keys: TrainingProbeKeys,
    side: int,
    statistics: Statistics,
    device: torch.device,
    precision: str,
) -> TrainingProbe | None:
    """The probe that the keys ask for; None where they name no pictures.

    Raises:
        UserError: a set that cannot be read or divided into folds, or one of places on slides.
    """
    if not keys.tile_set:
        return None
    tiles = read_picture_set(keys.tile_set, keys.where)
    require_folds(tiles.targets, tiles.groups)
    for path in tiles.pictures:  # one that is broken would end the run after its first epoch
        read_picture(path)
    return TrainingProbe(tiles, side, statistics, device, precision)
