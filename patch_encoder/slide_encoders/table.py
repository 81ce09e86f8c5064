"""The slide encoders by name: which tile features they read, width, licence, weights. One row each.

Tile encoder, tile size and resolution are those of TRIDENT's table
(mahmoodlab/TRIDENT, `slide_to_patch_encoder_name`) and of the authors' own pages; the licence is
the one that the authors state beside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from patch_encoder.models.encoder_table import NC_ND, EncoderRow


@dataclass(frozen=True)
class SlideEncoderRow:
    """What has to be known of one slide encoder to fetch it and to give it the right bags.

    Attributes:
        tile_encoders: names of the tile encoders whose features it was trained on; empty: any, or
            what the weights say.
        in_dim: width D of these features; None: any, or what the weights say.
        width: of the slide's vector; None: it follows from D or from the weights.
        tile, mpp: side in px and resolution in um per px of the tiles it was trained on; None: any.
        needs_coords: it uses the places of the tiles.
        remote_code: its authors publish the network as Python code beside the weights, which has to
            run here (`trust_remote_code`).
        weights: where its hub keeps the weights; empty where no hub does.
        file: name of the weights file there.
        precision: what its authors run it in on a GPU; a CPU computes in fp32.
        licence: of the weights; empty: it has none, or they are the user's own.
        gated: access has to be asked for at the hub.
        citation: where it was published.
    """

    tile_encoders: tuple[str, ...] = ()
    in_dim: int | None = None
    width: int | None = None
    tile: int | None = None
    mpp: float | None = None
    needs_coords: bool = False
    remote_code: bool = False
    weights: str = ""
    file: str = ""
    precision: str = "fp32"
    licence: str = ""
    gated: bool = False
    citation: str = ""

    @property
    def hub_row(self) -> EncoderRow:
        """The same as the functions take it that fetch weights of tile encoders."""
        width = self.width or 0
        return EncoderRow(
            "slide", "", self.weights, width, licence=self.licence, gated=self.gated, file=self.file
        )


def _feather(tile_encoder: str, hub_name: str, in_dim: int, tile: int) -> SlideEncoderRow:
    return SlideEncoderRow(
        (tile_encoder,), in_dim, 512, tile, 0.5,
        weights=f"MahmoodLab/abmil.base.{hub_name}.pc108-24k", file="model.safetensors",
        licence=NC_ND, gated=True, citation="Shao et al., ICML 2025",
    )  # fmt: skip


# need no weights; their width is that of the tile features, twice for mean_std
POOLS = ("mean", "max", "mean_std")
SLIDE_ENCODERS: dict[str, SlideEncoderRow] = {
    **dict.fromkeys(POOLS, SlideEncoderRow()),
    # our own: the mean of the regions' vectors; everything else stands in the run's description
    "slpd": SlideEncoderRow(needs_coords=True, citation="Yu et al., MICCAI 2023"),
    "titan": SlideEncoderRow(
        ("conch_v1_5",), 768, 768, 512, 0.5, needs_coords=True, remote_code=True,
        weights="MahmoodLab/TITAN", precision="fp16", licence=NC_ND, gated=True,
        citation="Ding et al., Nature Medicine 2025",
    ),
    "prism": SlideEncoderRow(
        ("virchow",), 2560, 1280, 224, 0.5, remote_code=True, weights="paige-ai/Prism",
        precision="fp16", licence=NC_ND, gated=True,
        citation="Shaikovski et al., arXiv 2405.10254",
    ),
    "gigapath": SlideEncoderRow(
        ("gigapath",), 1536, 768, 256, 0.5, needs_coords=True,
        weights="prov-gigapath/prov-gigapath", file="slide_encoder.pth", precision="fp16",
        licence="Apache-2.0, research use", gated=True, citation="Xu et al., Nature 2024",
    ),
    # weights on request from the authors (github.com/hms-dbmi/CHIEF), on no hub
    "chief": SlideEncoderRow(
        ("ctranspath",), 768, 768, 256, 1.0, file="CHIEF_pretraining.pth",
        licence="GPL-3.0, non-commercial", citation="Wang et al., Nature 2024",
    ),
    "madeleine": SlideEncoderRow(
        ("conch",), 512, 512, 256, 1.0, weights="MahmoodLab/madeleine", file="model.pt",
        licence=NC_ND, gated=True, citation="Jaume et al., ECCV 2024",
    ),
    "feather": _feather("conch_v1_5", "conch_v15", 768, 512),
    "feather_uni": _feather("uni", "uni", 1024, 256),
    "feather_uni2_h": _feather("uni2_h", "uni_v2", 1536, 256),
}  # fmt: skip
