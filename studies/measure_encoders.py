"""What teacher and student cost, measured in one run: GFLOPs, parameters, tiles per second.

    python -m studies.measure_encoders slides=... coords=... encoders=[stain_texture] student=...
    output=cost.json ... encoders='[resnet50=random layer=2, dinov2_vitb14=weights.safetensors
    pool=mean crop=false]'

Every encoder goes over the same tiles of the cohort in turn, several rounds, decoding included, so
that a machine that is busy for a while is busy for all of them; the median round counts. Students
that differ in weights and adapter alone are timed once: a difference of adapters is smaller than
the noise of a clock.
"""

from __future__ import annotations

import logging
import re
import statistics
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from detection_kd.models.student import Student
from detection_kd.models.student_onnx import load_students
from patch_encoder.cohort.failures import Failures
from patch_encoder.extraction.loop import ExtractSettings, cohort_jobs, encoded, tile_batches
from patch_encoder.extraction.network import Network
from patch_encoder.extraction.tile_batches import TileSequence
from patch_encoder.models.encoders import Encoder, build_encoder
from patch_encoder.models.pooling import POOLS
from patch_encoder.tiles.coordinates import Coordinates, SlideJob
from wsi_common.cli import launch
from wsi_common.config import REQUIRED, key
from wsi_common.device import PRECISIONS, pick_device, pick_precision
from wsi_common.errors import UserError
from wsi_common.files import read_json, sha256_bytes, write_json
from wsi_common.provenance import can_reuse, unknown_origin

logger = logging.getLogger(__name__)
SHOWN = ("tiles_per_second", "parameters", "dim")  # of a cost, in the log
READERS: dict[str, dict[str, Any]] = {
    "pool": {name: name for name in POOLS},
    "layer": {str(layer): layer for layer in range(5)},
    "crop": {"true": True, "false": False},
}
OPTION = re.compile(rf"\s+({'|'.join(READERS)})=(\S*)\s*$")


@dataclass
class Config:
    """Keys of the cost measurement."""

    slides: str = key(REQUIRED, "slide file, or folder tree of slides", path=True)
    coords: str = key(REQUIRED, "folder of coordinates files", path=True)
    output: str = key(
        REQUIRED, "where the results are written; a JSON file, kept when it is there", runtime=True
    )
    encoders: list[str] = key(
        [], "encoders, as name or name=weights; then pool=..., layer=..., crop=... after spaces"
    )
    student: list[str] = key(
        [],
        "checkpoint of train_d2vfm; or an .onnx file of export_student; several as name=checkpoint",
    )
    labels: str = key("", "labels.csv of the cohort", path=True)
    tiles_per_round: int = key(512, "tiles a round")
    rounds: int = key(3, "timed rounds, of which the median counts")
    batch_size: int = key(64, "items per step over all processes; tiles")
    workers: int = key(2, "worker processes; they decode tiles")
    device: str = key("auto", "auto, cpu, cuda or cuda:N")
    precision: str = key(
        "auto",
        "number format of the computation; auto: bf16 where the device has it in "
        "hardware, else fp32",
        choices=PRECISIONS,
    )
    overwrite: bool = key(False, "replace results of other settings or inputs", runtime=True)


def build_model(config: Config) -> list[Encoder]:
    """All encoders to be compared."""
    encoders = [build_from_spec(spec) for spec in config.encoders]
    encoders += load_students(config.student, pick_device(config.device))
    if not encoders:
        raise UserError("expected encoders=[...] or student=..., found neither")
    names = [encoder.name for encoder in encoders]
    if len(set(names)) < len(names):
        raise UserError(
            f"measure_encoders: expected encoders of different names, found {names}; the table "
            "has one row a name"
        )
    return encoders


def build_from_spec(spec: str) -> Encoder:
    """The encoder of `name[=weights] [pool=...] [layer=...] [crop=true|false]`; a path to weights
    may hold spaces.
    """
    options: dict[str, Any] = {}
    while match := OPTION.search(spec):
        spec, (name, text) = spec[: match.start()], match.groups()
        if text not in READERS[name]:
            raise UserError(
                f"encoders: {name} expected one of {', '.join(READERS[name])}, found '{text}'"
            )
        options[name] = READERS[name][text]
    return build_encoder(*spec.strip().split("=", 1), **options)


def describe_work(encoder: Encoder) -> str:
    """Equal for students that differ in weights and adapter alone, and so run for the same time."""
    network = getattr(encoder.model, "network", None)
    if not isinstance(network, Student):
        return encoder.name
    pooling, scale = network.pooling.kind, network.input_scale
    return repr((network.backbone.describe(), network.stages, pooling, scale))


def take_first_tiles(jobs: list[SlideJob], count: int) -> list[SlideJob]:
    """The jobs cut down to `count` tiles in all, an equal share from each slide."""
    share = -(-count // len(jobs))
    cut, left = [], count
    for job in jobs:
        coords = job.coordinates.coords[: min(share, left)]
        left -= len(coords)
        if len(coords):
            cut.append(replace(job, coordinates=Coordinates(coords, job.coordinates.geometry)))
    return cut


def count_gflops(encoder: Encoder, jobs: list[SlideJob]) -> float | None:
    """10^9 floating-point operations a tile (a multiply-add counts as two); None for a classical
    descriptor.
    """
    if not any(True for _ in encoder.model.parameters()):
        return None
    _, item = TileSequence(jobs, encoder.transform)[0]
    assert isinstance(item, torch.Tensor), item
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        encoder.model.cpu()(item[None])
    return counter.get_total_flops() / 1e9


def time_round(encoder: Encoder, jobs: list[SlideJob], settings: ExtractSettings) -> float:
    """Tiles per second, from the slide files to features in memory."""
    sequence = TileSequence(jobs, encoder.transform)
    network = Network(encoder.model, settings.device, settings.precision, settings.batch_size)
    start = time.perf_counter()
    for _ in encoded(tile_batches(sequence, settings), network, settings.dtype):
        pass
    return len(sequence) / (time.perf_counter() - start)


def name_record(output: Path) -> Path:
    """The file beside the costs that says what they were measured with."""
    return output.with_suffix(".made_from.json")


def describe_inputs(
    config: Config, encoders: list[Encoder], jobs: list[SlideJob], settings: ExtractSettings
) -> dict[str, Any]:
    """What decides the figures: encoders with their weights, tiles, and how they are run."""
    tiles = (f"{job.slide_id}:{job.coordinates.digest()}\n".encode() for job in jobs)
    return {
        "encoders": {encoder.name: encoder.provenance for encoder in encoders},
        "tiles": sha256_bytes(*tiles),
        "rounds": config.rounds,
        "batch_size": settings.batch_size,
        "workers": settings.workers,
        "device": str(settings.device),
        "precision": settings.precision,
    }


def is_done(output: Path, made_from: dict[str, Any], overwrite: bool) -> bool:
    """Whether the costs were measured with the same.

    Raises:
        UserError: with something else, or nobody knows with what.
    """
    record = name_record(output)
    if output.is_file() and not record.is_file() and not overwrite:
        raise unknown_origin(output, "encoder costs", record.name)
    read = partial(read_json, record, "the record of a cost measurement")
    return can_reuse(output, read, made_from, "other encoder costs", overwrite=overwrite)


def main(config: Config) -> None:
    output = Path(config.output)
    device = pick_device(config.device)
    precision = pick_precision(config.precision, device)
    settings = ExtractSettings(device, precision, config.batch_size, config.workers)
    failures = Failures("measure_encoders")
    jobs = cohort_jobs(config.slides, config.coords, config.labels, failures)
    jobs = take_first_tiles(jobs, config.tiles_per_round)
    encoders = build_model(config)
    made_from = describe_inputs(config, encoders, jobs, settings)
    if is_done(output, made_from, config.overwrite):
        logger.info("measure_encoders: %s is there already", output)
        return
    timed: dict[str, Encoder] = {}
    for encoder in encoders:
        timed.setdefault(describe_work(encoder), encoder)  # the first of each kind
    rates: dict[str, list[float]] = {work: [] for work in timed}
    for encoder in timed.values():
        time_round(encoder, take_first_tiles(jobs, config.batch_size), settings)  # warms up
    for _ in range(config.rounds):
        for work, encoder in timed.items():
            rates[work].append(time_round(encoder, jobs, settings))
    costs = {}
    for encoder in encoders:
        costs[encoder.name] = {
            "gflops": count_gflops(encoder, jobs),
            "parameters": sum(parameter.numel() for parameter in encoder.model.parameters()),
            "tiles_per_second": statistics.median(rates[describe_work(encoder)]),
            "dim": encoder.dim,
            "precision": settings.precision,
            "device": str(device),
        }
        line = "%s: %.1f tiles/s, %d parameters, width %d"
        logger.info(line, encoder.name, *(costs[encoder.name][name] for name in SHOWN))
    write_json(name_record(output), made_from)
    write_json(output, costs)


if __name__ == "__main__":
    launch(main, Config)
