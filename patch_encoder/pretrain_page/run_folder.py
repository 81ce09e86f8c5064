"""What a pre-training left on disk: settings, logged lines, machine, network."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from patch_encoder.models.dino_files import DESCRIPTION, read_description
from patch_encoder.models.encoders import PixelEncoder, build_encoder
from patch_encoder.pretraining.keys import TileViewKeys
from patch_encoder.selfdistill.view_recipe import ViewRecipe
from wsi_common.errors import UserError
from wsi_common.files import read_json


@dataclass(frozen=True)
class PretrainingFolder:
    """A run directory of pre-training.

    Attributes:
        path: the directory.
        settings: what decides tiles, views and network.
        written: the whole config.yaml.
        lines: of metrics.jsonl, in order.
        environment: of environment.json; empty where it is not there.
        results: of results.json; None while the run is not finished.
        corpus: digest of the slides that the run was trained on; empty where it is not known.
    """

    path: Path
    settings: TileViewKeys
    written: dict[str, Any]
    lines: list[dict[str, Any]]
    environment: dict[str, Any]
    results: dict[str, Any] | None
    corpus: str

    def list_settings(self) -> list[tuple[str, list[tuple[str, Any]]]]:
        """(block, [(key, value)]); the keys outside of blocks come first, in a block called run."""
        blocks: dict[str, list[tuple[str, Any]]] = {"run": []}
        for name, value in self.written.items():
            if isinstance(value, Mapping):
                blocks[name] = list(value.items())
            else:
                blocks["run"].append((name, value))
        return list(blocks.items())


def read_run(path: str | Path, slides: str = "", coords: str = "") -> PretrainingFolder:
    """Read a run directory of pretrain_dino.

    Args:
        path: the directory.
        slides, coords: where the corpus is now; empty: where the run found it.

    Raises:
        UserError: no such run, a file of it cannot be read, or its slides are gone.
    """
    folder = Path(path)
    written = _read_config(folder)
    known = {field.name for field in fields(TileViewKeys)}
    given = {name: value for name, value in written.items() if name in known}
    try:
        settings = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TileViewKeys), given))
    except OmegaConfBaseException as error:
        raise UserError(
            f"{folder / 'config.yaml'}: expected the settings of pretrain_dino, found "
            f"{str(error).splitlines()[0]}"
        ) from None
    assert isinstance(settings, TileViewKeys)
    moved = {"slides": slides or settings.slides, "coords": coords or settings.coords}
    for name, place in moved.items():
        if place and not Path(place).exists():
            raise UserError(
                f"{name}={place} of {folder / 'config.yaml'}: expected an existing path, found "
                f"none; give {name}=... where it is now"
            )
    inputs = _read_optional(folder / "run.json").get("inputs", {})
    return PretrainingFolder(
        folder,
        replace(settings, **moved),
        written,
        read_lines(folder / "metrics.jsonl"),
        _read_optional(folder / "environment.json"),
        _read_optional(folder / "results.json") or None,
        inputs.get("slides", ""),
    )


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    if not file.is_file() or not (folder / "backbone.pt").is_file():
        raise UserError(
            f"run={folder}: expected a run directory of pretrain_dino with config.yaml and "
            "backbone.pt, which the first epoch's end leaves, found none"
        )
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: expected YAML, found {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected the settings of pretrain_dino, found none")
    return content


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path, "an object of a run") if path.is_file() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl up to one that a running training has half written; none where
    there is no file.
    """
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def load_network(run: PretrainingFolder) -> tuple[PixelEncoder, ViewRecipe]:
    """The teacher's backbone as the run left it, with its normalisation in front, and the
    views that it was trained on.

    Raises:
        UserError: the weights cannot be read, or are of another architecture.
    """
    statistics = read_description(run.path / DESCRIPTION).statistics
    recipe = run.settings.views.build(run.settings.shuffle)
    encoder = build_encoder("dino", str(run.path)).model
    assert isinstance(encoder, PixelEncoder)
    return encoder, replace(recipe, mean=statistics[0], std=statistics[1])
