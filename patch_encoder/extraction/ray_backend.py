"""A cohort on many GPUs or machines through Ray: free workers take the largest bundle of slides
that is left.

A worker that dies is replaced, and what it was at is done again; a bundle that goes on killing
workers is taken apart, and a slide that does so alone is listed.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from patch_encoder.cohort.shards import count_tiles, make_bundles
from patch_encoder.tiles.coordinates import SlideJob
from wsi_common.errors import UserError
from wsi_common.processes.pool import Lost, Raised
from wsi_common.processes.ray_cluster import RayPool, RaySettings
from wsi_common.progress import Progress

logger = logging.getLogger(__name__)
ATTEMPTS = 3  # a bundle that has killed so many workers is taken apart, a slide given up
HOPELESS = 3  # slides given up before anything was done: it is not for the slides
BUNDLES_A_WORKER = 4  # at least, as far as there are slides, so that workers end together


@dataclass(frozen=True)
class Report:
    """What was done: slides, tiles, seconds waited and in all, and what failed."""

    slides: int
    tiles: int
    waited: float
    busy: float
    failures: list[dict[str, str]]

    def __add__(self, other: Report) -> Report:
        numbers = (
            self.slides + other.slides,
            self.tiles + other.tiles,
            self.waited + other.waited,
            self.busy + other.busy,
        )
        return Report(*numbers, self.failures + other.failures)

    def summary(self, seconds: float) -> str:
        """One line for the log."""
        rate = self.tiles / seconds if seconds else 0.0
        share = self.waited / self.busy if self.busy else 0.0
        return (
            f"{self.slides - len(self.failures)} slides encoded, {len(self.failures)} failed; "
            f"{self.tiles} tiles in "
            f"{seconds:.1f} s, {rate:.1f} tiles/s, {share:.0%} of the time waiting for tiles"
        )


NOTHING = Report(0, 0, 0.0, 0.0, [])


def work_on_ray(
    jobs: Sequence[SlideJob],
    work: Callable[[list[SlideJob]], Report],
    settings: RaySettings,
    *,
    cpus: int,
    on_cuda: bool,
    least_tiles: int,
) -> Report:
    """Encode slides on the workers of a Ray cluster.

    Args:
        jobs: the slides.
        work: encodes a list of slides in one worker.
        settings: cluster and workers.
        cpus: CPUs of a worker where the settings leave them open.
        on_cuda: give each worker a GPU.
        least_tiles: tiles that a bundle has at least, where slides are small.

    Raises:
        UserError: no Ray, no cluster there, no room for a worker, or `work` raises one.
    """
    if not jobs:
        return NOTHING
    with closing(RayPool(work, settings, cpus=cpus, on_cuda=on_cuda)) as pool:
        least = min(least_tiles, math.ceil(count_tiles(jobs) / (BUNDLES_A_WORKER * pool.count)))
        return encode_bundles(pool, make_bundles(jobs, least))


def encode_bundles(pool: RayPool, waiting: list[list[SlideJob]]) -> Report:
    """Have the workers encode bundles of slides, each at most `ATTEMPTS` times."""
    report = NOTHING
    queue = deque((bundle, 0) for bundle in waiting)  # with the workers that died over it
    running: dict[int, tuple[list[SlideJob], int]] = {}
    workers = min(pool.count, len(waiting))
    logger.info("engine=ray: %d workers, %d bundles of slides", workers, len(waiting))
    with Progress("features", sum(map(count_tiles, waiting)), "tiles") as bar:
        submitted = 0
        while queue or running:
            while queue and pool.room:
                running[submitted] = queue.popleft()
                pool.submit(submitted, running[submitted][0])
                submitted += 1
            for number, result in pool.wait():
                bundle, died = running.pop(number)
                if isinstance(result, Lost):
                    again, found = after_death(bundle, died + 1, result.reason)
                    queue.extendleft(reversed(again))
                else:
                    found = report_of(result)
                report += found
                if len(report.failures) == report.slides == HOPELESS and all(
                    "died" in row["error"] for row in report.failures
                ):
                    raise UserError(
                        f"engine=ray: {report.failures[-1]['error']}; lower batch_size or workers"
                    )
                bar.advance(found.tiles)
    return report


def report_of(result: Any) -> Report:
    """What a worker reports; raises what `work` raised there."""
    if isinstance(result, Raised):
        if result.by_user:
            raise UserError(result.reason)
        raise RuntimeError(f"a worker of Ray raised\n{result.traceback}")
    return result


def after_death(
    bundle: list[SlideJob], died: int, reason: str
) -> tuple[list[tuple[list[SlideJob], int]], Report]:
    """What is left of a bundle after its worker died (with deaths), and what is given up."""
    names = ", ".join(job.slide_id for job in bundle[:3])
    if died < ATTEMPTS:
        logger.warning(
            "engine=ray: a worker died, its slides are done again: %s%s",
            names,
            ", ..." * (len(bundle) > 3),
        )
        return [(bundle, died)], NOTHING
    if len(bundle) > 1:
        logger.warning(
            "engine=ray: %d workers died over %d slides, each is now done alone: %s",
            died,
            len(bundle),
            names,
        )
        # one more try each: the one among them that kills has had its others
        return [([job], ATTEMPTS - 1) for job in bundle], NOTHING
    error = f"{died} workers of Ray died over it, the last: {reason}"
    return [], Report(
        1,
        count_tiles(bundle),
        0.0,
        0.0,
        [{"slide": names, "stage": "extract_features", "error": error}],
    )
