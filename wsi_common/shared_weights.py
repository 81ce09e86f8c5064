"""Weights in a form that every library reads and that cannot hold code: `model.safetensors`, and
beside it `config.json` with the description from which a checkpoint's model is rebuilt.

Format: https://github.com/huggingface/safetensors. `wsi_common.checkpoint` reads such a folder
wherever it reads a `.pt` file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from wsi_common.errors import DamagedFile, UserError
from wsi_common.files import atomic_path, read_json, sha256_bytes, sha256_file, write_text

WEIGHTS, DESCRIPTION = "model.safetensors", "config.json"
BEST = "checkpoint_best.pt"
FORMAT = "wsi_checkpoint"
PARTS = ("config", "epoch", "best")  # of a checkpoint, beside its weights


def write_shared_weights(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `model.safetensors` and `config.json` into a folder.

    Args:
        folder: a run directory.
        content: of a checkpoint: `model`, and what of `config`, `epoch`, `best` it has.
    """
    from safetensors.torch import save  # a while to load

    described = {name: content[name] for name in PARTS if name in content}
    text = json.dumps({"format": FORMAT, **described}, indent=2) + "\n"
    # the format has no shared memory and no strides: each tensor is a plain copy of its own
    tensors = {
        name: value.detach().cpu().contiguous().clone() for name, value in content["model"].items()
    }
    with atomic_path(folder / WEIGHTS) as temporary:
        # its own writer would make a file that only its owner may read
        temporary.write_bytes(save(tensors, metadata={"format": "pt"}))
    write_text(folder / DESCRIPTION, text)


def find_weights(path: str | Path) -> Path:
    """The file that a path to a trained network means: the file itself, or in a folder
    `model.safetensors`, or else `checkpoint_best.pt`.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    return path / WEIGHTS if (path / WEIGHTS).is_file() else path / BEST


def is_shared(file: Path) -> bool:
    """Whether a file holds weights as `write_shared_weights` writes them, with their description
    beside it.
    """
    described = file.with_name(DESCRIPTION)
    if file.suffix != ".safetensors" or not described.is_file():
        return False
    content = read_json(described, "the description of a network")
    return isinstance(content, dict) and content.get("format") == FORMAT


def read_shared_weights(file: Path, what: str) -> dict[str, Any]:
    """A checkpoint's `model`, `config`, `epoch` and `best` from a `.safetensors` file and the
    `config.json` beside it.

    Raises:
        DamagedFile: the weights cannot be read.
        UserError: a file is not there, or the description is another library's.
    """
    described = file.with_name(DESCRIPTION)
    content = read_json(described, f"the description of {what}")
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UserError(
            f"{described}: expected the description of {what} as a training here writes it beside "
            f"{WEIGHTS}, found another library's; give the checkpoint of a run"
        )
    return {"model": read_safetensors(file, what), **content}


def read_safetensors(file: str | Path, what: str) -> dict[str, Tensor]:
    """All tensors of a `.safetensors` file, in memory of their own.

    Raises:
        DamagedFile: it cannot be read.
        UserError: it is not there, or may not be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(file).is_file():
        raise UserError(f"{file}: expected {what}, found no file")
    try:
        # copies: what the library gives is the file itself, mapped, and a file that is written
        # over kills who maps it
        return {name: tensor.clone() for name, tensor in load_file(file).items()}
    except (SafetensorError, OSError) as error:
        kind = UserError if isinstance(error, OSError) else DamagedFile
        raise kind(f"{file}: expected {what}, cannot be read: {error}") from None


def digest_weights_file(path: str | Path) -> str:
    """Digest of a trained network's file, and of the description beside it where it has one.

    Raises:
        UserError: there is no such file.
    """
    file = find_weights(path)
    if not file.is_file():
        raise UserError(f"{file}: expected the weights of a network, found no file")
    if not is_shared(file):
        return sha256_file(file)
    parts = (file, file.with_name(DESCRIPTION))
    return sha256_bytes(*(sha256_file(part).encode() for part in parts))
