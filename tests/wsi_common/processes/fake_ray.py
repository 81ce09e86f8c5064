"""What `RayPool` uses of Ray, in this process: a worker dies when its job raises SystemExit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any


class FakeRay:
    """Stands in for the package `ray`.

    Args:
        resources: of the cluster.

    Attributes:
        killed: workers that were ended.
        shut: how often the cluster was left.
        options: of the workers.
    """

    class exceptions:
        """The three that are told apart."""

        class RayError(Exception):
            pass

        class RayActorError(RayError):
            pass

        class RayTaskError(RayError):
            pass

    def __init__(self, resources: dict[str, float]) -> None:
        self.resources = resources
        self.killed = self.shut = 0
        self.options: dict[str, int] = {}

    def init(self, address: str | None, **_: object) -> None:
        """Connect."""

    def shutdown(self) -> None:
        """Disconnect."""
        self.shut += 1

    def cluster_resources(self) -> dict[str, float]:
        """CPUs and GPUs."""
        return self.resources

    def put(self, value: object) -> object:
        """An object for all workers."""
        return value

    def remote(self, **options: int) -> Callable[[type], Any]:
        """Make a class one of workers."""
        self.options = options

        def wrap(worker: type) -> SimpleNamespace:
            def start(*arguments: Any) -> SimpleNamespace:
                run = worker(*arguments).run
                return SimpleNamespace(run=SimpleNamespace(remote=lambda job: partial(run, job)))

            return SimpleNamespace(remote=start)

        return wrap

    def wait(self, references: list[Any]) -> tuple[list[Any], list[Any]]:
        """The first has ended."""
        return references[:1], references[1:]

    def get(self, reference: Callable[[], Any]) -> Any:
        """A result."""
        try:
            return reference()
        except SystemExit as error:
            raise self.exceptions.RayActorError(f"actor died\n{error}") from None

    def kill(self, worker: object) -> None:
        """End a worker."""
        self.killed += 1
