"""The way into a script: what a reader of its help that stops early leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys

SCRIPT = """
from dataclasses import dataclass
from common.cli import launch
from common.config import key

@dataclass
class Config:
    output: str = key("", "where the results are written")

launch(lambda config: 0, Config)
"""


def test_help_into_a_reader_that_stops_early_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)  # as `| head` does once it has its lines
    try:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, "--help"],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
