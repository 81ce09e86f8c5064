"""Start a slide classifier from the weights of another one: pre-trained aggregators.

The body is loaded, the head is made anew: a file of other classes, or of another task, serves as
well. Files of this project, of CLAM (SB and MB; CHIEF's file has the same names) and of MIL-Lab
(FEATHER: Shao et al., ICML 2025) are known by their names; others load where theirs are ours.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mil.models import PROBES, build
from mil.models.layers import inner_model
from patch_encoder.models.encoder_weights import read_state
from wsi_common.errors import UserError

logger = logging.getLogger(__name__)
FILES = ("checkpoint_best.pt", "model.safetensors", "pytorch_model.bin")  # in a folder, in order
WRAPPER = "model."  # of MIL-Lab's files for the hub, and of our own models behind a standardisation
# names of the parts in CLAM's and MIL-Lab's files -> ours; CLAM without dropout counts one less
PARTS = {
    "patch_embed.0.": "embed.0.",
    "global_attn.attention_a.0.": "attend.0.",
    "global_attn.attention_b.0.": "gate.0.",
    "global_attn.attention_c.": "score.",
    "attention_net.0.": "embed.0.",
    **{f"attention_net.{n}.attention_a.0.": "attend.0." for n in (2, 3)},
    **{f"attention_net.{n}.attention_b.0.": "gate.0." for n in (2, 3)},
    **{f"attention_net.{n}.attention_c.": "score." for n in (2, 3)},
}
STATISTICS = ("mean", "std")  # of the standardisation: those of the cohort that is trained on
SHOWN = 4


def find_initial(init: str) -> Path:
    """The weights file that is named, or the one in the folder (of a run, of a hub's copy).

    Raises:
        UserError: there is none.
    """
    path = Path(init)
    files = [path / name for name in FILES] if path.is_dir() else [path]
    found = next((file for file in files if file.is_file()), None)
    if found is None:
        raise UserError(
            f"init={init}: expected a weights file, or a folder with {', '.join(FILES)}, found none"
        )
    return found


def load_initial(model: nn.Module, network: Mapping[str, Any], path: Path) -> str:
    """Put the weights of a file into the body of a freshly built model; says which in one line.

    Args:
        model: as `build(**network)` makes it.
        network: name, dim, classes and options.
        path: weights file.

    Raises:
        UserError: a probe, which has no body; weights of another shape; none that fits.
    """
    name = network["name"]
    if name in PROBES:
        raise UserError(f"init={path}: expected a trained model, found probe {name}; leave it out")
    state, inner = rename(read_state(path)), inner_model(model)
    own, heads = inner.state_dict(), find_heads(network)
    body = {key: value for key, value in own.items() if not key.startswith(heads)}
    fits = {key: state[key] for key in body if key in state}
    for key, value in fits.items():
        if value.shape != body[key].shape:
            raise UserError(
                f"init={path}: expected {key} of shape {tuple(body[key].shape)} as in {name}, "
                f"found {tuple(value.shape)}; set options= to the sizes of the file's network, "
                "and give features of its encoder"
            )
    if not fits:
        raise UserError(
            f"init={path}: expected weights of {name} ({', '.join(list(body)[:SHOWN])}, ...), "
            f"found {', '.join(list(state)[:SHOWN])}; give the file of such a model"
        )
    inner.load_state_dict(fits, strict=False)
    left = [key for key in state if key not in own and key not in STATISTICS]
    return describe(path, fits, heads, [key for key in body if key not in fits], left)


def rename(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with our names of the parts."""
    renamed = {}
    for key, value in state.items():
        plain = key.removeprefix(WRAPPER)
        part = next((part for part in PARTS if plain.startswith(part)), "")
        renamed[PARTS[part] + plain.removeprefix(part) if part else plain] = value
    return renamed


def find_heads(network: Mapping[str, Any]) -> tuple[str, ...]:
    """Prefixes of the parameters that depend on the number of classes: another number changes the
    shape of these and of no others.
    """
    plain = {**network, "standardize": False, "covariates": 0}
    with torch.device("meta"):
        model = build(**plain)
        other = build(**{**plain, "classes": network["classes"] + 1})
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    modules = {name for name, _ in model.named_modules()}
    heads = set()
    for key, value in other.state_dict().items():
        if shapes.get(key) == value.shape:
            continue
        parent = key.rpartition(".")[0]
        # one more module in a list (CLAM's instance classifiers): the whole list is of the classes
        parent = parent if parent in modules else parent.rpartition(".")[0]
        heads.add(f"{parent}." if parent else key)
    return tuple(sorted(heads))


def describe(
    path: Path,
    loaded: Collection[str],
    heads: Collection[str],
    fresh: Collection[str],
    left: Collection[str],
) -> str:
    """What was loaded, and what was not."""
    line = f"init={path}: loaded {len(loaded)} tensors ({_name_parts(loaded)}); made anew: "
    line += ", ".join(head.rstrip(".") for head in heads)
    line += f" and, since the file lacks them, {_name_parts(fresh)}" if fresh else ""
    return line + (f"; left out of the file: {_name_parts(left)}" if left else "")


def _name_parts(keys: Collection[str]) -> str:
    parts = list(dict.fromkeys(key.rpartition(".")[0] or key for key in keys))
    more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
    return ", ".join(parts[:SHOWN]) + more
