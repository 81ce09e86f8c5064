"""mil.benchmark in which one training kills its worker (see `dying_training`)."""

from __future__ import annotations

import mil.benchmark as benchmark
from mil.training import benchmark_jobs
from tests.mil.training.dying_training import train_or_die
from wsi_common.cli import launch

benchmark_jobs.train_job = train_or_die

if __name__ == "__main__":
    launch(benchmark.main, benchmark.Config)
