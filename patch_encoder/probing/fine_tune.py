"""The fine-tuning probe: the whole network is trained a little, its first layers the least.

Clark et al. (ELECTRA), ICLR 2020, and Bao et al. (BEiT), ICLR 2022: the learning rate of a layer is
that of the head times `layer_decay` to the power of its distance from the head. AdamW, a short
warm-up, half a cosine; turns and flips only. Difference from BEiT: layers are told apart by the
numbers in the names of the parameters, so that any network has some.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from patch_encoder.models.encoders import Encoder
from patch_encoder.probing.pictures import load_batches
from wsi_common.config import key
from wsi_common.device import autocast
from wsi_common.optim import make_optimizer, require_finite, set_lr
from wsi_common.progress import progress
from wsi_common.schedules import lr_factor

NUMBERED = re.compile(r"^(.*?)\.\d+\.")
WARMUP = 0.1  # share of the steps


@dataclass
class FineTuneKeys:
    """Keys of the fine-tuning probe."""

    epochs: int = key(10, "passes over the training set")
    lr: float = key(5e-4, "learning rate; of the head, at batch_size")
    layer_decay: float = key(0.8, "factor of lr from each layer to the one before")
    weight_decay: float = key(0.05, "weight decay")
    batch_size: int = key(32, "items per step over all processes; tiles")
    seeds: list[int] = key([0], "training seeds")


def number_layers(names: Sequence[str]) -> tuple[list[int], int]:
    """Depth of each parameter, and that of the head.

    Depth 0 is what comes before the first numbered block, then every block is one deeper than the
    one before; what follows the last block is as deep as the head.

    Args:
        names: parameters in the order of the network, `network.blocks.0.attn.qkv.weight`.
    """
    blocks = [match[0] if (match := NUMBERED.match(name)) else "" for name in names]
    number = {block: i + 1 for i, block in enumerate(dict.fromkeys(filter(None, blocks)))}
    top = len(number) + 1
    depths, current = [], 0
    for index, block in enumerate(blocks):
        current = number[block] if block else current
        after = not any(blocks[index:]) and bool(number)
        depths.append(top if after else current)
    return depths, top


def group_by_layer(
    network: nn.Module, head: nn.Module, lr: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser, one per depth and kind; biases and norms have no weight
    decay, the head has the full learning rate.
    """
    named = list(network.named_parameters())
    depths, top = number_layers([name for name, _ in named])
    entries = [(depth, parameter) for depth, (_, parameter) in zip(depths, named, strict=True)]
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for depth, parameter in [*entries, *((top, parameter) for parameter in head.parameters())]:
        decays = parameter.ndim > 1
        rate = {"lr": lr * layer_decay ** (top - depth), "weight_decay": weight_decay * decays}
        groups.setdefault((depth, decays), {"params": [], **rate})["params"].append(parameter)
    return list(groups.values())


def fine_tune_probe(
    encoder: Encoder,
    pictures: Dataset[Tensor],
    targets: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    classes: int,
    settings: FineTuneKeys,
    device: torch.device,
    precision: str = "fp32",
    workers: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """Train the encoder's network with a linear head, and give probabilities (T, C) of the test
    tiles `test`; other arguments as in `fine_tune`.
    """
    how = (settings, device, precision, workers, seed)
    model = fine_tune(encoder, pictures, targets, train, classes, *how)
    batches = load_batches(pictures, test, settings.batch_size, workers)
    return predict(model.eval(), batches, device, precision)


def fine_tune(
    encoder: Encoder,
    pictures: Dataset[Tensor],
    targets: np.ndarray,
    train: np.ndarray,
    classes: int,
    settings: FineTuneKeys,
    device: torch.device,
    precision: str = "fp32",
    workers: int = 0,
    seed: int = 0,
) -> nn.Sequential:
    """Train the encoder's network with a linear head; gives both, the head last.

    Args:
        encoder: with a network; it is changed.
        pictures: items of its transform, uint8 (3, H, W).
        targets: class index of each picture, (N,).
        train: indices of the tiles to train on.
        classes: C; the loss weighs them the same.
        settings: of the training.
        device, precision: resolved.
        workers: processes that decode.
        seed: of the head, the order and the flips.

    Raises:
        UserError: the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(encoder.dim, classes)
    nn.init.trunc_normal_(head.weight, std=0.02, generator=generator)
    nn.init.zeros_(head.bias)
    model = nn.Sequential(encoder.model, head).to(device).requires_grad_(True)
    groups = group_by_layer(
        encoder.model, head, settings.lr, settings.layer_decay, settings.weight_decay
    )
    optimizer = make_optimizer("adamw", groups, settings.lr, settings.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    counts = np.bincount(targets[train], minlength=classes)
    weights = torch.tensor(len(train) / (classes * counts), dtype=torch.float32, device=device)
    steps = -(-len(train) // settings.batch_size)
    for epoch in range(settings.epochs):
        order = train[torch.randperm(len(train), generator=generator).numpy()]
        batches = load_batches(pictures, order, settings.batch_size, workers)
        model.train()
        name = f"fine-tune {encoder.name}, epoch {epoch + 1}/{settings.epochs}"
        for step, items in enumerate(progress(batches, name, steps, "steps")):
            here = order[step * settings.batch_size :][: len(items)]
            if len(here) == 1 and len(train) > 1:
                continue  # a batch norm has no statistics of one tile
            total, done = settings.epochs * steps, epoch * steps + step
            set_lr(optimizer, lr_factor("cosine", done, total, warmup=int(WARMUP * total)))
            wanted = torch.from_numpy(targets[here]).to(device)
            with autocast(device, precision):
                logits = model(turn(items, generator).to(device))
            loss = nn.functional.cross_entropy(logits.float(), wanted, weights)
            require_finite(loss, f"fine-tuning {encoder.name}, step {done}", remedy="lower lr")
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    return model


def turn(items: Tensor, generator: torch.Generator) -> Tensor:
    """Each of (B, 3, H, W) flipped and, where it is square, turned by quarters, drawn at random."""
    square = items.shape[-1] == items.shape[-2]
    drawn = torch.randint(8 if square else 4, (len(items),), generator=generator).tolist()
    turned = []
    for item, number in zip(items, drawn, strict=True):
        item = item.flip(-1) if number & 1 else item
        item = item.flip(-2) if number & 2 else item
        turned.append(item.transpose(-1, -2) if number & 4 else item)
    return torch.stack(turned)


@torch.no_grad()
def predict(model: nn.Module, batches: Any, device: torch.device, precision: str) -> np.ndarray:
    """Probabilities (T, C) of batches of items."""
    parts = []
    for items in batches:
        with autocast(device, precision):
            parts.append(model(items.to(device)).float().softmax(dim=1).double().cpu())
    return torch.cat(parts).numpy()
