"""The way into a script: what a reader of its help that stops early leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.helpers import ROOT

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


FINALISER = """
import sys, time
from dataclasses import dataclass
from common.cli import launch

@dataclass
class Config:
    pass

class Slow:
    def __del__(self):
        print("ready", flush=True)
        time.sleep(30)

def main(config):
    slow = Slow()
    del slow
    time.sleep(30)

sys.modules["__main__"].__doc__ = "A script."
launch(main, Config)
"""


@pytest.mark.process
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_inside_of_a_finaliser_is_not_lost(number: int, status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", FINALISER],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=25)
    assert process.returncode == status and errors.count("\n") == 1, errors
