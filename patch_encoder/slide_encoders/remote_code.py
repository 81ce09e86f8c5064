"""TITAN and PRISM: their authors publish the network as Python code beside the weights.

Such code runs with all rights of the user. It is therefore never loaded unasked: the key
`trust_remote_code` has to be set, every file of code is named with its digest before it runs, and
its digest becomes part of the provenance. The repository is a local folder, or is fetched whole
first, so that what was named is what runs.

Sources: model cards of MahmoodLab/TITAN (Ding et al., Nature Medicine 2025;
`encode_slide_from_patch_features`) and paige-ai/Prism (Shaikovski et al., arXiv 2405.10254;
`slide_representations`).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from patch_encoder.models.encoder_weights import NETWORK_ERRORS, explain_unreachable
from patch_encoder.slide_encoders.places import PlacedTiles
from patch_encoder.slide_encoders.table import SlideEncoderRow
from wsi_common.errors import UserError
from wsi_common.files import sha256_bytes

logger = logging.getLogger(__name__)
SHORT = 12  # digits of a digest in a message
# what somebody else's code may fail with while it is imported or builds its network
CODE_ERRORS = (ImportError, OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError)


class Titan(nn.Module):
    """TITAN's vision transformer over the grid of tiles.

    Args:
        model: as its authors' code builds it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: Float[Tensor, "n d"], places: PlacedTiles) -> Float[Tensor, " w"]:
        """The slide's vector (768,)."""
        coords = (places.cells * places.side)[None].to(features.device)
        return self.model.encode_slide_from_patch_features(features[None], coords, places.side)[0]


class Prism(nn.Module):
    """PRISM's Perceiver over the tiles, without their places.

    Args:
        model: as its authors' code builds it.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        if hasattr(model, "text_decoder"):
            model.text_decoder = None  # writes reports, and is most of the memory

    def forward(
        self, features: Float[Tensor, "n d"], places: PlacedTiles | None
    ) -> Float[Tensor, " w"]:
        """The slide's vector (1280,)."""
        return self.model.slide_representations(features[None])["image_embedding"][0]


WRAPPERS: Mapping[str, type[nn.Module]] = {"titan": Titan, "prism": Prism}
METHODS = {"titan": "encode_slide_from_patch_features", "prism": "slide_representations"}


def load_remote(
    name: str, row: SlideEncoderRow, weights: str, trust_remote_code: bool
) -> tuple[nn.Module, str]:
    """A network that is built by its authors' code, and the digest of this code.

    Args:
        name, row: of the slide encoder.
        weights: folder of a copy of the hub's repository; empty: from the hub.
        trust_remote_code: whether the user has allowed the code to run.

    Raises:
        UserError: not allowed, no such repository, or code that does not run here.
    """
    place = weights or f"huggingface.co/{row.weights}"
    if not trust_remote_code:
        raise UserError(
            f"slide encoder '{name}': its authors publish the network as Python code ({place}), "
            "which would run here with all your rights; read it, then set trust_remote_code=true"
        )
    folder = find_repository(name, row, weights)
    files = sorted(folder.glob("*.py"))
    if not files or not (folder / "config.json").is_file():
        raise UserError(
            f"weights={folder}: expected a copy of {row.weights} with config.json and its Python "
            f"code, found {sorted(path.name for path in folder.iterdir())[:4]}; fetch the whole "
            "repository"
        )
    digests = {path.name: sha256_bytes(path.read_bytes()) for path in files}
    shown = ", ".join(f"{file} {digest[:SHORT]}" for file, digest in digests.items())
    logger.warning("slide encoder '%s': running Python code of %s: %s", name, folder, shown)
    model = build_from_code(name, folder)
    if not hasattr(model, METHODS[name]):
        raise UserError(
            f"weights={folder}: expected the network of {row.weights} with {METHODS[name]}, found "
            f"{type(model).__name__} without it"
        )
    return WRAPPERS[name](model), sha256_bytes(repr(digests).encode())


def find_repository(name: str, row: SlideEncoderRow, weights: str) -> Path:
    """The folder that is given, or the hub's repository in the local cache.

    Raises:
        UserError: no folder, or the hub is out of reach.
    """
    if weights:
        if not Path(weights).is_dir():
            raise UserError(
                f"weights={weights}: expected the folder of a copy of {row.weights}, found none"
            )
        return Path(weights).resolve()
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(row.weights))
    except NETWORK_ERRORS as error:
        wanted = ("all of it",)
        raise UserError(explain_unreachable(row.hub_row, name, wanted, error, "weights")) from None


def build_from_code(name: str, folder: Path) -> Any:
    """The network of a folder, in float32 on the CPU.

    Raises:
        UserError: in the place of whatever the code fails with.
    """
    from transformers import AutoModel

    try:
        return AutoModel.from_pretrained(
            str(folder), trust_remote_code=True, local_files_only=True
        ).float()
    except CODE_ERRORS as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"slide encoder '{name}': its authors' code in {folder} does not run here "
            f"({type(error).__name__}: {reason}); install what its model card asks for"
        ) from error
