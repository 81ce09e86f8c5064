"""mil.benchmark in which one training kills the process that it runs in, as running out of memory
does.
"""

from __future__ import annotations

import signal
from typing import Any

import mil.benchmark as benchmark
from common.cli import launch
from tests.helpers import die

trained = benchmark.run_job


def dies(job: Any, run: Any, world: Any) -> Any:
    """`run_job`, unless the job is the one that kills."""
    if job.output.match("max/seed1_fold1"):
        die(signal.SIGKILL)
    return trained(job, run, world)


benchmark.run_job = dies  # in workers too: they import the main module anew

if __name__ == "__main__":
    launch(benchmark.main, benchmark.Config)
