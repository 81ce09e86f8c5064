"""The configuration keys of SLPD's region network, its prototypes and their losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from patch_encoder.models.encoder_table import EncoderRow
from patch_encoder.models.encoder_weights import find_local_file, load_encoder_weights, read_state
from patch_encoder.prototypes.neighbours import PARTNERS
from patch_encoder.prototypes.region_encoder import RegionEncoderDescription
from patch_encoder.prototypes.region_packing import CLUSTER_VIEWS
from patch_encoder.selfdistill.backbone import RANDOM
from patch_encoder.selfdistill.head import DINOHead
from patch_encoder.selfdistill.student import SelfDistilled
from wsi_common.config import key
from wsi_common.errors import UserError

CENTRES = ("none", "slide")


@dataclass
class RegionNetworkKeys:
    """The student, HIPT's region transformer by default; its teacher has the same architecture."""

    width: int = key(192, "width of the network and of a region's vector, W", least=1)
    depth: int = key(6, "blocks", least=1)
    heads: int = key(6, "heads of attention; they share the width", least=1)
    drop_path: float = key(0.1, "stochastic depth of the student, at its last block", least=0)
    init: str = key(
        RANDOM,
        "weights that the network starts from; random, or a file: HIPT's vit4k_xs#teacher, a "
        "run's backbone.pt",
    )
    out_dim: int = key(65536, "prototypes of the head; those of DINO, not of slides", least=2)
    hidden_dim: int = key(2048, "width of the head's hidden layers", least=1)
    bottleneck_dim: int = key(
        256, "width of the head's bottleneck, where regions are clustered", least=1
    )
    norm_last_layer: bool = key(True, "prototypes of the head stay of length 1")

    def build(self, description: RegionEncoderDescription) -> SelfDistilled:
        """The student."""
        backbone = description.build(self.drop_path)
        if self.init != RANDOM:
            path, _, choice = self.init.partition("#")
            row = EncoderRow("timm", "", "", 0)
            file = find_local_file(Path(path), row)
            load_encoder_weights(backbone, row, read_state(file, choice), str(file))
        sizes = (self.out_dim, self.hidden_dim, self.bottleneck_dim)
        head = DINOHead(self.width, *sizes, norm_last_layer=self.norm_last_layer)
        return SelfDistilled(backbone, head)


@dataclass
class PrototypeKeys:
    """How slides become sets of prototypes, and which slides are neighbours."""

    start_epoch: int = key(21, "epochs of plain DINO before the first clustering", least=0)
    every: int = key(1, "epochs between two clusterings", least=1)
    clusters: int = key(4, "prototypes of a slide, K", least=1)
    min_regions: int = key(
        32, "slides with fewer regions are ignored; they stay in the DINO loss", least=1
    )
    restarts: int = key(5, "starts of K-means, of which the best is taken", least=1)
    iterations: int = key(20, "steps of K-means", least=1)
    neighbours: int = key(1, "similar slides whose prototypes are predicted, r", least=1)
    target: str = key(
        "matched",
        "prototype of a neighbour that is predicted; matched: one to one, as in the paper; "
        "greedy: the most similar one, as in the published code, so that several may share one",
        choices=PARTNERS,
    )
    cluster_view: str = key(
        "full",
        "what of a region is clustered; center14: the centre, 14 of 16 tiles wide, as in the "
        "published code",
        choices=CLUSTER_VIEWS,
    )
    centre: str = key(
        "none",
        "slide: the mean of a slide's embeddings is taken off before they are clustered and "
        "compared, so that a common offset such as the stain does not make slides neighbours",
        choices=CENTRES,
    )

    def is_due(self, epoch: int) -> bool:
        """Whether regions are clustered before an epoch, counted from 0."""
        return epoch >= self.start_epoch and (epoch - self.start_epoch) % self.every == 0

    def check(self, counts: Sequence[int] | np.ndarray, cases: Sequence[str]) -> None:
        """Refuse settings that leave no slide, or no pair of slides, to learn from.

        Args:
            counts: regions of each slide.
            cases: patient of each slide.
        """
        if self.min_regions < self.clusters:
            raise UserError(
                f"prototypes.min_regions={self.min_regions}: expected at least "
                f"prototypes.clusters={self.clusters}, since a cluster needs a region; raise it"
            )
        kept = {
            case for case, count in zip(cases, counts, strict=True) if count >= self.min_regions
        }
        if len(kept) < 2:
            raise UserError(
                f"prototypes.min_regions={self.min_regions}: expected slides of two patients with "
                f"so many regions, found {len(kept)}; the largest of {len(counts)} slides has "
                f"{max(counts, default=0)}; lower it, or train plain DINO with losses.intra=0 "
                "losses.inter=0"
            )


@dataclass
class PrototypeLossKeys:
    """The two losses of prototypes; both 0 is plain DINO."""

    intra: float = key(1.0, "weight of predicting the own slide's prototype; 0: off", least=0)
    inter: float = key(1.0, "weight of predicting neighbours' prototypes; 0: off", least=0)
    ramp: float = key(
        0.0, "epochs from the first clustering in which both weights grow from 0", least=0
    )
    skip_first_view: bool = key(
        False,
        "leave the first global view out of both losses, as the published code does by applying a "
        "rule of DINO to prototypes",
    )

    @property
    def on(self) -> bool:
        """Whether prototypes are used at all."""
        return self.intra > 0 or self.inter > 0
