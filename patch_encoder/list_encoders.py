"""List the encoders that features can be extracted with, and those of whole slides; or check one:
size, cost and time of a tile on this device.

    python -m patch_encoder.list_encoders
    python -m patch_encoder.list_encoders kind=slide
    python -m patch_encoder.list_encoders json=true
    python -m patch_encoder.list_encoders encoder=uni weights=UNI/pytorch_model.bin

`verify` loads the encoder as extraction would (weights= empty: from its hub; random: untrained) and
encodes random tiles.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from patch_encoder.extraction.keys import DeviceKeys, EncoderKeys
from patch_encoder.models.encoder_names import PATTERNS
from patch_encoder.models.encoder_table import ENCODERS
from patch_encoder.models.encoders import Encoder, build_encoder
from patch_encoder.slide_encoders.table import SLIDE_ENCODERS
from wsi_common.cli import launch
from wsi_common.config import key
from wsi_common.device import autocast, pick_device, pick_precision
from wsi_common.errors import UserError

COLUMNS = ("name", "dim", "input", "mpp", "tile", "precision", "library", "licence", "gated", "hub")
SLIDE_COLUMNS = (
    *("name", "dim", "tile_encoder", "mpp", "tile", "coords", "remote_code", "licence", "gated"),
    "hub",
)


@dataclass
class Config(DeviceKeys, EncoderKeys):
    """Keys of the list and of the check."""

    json: bool = key(False, "print JSON")
    match: str = key("", "list only names that contain this text")
    kind: str = key(
        "", "encoders to list: of tiles or of slides; empty: both", choices=("", "tile", "slide")
    )
    encoder: str = key(
        "",
        "encoder: a name that list_encoders prints, timm:<model>, "
        "open_clip:<model>/<tag>, hf:<repo> or dino; it is built, encodes random tiles, "
        "and what it costs is printed",
    )
    batch_size: int = key(8, "items per step over all processes; tiles")
    rounds: int = key(3, "timed rounds, of which the median counts; after one to warm up")


def make_table(match: str = "") -> list[dict[str, Any]]:
    """One dict a row of the encoder table, JSON-ready, with what a list and a person need."""
    return [
        {
            "name": name,
            "kind": "tile",
            "dim": row.width,
            "input": row.fit.size,
            "mpp": row.mpp,
            "tile": row.tile,
            "precision": row.precision,
            "library": row.library,
            "licence": row.licence,
            "gated": row.gated,
            "hub": row.place,
            "transform": repr(row.fit),
            "mean": row.statistics[0],
            "std": row.statistics[1],
            "pool": row.pool or "published",
            "l2_normalised": row.normalise,
            "citation": row.citation,
        }
        for name, row in ENCODERS.items()
        if match in name
    ]


def make_slide_table(match: str = "") -> list[dict[str, Any]]:
    """One dict a row of the table of slide encoders, JSON-ready."""
    return [
        {
            "name": name,
            "kind": "slide",
            "dim": row.width,
            "tile_encoder": " or ".join(row.tile_encoders) or "any",
            "mpp": row.mpp,
            "tile": row.tile,
            "coords": row.needs_coords,
            "remote_code": row.remote_code,
            "precision": row.precision,
            "licence": row.licence,
            "gated": row.gated,
            "hub": row.weights,
            "citation": row.citation,
        }
        for name, row in SLIDE_ENCODERS.items()
        if match in name
    ]


def format_table(rows: Sequence[dict[str, Any]], columns: Sequence[str] = COLUMNS) -> str:
    """Columns padded to their longest entry; `-` where there is nothing to say."""
    lines = [list(columns), *([_format_cell(row[name]) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def format_tables(tiles: Sequence[dict[str, Any]], slides: Sequence[dict[str, Any]]) -> str:
    """Both tables, each under what its encoders are for, without those that are empty."""
    parts = []
    if slides:
        parts.append(
            "slide encoders (slide_encoder= of encode_slides)\n\n"
            + format_table(slides, SLIDE_COLUMNS)
        )
    if tiles:
        parts.append(f"{format_table(tiles)}\n\nand by name: {', '.join(PATTERNS)}")
    return "\n\n".join(reversed(parts))


def _format_cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value in (None, "") else str(value)


def make_random_batch(encoder: Encoder, count: int, side: int) -> tuple[torch.Tensor, float]:
    """Random tiles through the encoder's transform, and seconds per tile in one worker."""
    generator = np.random.default_rng(0)
    tiles = [generator.integers(0, 256, (side, side, 3), dtype=np.uint8) for _ in range(count)]
    encoder.transform(tiles[0])
    start = time.perf_counter()
    items = [encoder.transform(tile) for tile in tiles]
    return torch.stack(items), (time.perf_counter() - start) / count


def count_gflops(encoder: Encoder, batch: torch.Tensor) -> float | None:
    """GFLOPs per tile, a multiply-add as two; None for a classical descriptor."""
    if not any(True for _ in encoder.model.parameters()):
        return None
    # attention spelt out: fused kernels are not counted on every device
    with (
        FlopCounterMode(display=False) as counter,
        torch.inference_mode(),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        encoder.model(batch[:1])
    return counter.get_total_flops() / 1e9


@torch.inference_mode()
def measure_seconds(
    encoder: Encoder, batch: torch.Tensor, precision: str, rounds: int
) -> tuple[float, torch.Tensor]:
    """(median seconds a batch on its device, features), after one batch to warm up."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        with autocast(batch.device, precision):
            features = encoder.model(batch)
        if batch.device.type == "cuda":
            torch.cuda.synchronize(batch.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), features.float().cpu()


def check_encoder(config: Config) -> dict[str, Any]:
    """Build the encoder and measure it.

    Raises:
        UserError: it cannot be built, or its features are not finite or not of the table's width.
    """
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    encoder = build_encoder(config.encoder, config.weights, config.pool, config.layer)
    side = encoder.tile or 256
    batch, transformed = make_random_batch(encoder, config.batch_size, side)
    batch = batch.to(device)
    encoder.model.to(device, memory_format=torch.channels_last)
    counted = count_gflops(encoder, batch)
    elapsed, features = measure_seconds(encoder, batch, precision, config.rounds)
    if features.shape != (config.batch_size, encoder.dim) or not features.isfinite().all():
        raise UserError(
            f"encoder '{config.encoder}': expected finite features ({config.batch_size}, "
            f"{encoder.dim}) in {precision}, found "
            f"{tuple(features.shape)}, {int((~features.isfinite()).sum())} not finite; try "
            "precision=fp32"
        )
    return {
        "encoder": encoder.name,
        "dim": encoder.dim,
        "parameters": sum(parameter.numel() for parameter in encoder.model.parameters()),
        "gflops_a_tile": counted,
        "ms_a_tile": 1000 * elapsed / config.batch_size,
        "transform_ms_a_tile": 1000 * transformed,
        "tile": side,
        "device": str(device),
        "precision": precision,
        "batch_size": config.batch_size,
        "transform": encoder.provenance["transform"],
        "weights_sha256": encoder.provenance["weights_sha256"],
        "feature_mean_and_std": [float(features.mean()), float(features.std())],
    }


def main(config: Config) -> None:
    if config.encoder:
        result = check_encoder(config)
        lines = "\n".join(
            f"{name}: {round(value, 4) if isinstance(value, float) else value}"
            for name, value in result.items()
        )
        print(json.dumps(result, indent=2) if config.json else lines)
        return
    tiles = [] if config.kind == "slide" else make_table(config.match)
    slides = [] if config.kind == "tile" else make_slide_table(config.match)
    if not (tiles or slides):
        raise UserError(
            f"match='{config.match}': expected part of an encoder's name, found none with it; "
            "leave match empty"
        )
    print(json.dumps(tiles + slides, indent=2) if config.json else format_tables(tiles, slides))


if __name__ == "__main__":
    launch(main, Config)
