"""Miniature checkpoints in the key layout of the published slide encoders, fabricated: random
numbers under the true names, with widths that are smaller than the published ones. No published
weight is in this repository.

Beside each stands what the authors' code computes, written anew from the state dict alone with
loops over heads, groups and tokens, so that it shares no line with the networks under test.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

State = dict[str, Tensor]


def _linear(state: State, name: str, out: int, width: int) -> None:
    state[f"{name}.weight"] = torch.randn(out, width) * width**-0.5
    state[f"{name}.bias"] = torch.randn(out) * 0.3


def _norm(state: State, name: str, width: int) -> None:
    state[f"{name}.weight"] = 1 + 0.2 * torch.randn(width)
    state[f"{name}.bias"] = 0.2 * torch.randn(width)


def _gated(state: State, name: str, width: int, hidden: int, heads: int = 1) -> None:
    _linear(state, f"{name}.attention_a.0", hidden, width)
    _linear(state, f"{name}.attention_b.0", hidden, width)
    _linear(state, f"{name}.attention_c", heads, hidden)


def apply(state: State, name: str, x: Tensor) -> Tensor:
    return linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def normed(state: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)


def gated_scores(state: State, name: str, h: Tensor) -> Tensor:
    a = torch.tanh(apply(state, f"{name}.attention_a.0", h))
    b = torch.sigmoid(apply(state, f"{name}.attention_b.0", h))
    return apply(state, f"{name}.attention_c", a * b)


def chief_state(dim: int = 12, hidden: int = 8, attention: int = 5, text: int = 6) -> State:
    """All keys of CHIEF_pretraining.pth: with classifiers, attention head and organs."""
    torch.manual_seed(3)
    state: State = {"organ_embedding": torch.randn(19, text)}
    _linear(state, "attention_net.0", hidden, dim)
    _gated(state, "attention_net.3", hidden, attention)
    _linear(state, "classifiers", 2, hidden)
    for number in range(2):
        _linear(state, f"instance_classifiers.{number}", 2, hidden)
    _linear(state, "att_head.fc1", attention, hidden)
    _linear(state, "att_head.fc2", 1, attention)
    _linear(state, "text_to_vision.0", hidden, text)
    return state


def chief_by_hand(state: State, features: Tensor, organ: int | None = None) -> Tensor:
    h = torch.relu(apply(state, "attention_net.0", features))
    weights = gated_scores(state, "attention_net.3", h)[:, 0].exp()
    weights = weights / weights.sum()
    if organ is None:
        return sum(w * x for w, x in zip(weights, features, strict=True))
    text = torch.relu(apply(state, "text_to_vision.0", state["organ_embedding"][organ]))
    return sum(w * x for w, x in zip(weights, h, strict=True)) + text


def madeleine_state(dim: int = 10, hidden: int = 6, heads: int = 4, attention: int = 7) -> State:
    """All keys of model.pt, as DistributedDataParallel left them (`module.`)."""
    torch.manual_seed(4)
    state: State = {}
    pre = "module.wsi_embedders.pre_attn"
    for number, (before, after) in enumerate(
        ((dim, hidden), (hidden, hidden), (hidden, hidden * heads))
    ):
        _linear(state, f"{pre}.{4 * number}", after, before)
        _norm(state, f"{pre}.{4 * number + 1}", after)
    for head in range(heads):
        _gated(state, f"module.wsi_embedders.attn.{head}", hidden, attention)
    _linear(state, "module.token_projector", 3, hidden * heads)
    _linear(state, "module.projector", hidden, hidden * heads)
    return state


def madeleine_by_hand(state: State, features: Tensor, heads: int = 4) -> Tensor:
    state = {name.removeprefix("module."): value for name, value in state.items()}
    x = features
    for number in (0, 4, 8):
        x = apply(state, f"wsi_embedders.pre_attn.{number}", x)
        x = gelu(normed(state, f"wsi_embedders.pre_attn.{number + 1}", x))
    # 'b t (e c) -> b t e c': channel e * heads + c belongs to head c
    pooled = torch.zeros(x.shape[1])
    for head in range(heads):
        own = x[:, head::heads]
        weights = torch.softmax(gated_scores(state, f"wsi_embedders.attn.{head}", own)[:, 0], 0)
        pooled[head::heads] = weights @ own
    return apply(state, "projector", pooled)


def feather_state(dim: int = 9, hidden: int = 6, attention: int = 5, heads: int = 1) -> State:
    """All keys of model.safetensors, below the authors' wrapper (`model.`)."""
    torch.manual_seed(5)
    state: State = {}
    _linear(state, "model.patch_embed.0", hidden, dim)
    _gated(state, "model.global_attn", hidden, attention, heads)
    _linear(state, "model.classifier", 108, hidden * heads)
    return state


def feather_by_hand(state: State, features: Tensor) -> Tensor:
    h = torch.relu(apply(state, "model.patch_embed.0", features))
    scores = gated_scores(state, "model.global_attn", h)
    return torch.cat([torch.softmax(column, 0) @ h for column in scores.T])


def gigapath_state(
    dim: int = 10, width: int = 64, hidden: int = 48, depth: int = 2, norm: bool = True
) -> State:
    """All keys of slide_encoder.pth that the encoder has, and two of the pre-training's decoder."""
    torch.manual_seed(6)
    state: State = {"cls_token": torch.randn(1, 1, width), "mask_token": torch.zeros(1, 1, width)}
    _linear(state, "patch_embed.proj", width, dim)
    _linear(state, "decoder_embed", width, width)
    for layer in range(depth):
        base = f"encoder.layers.{layer}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            _linear(state, f"{base}.self_attn.{name}", width, width)
        _norm(state, f"{base}.self_attn.inner_attn_ln", width)
        _norm(state, f"{base}.self_attn_layer_norm", width)
        _norm(state, f"{base}.final_layer_norm", width)
        _linear(state, f"{base}.ffn.fc1", hidden, width)
        _linear(state, f"{base}.ffn.fc2", width, hidden)
        _norm(state, f"{base}.ffn.ffn_layernorm", hidden)
    if norm:
        _norm(state, "encoder.layer_norm", width)
    _norm(state, "norm", width)
    return state


def position_by_hand(row_number: int, width: int) -> np.ndarray:
    """Row `row_number` of the authors' table of 1000 x 1000 positions: the quotient by 1000 is the
    column of the tile, the remainder its row; the remainder's half comes first.
    """
    values = []
    for number in (row_number % 1000, row_number // 1000):
        rates = [1 / 10000 ** (i / (width / 4)) for i in range(width // 4)]
        values += [math.sin(number * rate) for rate in rates]
        values += [math.cos(number * rate) for rate in rates]
    return np.array(values, dtype=np.float32)


def dilated_by_hand(
    q: Tensor, k: Tensor, v: Tensor, segments: tuple[int, ...], ratios: tuple[int, ...]
) -> Tensor:
    """Dilated attention of (L, H, E), token by token and head by head, by LongNet's definition and
    torchscale's filling up: a key that is filled in is zero and counts in the denominator.
    """
    length, heads, size = q.shape
    result = torch.zeros_like(q)
    for token in range(length):
        for head in range(heads):
            numerator, denominator = torch.zeros(size, dtype=q.dtype), 0.0
            for segment, ratio in zip(segments, ratios, strict=True):
                segment = min(segment, length)
                start = token // segment * segment
                group = head // (heads // ratio)
                if (token - start) % ratio != group:
                    continue
                filled = -(-segment // ratio) * ratio
                for place in range(group, filled, ratio):
                    there = place < segment and start + place < length
                    key = k[start + place, head] if there else torch.zeros(size, dtype=q.dtype)
                    weight = math.exp(float(q[token, head] @ key) / math.sqrt(size))
                    denominator += weight
                    if there:
                        numerator += weight * v[start + place, head]
            result[token, head] = numerator / denominator
    return result


def gigapath_by_hand(
    state: State,
    features: Tensor,
    cells: np.ndarray,
    segments: tuple[int, ...],
    ratios: tuple[int, ...],
    pool: str = "published",
) -> Tensor:
    x = apply(state, "patch_embed.proj", features)
    width = x.shape[1]
    rows = [position_by_hand(int(column) * 1000 + int(row), width) for column, row in cells]
    x = torch.cat([state["cls_token"][0], x + torch.from_numpy(np.stack(rows))])
    layer = 0
    while f"encoder.layers.{layer}.ffn.fc1.weight" in state:
        base = f"encoder.layers.{layer}"
        y = normed(state, f"{base}.self_attn_layer_norm", x)
        q, k, v = (
            apply(state, f"{base}.self_attn.{name}", y).unflatten(1, (16, -1))
            for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = dilated_by_hand(q, k, v, segments, ratios).flatten(1)
        mixed = normed(state, f"{base}.self_attn.inner_attn_ln", mixed)
        x = x + apply(state, f"{base}.self_attn.out_proj", mixed)
        y = gelu(apply(state, f"{base}.ffn.fc1", normed(state, f"{base}.final_layer_norm", x)))
        x = x + apply(state, f"{base}.ffn.fc2", normed(state, f"{base}.ffn.ffn_layernorm", y))
        layer += 1
    if "encoder.layer_norm.weight" in state:
        x = normed(state, "encoder.layer_norm", x)
    return normed(state, "norm", x[0] if pool == "published" else x[1:].mean(0), 1e-6)
