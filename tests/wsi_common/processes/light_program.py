"""A program that runs jobs in fresh workers and says each time that it is imported."""

from __future__ import annotations

import os

from tests.wsi_common.processes.plain_jobs import tenfold
from wsi_common.processes.pool import run_jobs

os.write(1, b"imported\n")

if __name__ == "__main__":
    for number, result in run_jobs(tenfold, [1, 2, 3], 2, fresh=True):
        os.write(1, f"{number} {result}\n".encode())
