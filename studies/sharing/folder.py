"""The folder that is shared: weights, description, card and digests, without what only concerns
those who trained: slide ids, case ids and paths.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from studies.sharing.origins import Kind, find_kind
from wsi_common.checkpoint import load_checkpoint
from wsi_common.errors import UserError
from wsi_common.files import read_json, sha256_file, write_json, write_text
from wsi_common.shared_weights import DESCRIPTION, WEIGHTS, find_weights, write_shared_weights

logger = logging.getLogger(__name__)
CARD, DIGESTS = "README.md", "sha256.json"
ENCODERS = ("encoder.json", "region_encoder.json")  # what a pre-trained encoder's loader reads
# every file that a shared folder may hold; nothing else is fetched
FILES = (WEIGHTS, DESCRIPTION, CARD, DIGESTS, *ENCODERS)
HIDDEN = "(left out)"
# entries of a description with ids, or with digests of ids, which can be found by trying
PRIVATE = ("digests", "cases", "left_out", "inputs")
# how an encoder prepares tiles, in words ("mean/std ..."): bags are compared by it
TRANSFORM = "transform"


@dataclass(frozen=True)
class TrainedModel:
    """A finished run, or the folder of one.

    Attributes:
        folder: where it is.
        content: of its checkpoint: `model`, `config`, `epoch`, `best`.
        kind: of network.
        results: of results.json; empty where there is none.
    """

    folder: Path
    content: dict[str, Any]
    kind: Kind
    results: dict[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The description in its checkpoint."""
        return self.content["config"]


def read_model(run: str | Path) -> TrainedModel:
    """The model of a finished run.

    Raises:
        UserError: not finished, or no run of a network.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise UserError(f"run={run}: expected the directory of a run, found a file")
    results = folder / "results.json"
    if not results.is_file():
        raise UserError(f"{results}: expected the results of a finished run, found no file")
    content = load_checkpoint(find_weights(folder), "the weights of a finished run")
    return TrainedModel(
        folder, content, find_kind(content["config"]), read_json(results, "results")
    )


def hide_private(config: Mapping[str, Any]) -> dict[str, Any]:
    """A description without the ids of slides and cases, and without paths.

    A folder's name can be that of a hospital or a person, and a slide's that of a patient.
    """
    return {name: _hide(name, value) for name, value in config.items()}


def _hide(name: str, value: Any) -> Any:
    if name in PRIVATE and isinstance(value, Mapping | list | tuple):
        return type(value)()
    if isinstance(value, Mapping):
        return hide_private(value)
    if isinstance(value, list | tuple):
        return [_hide("", item) for item in value]
    if name == TRANSFORM:
        return value
    is_path = isinstance(value, str) and ("/" in value or "\\" in value or Path(value).is_file())
    # timm:..., open_clip:.../... and hf:.../... name encoders
    return HIDDEN if is_path and not value.startswith(("timm:", "open_clip:", "hf:")) else value


def write_folder(folder: Path, model: TrainedModel, card: str) -> dict[str, str]:
    """Write everything that is shared; returns the digest of each file.

    Raises:
        UserError: the folder is the run itself, whose checkpoint says more than is shared.
    """
    if folder.resolve() == model.folder.resolve():
        raise UserError(f"output={folder}: expected another folder than the run's")
    shown = {name: hide_private(model.content.get(name, {})) for name in ("config", "best")}
    write_shared_weights(folder, {**model.content, **shown})
    for name in ENCODERS:
        if (model.folder / name).is_file():
            write_json(folder / name, read_json(model.folder / name, "an encoder's description"))
    write_text(folder / CARD, card)
    names = [name for name in FILES if name != DIGESTS and (folder / name).is_file()]
    digests = {name: sha256_file(folder / name) for name in names}
    write_json(folder / DIGESTS, digests)
    return digests


def verify_folder(folder: Path, expected: str = "") -> TrainedModel:
    """Check a folder that was fetched, and load its weights; no code in it is ever run.

    Args:
        folder: with `sha256.json`.
        expected: sha256 of model.safetensors as its author states it; empty: not stated.

    Raises:
        UserError: a file is missing or is not the one that was shared.
    """
    digests = read_json(folder / DIGESTS, "the digests of a shared model")
    if not isinstance(digests, dict) or not {WEIGHTS, DESCRIPTION} <= digests.keys():
        raise UserError(f"{folder / DIGESTS}: expected digests of {WEIGHTS} and {DESCRIPTION}")
    if expected and digests[WEIGHTS] != expected.lower():
        raise UserError(
            f"{folder / WEIGHTS}: expected sha256 {expected}, found {digests[WEIGHTS]}; these are "
            "other weights: ask who shared them"
        )
    for name, digest in digests.items():
        if name not in FILES:
            raise UserError(f"{folder / DIGESTS}: expected files of a model, found '{name}'")
        if not (folder / name).is_file() or sha256_file(folder / name) != digest:
            raise UserError(
                f"{folder / name}: expected the file that was shared (sha256 {digest[:12]}), found "
                "another or none; fetch it again into an empty folder"
            )
    content = load_checkpoint(folder, "the weights of a shared model")
    return TrainedModel(folder, content, find_kind(content["config"]), {})
