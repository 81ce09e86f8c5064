"""Checkpoints: one `.pt` that holds plain containers and tensors, written atomically, loaded with
`weights_only=True`.

Keys: `model`, `config` (plain dict: enough to rebuild the model), `epoch` (epochs completed),
`best`; for resuming `optimizer`, `scaler`, `rng`. Whatever reads one takes a folder with
`model.safetensors` and `config.json` (`wsi_common.shared_weights`) in its place.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from wsi_common.errors import DamagedFile, UserError
from wsi_common.files import atomic_path
from wsi_common.memory import is_out_of_memory
from wsi_common.seed import rng_state, set_rng_state
from wsi_common.shared_weights import (
    find_weights,
    is_shared,
    read_safetensors,
    read_shared_weights,
    write_shared_weights,
)


def save_checkpoint(
    path: str | Path, *, model: dict[str, Any], config: dict[str, Any], epoch: int, **state: Any
) -> None:
    """Write a checkpoint atomically; `state` takes `best` and the state dicts of `optimizer`,
    `scaler` and other parts.
    """
    content = {"model": model, "config": config, "epoch": epoch, "rng": rng_state(), **state}
    save_tensors(path, content)


def save_tensors(path: str | Path, content: Any) -> None:
    """`torch.save`, atomically; the same content is the same bytes: given a path, torch would put
    the file's name inside.
    """
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        try:
            torch.save(content, stream)
        except RuntimeError as error:
            # after a failed write, or a signal within one, torch closes its archive, whose own
            # error hides the first
            if isinstance(error.__context__, (OSError, KeyboardInterrupt)):
                raise error.__context__ from None
            raise


def load_tensors(path: str | Path, what: str) -> Any:
    """`torch.load(weights_only=True)` on the CPU; a folder or a `.safetensors` file is read as
    `wsi_common.shared_weights` describes.

    Raises:
        DamagedFile: it is truncated, or holds code.
        UserError: it is not there, or may not be read.
    """
    path = find_weights(path)
    if path.suffix == ".safetensors":
        return read_shared_weights(path, what)
    if not path.is_file():
        raise UserError(f"{path}: expected {what}, found no file")
    try:
        # published checkpoints keep their command line beside the weights; a Namespace is a plain
        # container
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle make unpickling raise anything
        if is_out_of_memory(error):
            raise
        kind = DamagedFile if getattr(error, "errno", None) is None else UserError
        raise kind(
            f"{path}: expected {what} (tensors and plain containers only), cannot be read: "
            f"{_explain(error)}"
        ) from None


def _explain(error: Exception) -> str:
    """Why a file cannot be read, without torch's advice to run the code in it, and the remedy."""
    if getattr(error, "errno", None) is not None:
        return str(error)
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        return f"it holds {found[1]}, which may run code; write it again without"
    return "it is damaged, or no file of torch.save; write or fetch it again"


def read_weights(path: str | Path, what: str) -> dict[str, Any]:
    """The dict in a torch file that `load_tensors` takes, or the tensors of a `.safetensors` file
    that is none of ours, else UserError.
    """
    file = find_weights(path)
    if file.suffix == ".safetensors" and not is_shared(file):
        return read_safetensors(file, what)
    content = load_tensors(path, what)
    if not isinstance(content, dict):
        raise UserError(
            f"{path}: expected {what} (a dict of tensors), found {type(content).__name__}"
        )
    return content


def share_checkpoint(path: Path) -> None:
    """Write a checkpoint's weights once more, beside it, as `model.safetensors`."""
    write_shared_weights(path.parent, load_checkpoint(path))


def load_checkpoint(path: str | Path, what: str = "a checkpoint") -> dict[str, Any]:
    """A checkpoint's content with `model`, `config` and `epoch` present, else UserError."""
    content = load_tensors(path, what)
    missing = [
        name
        for name in ("model", "config", "epoch")
        if not isinstance(content, dict) or name not in content
    ]
    if missing:
        raise UserError(
            f"{path}: expected {what} with keys model, config, epoch; '{missing[0]}' is missing"
        )
    return content


def load_checkpoint_of(path: str | Path, kind: str, what: str, script: str) -> dict[str, Any]:
    """The content of a checkpoint whose `config` says that it is of a kind of network.

    Args:
        path: of the file.
        kind: that its configuration names.
        what: the network in words, with its article.
        script: that writes such files.

    Raises:
        UserError: another file.
    """
    content = load_checkpoint(path, what)
    found = content["config"].get("kind")
    if found != kind:
        raise UserError(
            f"{path}: expected {what} (kind {kind}), found kind {found!r}; give "
            f"checkpoint_best.pt of {script}"
        )
    return content


def load_weights(module: nn.Module, weights: dict[str, torch.Tensor], source: str) -> None:
    """Load a state dict strictly; another architecture's weights are a UserError that names the
    first differences.

    A module whose parameters are on the meta device takes the tensors themselves, in its own
    dtypes.
    """
    own = module.state_dict()
    missing = [name for name in own if name not in weights]
    unexpected = [name for name in weights if name not in own]
    reshaped = [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if missing or unexpected or reshaped:
        shapes = [f"{n} {tuple(weights[n].shape)} for {tuple(own[n].shape)}" for n in reshaped]
        raise UserError(
            f"{source}: weights of another architecture: {len(missing)} missing {missing[:2]}, "
            f"{len(unexpected)} unexpected {unexpected[:2]}, {len(reshaped)} of another shape "
            f"{shapes[:2]}; "
            f"give the weights of a {type(module).__name__} with the same settings"
        )
    empty = any(parameter.is_meta for parameter in module.parameters())
    if empty:
        weights = {name: value.to(own[name].dtype).contiguous() for name, value in weights.items()}
    module.load_state_dict(weights, assign=empty)


def resume(path: str | Path, model: nn.Module, **parts: Any) -> tuple[int, dict[str, Any]]:
    """Put model, optimizer, scaler and all generators back to where the checkpoint left
    them.

    Args:
        path: `checkpoint_last.pt` of the run; when absent nothing changes.
        model: the unwrapped model.
        parts: objects with `load_state_dict`, named as they were in `save_checkpoint`.

    Returns:
        Number of epochs completed (0 without a checkpoint) and `best`.
    """
    if not Path(path).is_file():
        return 0, {}
    content = load_checkpoint(path)
    load_weights(model, content["model"], str(path))
    for name, part in parts.items():
        part.load_state_dict(content[name])
    set_rng_state(content["rng"])
    return content["epoch"], content.get("best", {})
