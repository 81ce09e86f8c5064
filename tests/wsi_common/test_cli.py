"""The way into a script: what a reader of its help that stops early leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from tests.helpers import ROOT
from wsi_common.cli import PostponedTermination, Terminated, run

SCRIPT = """
from dataclasses import dataclass
from wsi_common.cli import launch
from wsi_common.config import key

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


@dataclass
class Nothing:
    pass


def test_a_file_where_a_folder_should_be_is_one_line(tmp_path, capsys):
    file = tmp_path / "run"
    file.touch()
    assert run(lambda _: file.mkdir(parents=True, exist_ok=True), Nothing, []) == 2
    assert "run: expected a place that can be read and written" in capsys.readouterr().err


START = """
import ctypes, sys, time
from dataclasses import dataclass
from wsi_common.cli import launch

@dataclass
class Config:
    pass

def wait():
    print("ready", flush=True)
    time.sleep({seconds})

class Slow:
    def __del__(self):
        wait()

class Handle:
    @classmethod
    def from_param(cls, value):
        wait()
        return ctypes.c_int(value)

absolute = ctypes.CDLL(None).abs
absolute.argtypes = [Handle]

{main}
    time.sleep(30)

sys.modules["__main__"].__doc__ = "A script."
launch(main, Config)
"""
PLACES = {
    # Python drops what a finaliser raises
    "a finaliser": START.format(
        seconds=30, main="def main(config):\n    slow = Slow()\n    del slow"
    ),
    # ctypes makes an error of its own of what a conversion raises; some would go on after it
    "a conversion of ctypes": START.format(
        seconds=1,
        main="""
def main(config):
    try:
        absolute(-1)
    except ctypes.ArgumentError as error:
        print("lost", error, file=sys.stderr)""",
    ),
}


@pytest.mark.process
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("place", list(PLACES))
def test_a_signal_is_not_lost_in(place: str, number: int, status: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PLACES[place]],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, errors = process.communicate(timeout=25)
    assert process.returncode == status and errors.count("\n") == 1, errors


def test_a_postponed_signal_waits_for_the_end_of_the_block_and_a_second_one_does_not() -> None:
    def end(number: int, _: object) -> None:
        raise Terminated

    before, reached = signal.signal(signal.SIGTERM, end), []
    try:
        with pytest.raises(Terminated), PostponedTermination() as termination:
            assert not termination.came
            termination.end()
            os.kill(os.getpid(), signal.SIGTERM)
            assert termination.came
            reached.append("the end")
        assert signal.getsignal(signal.SIGTERM) is end
        with pytest.raises(Terminated), PostponedTermination():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            reached.append("too far")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert reached == ["the end"]


@pytest.mark.process
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_forked_process_without_a_handler_of_its_own_ends_without_a_word(
    number: int, status: int
) -> None:
    # what comes before a new process's first line is lost, by CPython
    fork = """def main(config):
    import os
    here, there = os.pipe()
    if not os.fork():
        os.write(there, b".")
        time.sleep(30)
    os.read(here, 1)
    wait()"""
    process = subprocess.Popen(
        [sys.executable, "-c", START.format(seconds=30, main=fork)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=25)
    assert process.returncode == status and errors.count("\n") == 1, errors
