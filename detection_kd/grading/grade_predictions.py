"""What a grading network says about every patch of a set, and the table of it that a run leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64

from detection_kd.evaluation.grading_metrics import GradedRun, grade_metrics
from detection_kd.graded_patches.graded_set import GradedSet
from detection_kd.graded_patches.patch_loader import make_patch_loader
from detection_kd.graded_patches.patch_pixels import PatchPixels
from detection_kd.graded_patches.resolution import reduce_resolution
from detection_kd.models.low_resolution import GradingNetwork
from wsi_common.device import autocast
from wsi_common.distributed import World, gather_objects
from wsi_common.files import write_csv
from wsi_common.progress import progress

COLUMNS = ("patch", "slide", "case", "target", "called")
"""Of predictions.csv, before the probability of each grade."""


@torch.inference_mode()
def predict_grades(
    network: GradingNetwork,
    pixels: PatchPixels,
    world: World,
    *,
    batch_size: int,
    precision: str,
    workers: int,
    label: str,
) -> Float64[np.ndarray, "n c"]:
    """Probability of every grade for all patches, in their order; every process predicts its share
    and gets the predictions of all.

    Args:
        network: the plain network, at its own resolution.
        pixels: of the patches, at full resolution.
        world: this process.
        batch_size: patches at a time over all processes.
        precision, workers: as resolved from the keys of a script.
        label: of the progress bar.
    """
    network.eval()
    order = np.arange(len(pixels.patches))
    batches = make_patch_loader(pixels, order, batch_size, world, workers=workers)
    samples, found = [np.zeros(0, np.int64)], [np.zeros((0, len(network.grades)))]
    steps = -(-len(order) // batch_size)
    for batch in progress(batches, label, steps, "batch", enabled=world.is_main):
        view = batch.pixels.to(world.device).float() / 255
        own = reduce_resolution(view, network.scale.ratio)
        with autocast(world.device, precision):
            logits = network(own.contiguous(memory_format=torch.channels_last)).logits
        samples.append(batch.draws.samples)
        found.append(logits.double().softmax(1).cpu().numpy())
    parts: Any = gather_objects((np.concatenate(samples), np.concatenate(found)))
    place = np.argsort(np.concatenate([part[0] for part in parts]))
    return np.concatenate([part[1] for part in parts])[place]


def measure_predictions(
    patches: GradedSet, probabilities: Float64[np.ndarray, "n c"]
) -> dict[str, float]:
    """Every metric of `grading_metrics`; the called grade is the most probable one."""
    called = probabilities.argmax(1)
    run = GradedRun(0, 0, patches.cases, patches.labels, called, len(patches.grades))
    return {name: float(value[0]) for name, value in grade_metrics(run).items()}


def write_predictions(
    path: Path, patches: GradedSet, probabilities: Float64[np.ndarray, "n c"]
) -> None:
    """The table of all patches: names of the true and the called grade, and probabilities."""
    rows = [
        dict(
            zip(
                (*COLUMNS, *patches.grades),
                (
                    *(name, patch.slide, patch.case),
                    patches.grades[patch.label],
                    patches.grades[int(own.argmax())],
                    *(repr(value) for value in own.tolist()),
                ),
            )
        )
        for name, patch, own in zip(patches.names, patches.patches, probabilities, strict=True)
    ]
    write_csv(path, (*COLUMNS, *patches.grades), rows)
