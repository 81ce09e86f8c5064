"""Runs jobs on the workers of a Ray cluster, of one machine or many, in the manner of `Pool`.

A worker that dies is replaced and its job comes back as `Lost`, so that the caller may submit it
again. Data and outputs are reached by the same absolute paths on every machine, and the repository
lies at the same place. Ray is an optional dependency.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wsi_common.config import key
from wsi_common.errors import UserError
from wsi_common.processes.pool import Lost, call, leave_without_gpu

logger = logging.getLogger(__name__)
ROOT = Path(__file__).resolve().parents[2]
ENGINES = ("local", "ray")
ENGINE_HELP = "local: this machine; ray: the GPUs and machines of a Ray cluster"


@dataclass
class RaySettings:
    """Where Ray's workers run."""

    address: str = key(
        "",
        "a running cluster (auto, host:6379); empty: RAY_ADDRESS, else this machine",
        runtime=True,
    )
    workers: int = key(0, "workers; 0: one per GPU, or as many as there are CPUs for", runtime=True)
    cpus: int = key(
        0, "CPUs of a worker; 0: one for each of its threads and processes", runtime=True
    )


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


class RayPool:
    """Workers of a cluster, which are started when there are jobs for them.

    Args:
        function: job -> result; it is picklable and travels once to each machine.
        settings: cluster and workers.
        cpus: CPUs of a worker where the settings leave them open.
        on_cuda: give each worker a GPU of its own, which it calls `cuda`.
        threads: torch threads of each worker; 0: as many as its CPUs.

    Attributes:
        count: workers, at most.

    Raises:
        UserError: no Ray, no cluster there, or no room for the workers.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        settings: RaySettings,
        *,
        cpus: int,
        on_cuda: bool,
        threads: int = 0,
    ) -> None:
        self._ray = import_ray()
        self._running: dict[Any, tuple[int, Any]] = {}  # reference of a result -> key, worker
        self._idle: list[Any] = []
        self._connect(settings.address)
        cpus = settings.cpus or cpus
        try:
            resources = self._ray.cluster_resources()
            self.count = worker_count(resources, settings.workers, cpus, on_cuda=on_cuda)
            self._actor = self._ray.remote(num_cpus=cpus, num_gpus=int(on_cuda))(_RayWorker)
            self._arguments = self._ray.put(function), threads
        except BaseException:
            self.close()
            raise

    @property
    def room(self) -> int:
        """Jobs that can be submitted now."""
        return self.count - len(self._running)

    @property
    def busy(self) -> int:
        """Jobs whose result has not come."""
        return len(self._running)

    def submit(self, key: int, job: Any) -> None:
        """Give a job to an idle worker, or to a new one."""
        worker = self._idle.pop() if self._idle else self._actor.remote(*self._arguments)
        self._running[worker.run.remote(job)] = key, worker

    def wait(self) -> list[tuple[int, Any]]:
        """(key, result or Raised or Lost) of a job that has ended."""
        (reference, *_), _ = self._ray.wait(list(self._running))
        key, worker = self._running.pop(reference)
        try:
            result = self._ray.get(reference)
        except self._ray.exceptions.RayTaskError:  # not of the job, whose errors are `Raised`
            raise
        except self._ray.exceptions.RayError as error:
            self._ray.kill(worker)
            return [(key, Lost(_first_line(error)))]
        self._idle.append(worker)
        return [(key, result)]

    def close(self) -> None:
        """Leave the cluster, which ends the workers."""
        self._ray.shutdown()

    def _connect(self, address: str) -> None:
        try:
            self._ray.init(
                address or None,
                runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}},
                include_dashboard=None,
                logging_level=logging.WARNING,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"engine=ray: cannot reach a cluster at '{address}': {_first_line(error)}; "
                "start one"
            ) from None


def worker_count(resources: dict[str, float], wanted: int, cpus: int, *, on_cuda: bool) -> int:
    """How many workers a cluster with these resources has room for, or the number that is wanted.

    Raises:
        UserError: that is more than there is room for.
    """
    room = int(resources.get("CPU", 0)) // max(1, cpus)
    if on_cuda:
        room = min(room, int(resources.get("GPU", 0)))
    if room < max(1, wanted):
        needed = f"{cpus} CPUs" + (" and a GPU" if on_cuda else "")
        found = ", ".join(f"{resources.get(name, 0):g} {name}s" for name in ("CPU", "GPU"))
        raise UserError(
            f"engine=ray: expected room for {max(1, wanted)} workers of {needed}, found {found}; "
            "lower ray.workers or ray.cpus"
        )
    return wanted or room


class _RayWorker:
    """What runs in each process of Ray."""

    def __init__(self, function: Callable[[Any], Any], threads: int) -> None:
        self._function = function
        if threads:
            torch.set_num_threads(threads)

    def run(self, job: Any) -> Any:
        """The job's result, or `Raised`."""
        result = call(self._function, job)
        leave_without_gpu(result)
        return result


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
