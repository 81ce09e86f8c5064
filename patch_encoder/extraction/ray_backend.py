"""A cohort on many GPUs or machines through Ray: free workers take the largest bundle of slides
that is left.

A worker that dies is replaced, and what it was at is done again; a bundle that goes on killing
workers is taken apart, and a slide that does so alone is listed. Slides, coordinates and output are
reached by the same paths on every machine, and the repository lies at the same place.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.progress import Progress
from patch_encoder.cohort.shards import count_tiles, make_bundles
from patch_encoder.extraction.tile_batches import SlideJob

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
ATTEMPTS = 3  # a bundle that has killed so many workers is taken apart, a slide given up
HOPELESS = 3  # slides given up before anything was done: it is not for the slides
BUNDLES_A_WORKER = 4  # at least, as far as there are slides, so that workers end together


@dataclass(frozen=True)
class RaySettings:
    """Where Ray's workers run.

    Attributes:
        address: of a running cluster (`auto`, `host:6379`); empty: RAY_ADDRESS, else one on this
            machine for this run.
        workers: how many; 0: one a GPU, or as many as the CPUs allow.
        cpus: CPUs of each.
    """

    address: str
    workers: int
    cpus: int


@dataclass(frozen=True)
class Report:
    """What was done: slides, tiles, seconds spent waiting for tiles out of seconds of the loop, and
    what failed.
    """

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


def import_ray() -> Any:
    """The package, or one line that says how to get it."""
    try:
        import ray
    except ImportError:
        raise UserError(
            "engine=ray: expected the package ray, found none; pip install 'ray>=2.40,<3', or set "
            "engine=local"
        ) from None
    return ray


def work_on_ray(
    jobs: Sequence[SlideJob],
    work: Callable[[list[SlideJob]], Report],
    settings: RaySettings,
    *,
    on_cuda: bool,
    least_tiles: int,
) -> Report:
    """`work` on all jobs, by as many workers as the cluster has room for.

    Args:
        jobs: the slides.
        work: encodes a list of slides in one worker.
        settings: cluster and workers.
        on_cuda: give each worker a GPU.
        least_tiles: of a bundle, where slides are small.

    Raises:
        UserError: no Ray, no cluster there, no room for a worker, or `work` raises one.
    """
    if not jobs:
        return NOTHING
    ray = import_ray()
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    try:
        ray.init(
            settings.address or None,
            runtime_env=environment,
            include_dashboard=None,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UserError(
            f"engine=ray: cannot reach a cluster at '{settings.address}': {_line(error)}; start one"
        ) from None
    try:
        count = _worker_count(ray.cluster_resources(), settings, on_cuda)
        least = min(least_tiles, math.ceil(count_tiles(jobs) / (BUNDLES_A_WORKER * count)))
        return _Pool(ray, work, settings.cpus, on_cuda).run(make_bundles(jobs, least), count)
    finally:
        ray.shutdown()


def _worker_count(resources: dict[str, float], settings: RaySettings, on_cuda: bool) -> int:
    room = int(resources.get("CPU", 0)) // max(1, settings.cpus)
    if on_cuda:
        room = min(room, int(resources.get("GPU", 0)))
    if room < max(1, settings.workers):
        needed = f"{settings.cpus} CPUs" + (" and a GPU" if on_cuda else "")
        found = ", ".join(f"{resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
        raise UserError(
            f"engine=ray: expected room for {max(1, settings.workers)} workers of {needed}, found "
            f"{found}; "
            "lower ray_workers or ray_cpus"
        )
    return settings.workers or room


class _Worker:
    """What runs in each of Ray's processes."""

    def __init__(self, work: Callable[[list[SlideJob]], Report]) -> None:
        self._work = work

    def run(self, jobs: list[SlideJob]) -> Report:
        return self._work(jobs)


class _Pool:
    """Workers of a running cluster; each has one bundle at a time."""

    def __init__(
        self, ray: Any, work: Callable[[list[SlideJob]], Report], cpus: int, on_cuda: bool
    ) -> None:
        self.ray = ray
        self._actor = ray.remote(num_cpus=cpus, num_gpus=int(on_cuda))(_Worker)
        self._work = ray.put(work)  # the encoder travels once a machine

    def run(self, waiting: list[list[SlideJob]], count: int) -> Report:
        report = NOTHING
        queue = deque((bundle, 0) for bundle in waiting)  # with the workers that died over it
        running: dict[Any, tuple[list[SlideJob], int, Any]] = {}
        idle = [self._actor.remote(self._work) for _ in range(min(count, len(waiting)))]
        logger.info("engine=ray: %d workers, %d bundles of slides", len(idle), len(queue))
        with Progress("features", sum(map(count_tiles, waiting)), "tiles") as bar:
            while queue or running:
                while queue and idle:
                    (bundle, died), worker = queue.popleft(), idle.pop()
                    running[worker.run.remote(bundle)] = bundle, died, worker
                (done, *_), _ = self.ray.wait(list(running))
                bundle, died, worker = running.pop(done)
                found = self._result(done)
                if isinstance(found, str):
                    self.ray.kill(worker)
                    worker = self._actor.remote(self._work)
                    again, found = after_death(bundle, died + 1, found)
                    queue.extendleft(reversed(again))
                report += found
                if len(report.failures) == report.slides == HOPELESS and all(
                    "died" in row["error"] for row in report.failures
                ):
                    raise UserError(
                        f"engine=ray: {report.failures[-1]['error']}; lower batch_size or workers"
                    )
                bar.advance(found.tiles)
                idle.append(worker)
        return report

    def _result(self, reference: Any) -> Report | str:
        """What a worker gives back, the reason when it died."""
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise UserError(str(error.cause)) from None
            raise
        except self.ray.exceptions.RayActorError as error:
            return _line(error)


def after_death(
    bundle: list[SlideJob], died: int, reason: str
) -> tuple[list[tuple[list[SlideJob], int]], Report]:
    """What is left to do of a bundle that so many workers died over, each with its count of deaths,
    and what is given up.
    """
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


def _line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
