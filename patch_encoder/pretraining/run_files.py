"""The files of a pre-training run that others read: the backbone alone, DINO's own layout, and the
logs that the public code writes.

`backbone.pt` is a flat state dict, which `encoder=dino weights=backbone.pt` takes, and so does
INTELLIGENS's loader for ViT-B/16. `full_checkpoint.pth` has the keys of DINO's `checkpoint.pth`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patch_encoder.models.encoder_table import Statistics
from wsi_common.checkpoint import load_tensors, save_tensors
from wsi_common.files import read_json, write_json, write_text
from wsi_common.shared_weights import write_shared_weights

BACKBONE = "backbone.pt"
STUDENT_PREFIX = "module."  # of a student under DistributedDataParallel


def save_backbone(path: Path, backbone: nn.Module) -> None:
    """Write a backbone's weights and buffers, on the CPU, by their plain names."""
    save_tensors(path, copy_to_cpu(backbone.state_dict()))


def share_backbone(folder: Path, description: str, settings: Mapping[str, Any]) -> None:
    """Write the backbone of a run once more, as `model.safetensors`.

    Args:
        folder: of the run, with `backbone.pt`.
        description: name of the file there that says how the network is built.
        settings: of the run, with its `epochs`.
    """
    file = folder / BACKBONE
    described = {"backbone": read_json(folder / description, "the description of a backbone")}
    content = {
        "model": load_tensors(file, "a backbone"),
        "config": {**described, "training": dict(settings)},
        "epoch": settings["epochs"],
    }
    write_shared_weights(folder, content)


def write_description(
    path: Path,
    model: str,
    options: Mapping[str, Any],
    width: int,
    side: int,
    statistics: Statistics,
    tile_size: int,
    mpp: float | None,
) -> None:
    """Write what extraction has to know of a backbone that its weights do not say.

    Args:
        path: `encoder.json` beside the backbone.
        model, options: how timm builds it.
        width: of its features, D.
        side: of its input, px; a tile is resized to it.
        statistics: of the input.
        tile_size, mpp: side in px and resolution of the tiles that it was trained on; None: that of
            each slide's coordinates.
    """
    mean, std = statistics
    values = {"model": model, "options": dict(options), "width": width, "side": side}
    write_json(path, {**values, "mean": mean, "std": std, "tile_size": tile_size, "mpp": mpp})


def save_dino_checkpoint(
    path: Path, student: nn.Module, teacher: nn.Module, centre: Tensor, state: Mapping[str, Any]
) -> None:
    """Write student, teacher and centre as DINO's own script does.

    Args:
        path: the file.
        student, teacher: networks with `backbone` and `head`.
        centre: (K,) of the teacher's logits.
        state: `optimizer`, `epoch` and `args`, of plain values.
    """
    weights = copy_to_cpu(student.state_dict())
    content = {
        "student": {f"{STUDENT_PREFIX}{name}": value for name, value in weights.items()},
        "teacher": copy_to_cpu(teacher.state_dict()),
        "dino_loss": {"center": centre.detach().cpu()[None]},
    }
    save_tensors(path, {**content, **state})


def copy_to_cpu(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose tensors are on the CPU and have memory of their own."""
    return {name: value.detach().cpu().clone() for name, value in weights.items()}


def write_args(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings, one `key: value` per line, sorted, as DINO prints them."""
    lines = [f"{name}: {value}" for name, value in sorted(_flatten(settings).items())]
    write_text(path, "\n".join(lines) + "\n")


def write_epoch_log(path: Path, metrics_file: Path) -> None:
    """Write `log.txt`, one JSON object per epoch, from the lines of metrics.jsonl that sum up an
    epoch.
    """
    names = {"loss": "train_loss", "lr": "train_lr", "weight_decay": "train_wd"}
    lines = []
    for line in metrics_file.read_text(encoding="utf-8").splitlines():
        values = json.loads(line)
        if "step" not in values:
            kept = {new: values[name] for name, new in names.items() if name in values}
            lines.append(json.dumps({**kept, "epoch": values["epoch"] - 1}))
    write_text(path, "".join(f"{line}\n" for line in lines))


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
