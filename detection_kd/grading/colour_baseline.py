"""What colour alone tells about the grades of a set: the row that a table of networks needs.

Stain and scanner can tell grades apart without a look at any shape. The baseline is the linear
probe of `patch_encoder.probing` on 33 colour numbers per patch: means, standard deviations and
histograms of the channels, of the pixels that a network of the same ratio sees. It learns from the
training patches of a run, and calls its test patches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int64

from detection_kd.evaluation.grading_metrics import GradedRun
from detection_kd.graded_patches.keys import GradedSetKeys, read_graded_split
from detection_kd.graded_patches.patch_pixels import CHUNK, PatchPixels
from detection_kd.graded_patches.resolution import reduce_resolution
from detection_kd.graded_patches.splits import GradedSplit
from detection_kd.grading.arms import PLAIN, ArmName, GraderRun
from patch_encoder.descriptors.colour_statistics import colour_statistics
from patch_encoder.probing.linear import linear_probe
from wsi_common.checkpoint import load_checkpoint
from wsi_common.errors import UserError

COLOUR = "33 colour numbers"


def name_colour(ratio: int) -> ArmName:
    """The arm of the baseline at a ratio."""
    return ArmName(ratio, "full" if ratio == 1 else "native", COLOUR, PLAIN)


def read_settings(run: GraderRun) -> dict[str, Any]:
    """The settings of a run's graded data, from its checkpoint: `data`, `split_seed`,
    `tile_size`.
    """
    training = load_checkpoint(run.checkpoint)["config"]["training"]
    settings = {name: training[name] for name in ("split_seed", "tile_size")}
    return {**settings, "data": {**training["data"], "ungraded": ""}}


def read_split_of(run: GraderRun, settings: Mapping[str, Any]) -> GradedSplit:
    """The patches of a run.

    Args:
        run: whose test patches they have to be.
        settings: of its data.

    Raises:
        UserError: the data is not there any more, or its test patches are others now.
    """
    split = read_graded_split(GradedSetKeys(**settings["data"]), settings["split_seed"])
    pairs = zip(split.test.slides.tolist(), split.test.names, strict=True)
    if tuple(f"{slide}/{name}" for slide, name in pairs) != run.patches:
        raise UserError(
            f"{settings['data']['source']}: expected the test patches of {run.path}, found others; "
            "put them back, or set attention=0 colour=false"
        )
    return split


def grade_by_colour(runs: Iterable[GraderRun], ratio: int) -> list[GradedRun]:
    """Calls of the baseline for every seed and fold of these runs.

    Args:
        runs: of one set.
        ratio: pixels at full resolution per pixel that counts, along a side.

    Raises:
        UserError: as for `read_split_of`.
    """
    firsts: dict[tuple[int, int], GraderRun] = {}
    for run in runs:
        firsts.setdefault((run.graded.seed, run.graded.fold), run)
    known: dict[str, Int64[np.ndarray, " s"]] = {}
    found = []
    for (seed, fold), run in firsts.items():
        settings = read_settings(run)
        same = repr(settings)  # seeds that share their patches share their baseline
        if same not in known:
            known[same] = _call(read_split_of(run, settings), settings["tile_size"], ratio)
        graded = run.graded
        found.append(
            GradedRun(seed, fold, graded.cases, graded.targets, known[same], graded.grades)
        )
    return found


def _call(split: GradedSplit, side: int, ratio: int) -> Int64[np.ndarray, " s"]:
    train, test = (
        describe_colours(PatchPixels(own, side), ratio) for own in (split.train, split.test)
    )
    return linear_probe(train, split.train.labels, test, split.train.cases)[0].argmax(1)


def describe_colours(pixels: PatchPixels, ratio: int) -> Float[np.ndarray, "n 33"]:
    """The colour numbers of every patch, reduced by `ratio`."""
    rows = []
    for start in range(0, len(pixels.patches), CHUNK):
        numbers = np.arange(start, min(start + CHUNK, len(pixels.patches)))
        views = reduce_resolution(pixels.read(numbers).float(), ratio).round().byte()
        rows += [colour_statistics(v) for v in views.permute(0, 2, 3, 1).contiguous().numpy()]
    return np.stack(rows)
