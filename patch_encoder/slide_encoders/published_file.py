"""Published weights of a slide encoder: the file, its keys, and what of it is not used."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from patch_encoder.models.encoder_weights import fetch_hub_file, find_local_file, read_state
from patch_encoder.slide_encoders.table import SlideEncoderRow
from wsi_common.checkpoint import load_weights
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
State = Mapping[str, Tensor]


def find_weights(name: str, row: SlideEncoderRow, weights: str) -> Path:
    """The weights file: the one that is given, the one in the folder that is given, else the hub's.

    Raises:
        UserError: no file, or the hub is out of reach or does not have it.
    """
    if weights:
        return find_local_file(Path(weights), row.hub_row)
    return fetch_hub_file(row.hub_row, name)


def read_published(path: Path, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a weights file, without names of containers and wrappers, and `prefix`."""
    state = read_state(path)
    return {name.removeprefix(prefix): value for name, value in state.items()}


def get_shape(state: State, name: str, source: str) -> tuple[int, ...]:
    """The shape of a tensor that the published layout has.

    Raises:
        UserError: the file is of another layout.
    """
    if name not in state:
        raise UserError(
            f"{source}: expected the published layout with the key {name}, found "
            f"{sorted(state)[:3]} and others; give the authors' own file"
        )
    return tuple(state[name].shape)


def load_published(module: nn.Module, state: State, unused: tuple[str, ...], source: str) -> None:
    """Load a state dict key by key, but for the keys that are known to stand beside the encoder.

    Args:
        module: whose parameters are named as in the file.
        state: of the file.
        unused: prefixes of the keys that the slide's vector does not need.
        source: the file, for errors.
    """
    beside = sorted(name for name in state if name.startswith(unused)) if unused else []
    if beside:
        roots = dict.fromkeys(name.split(".")[0] for name in beside)
        line = "%s: %d keys beside the encoder left out: %s"
        logger.info(line, source, len(beside), ", ".join(roots))
    load_weights(module, {name: state[name] for name in state if name not in beside}, source)
