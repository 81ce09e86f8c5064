"""The program that stands for `python` behaves as it does, also when it is killed."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.process


def test_folder_variables_streams_and_status_are_the_caller_s(
    warm_python: Path, tmp_path: Path
) -> None:
    code = "import os, sys; print(os.getcwd(), os.environ['GIVEN'], sys.argv[1], sys.stdin.read())"
    done = subprocess.run(
        [warm_python, "-c", f"{code}; sys.exit(3)", "argument"],
        cwd=tmp_path,
        env={"GIVEN": "value"},
        input="text",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (3, "")
    assert done.stdout == f"{tmp_path} value argument text\n"
    for command, status in (("raise ValueError", 1), ("import os; os.kill(os.getpid(), 9)", 137)):
        done = subprocess.run([warm_python, "-c", command], capture_output=True, check=False)
        assert done.returncode == status


def test_what_it_started_dies_with_it(warm_python: Path) -> None:
    code = "import os, time; print(os.getpid(), os.fork(), flush=True); time.sleep(60)"
    process = subprocess.Popen([warm_python, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    numbers = {int(word) for _ in range(2) for word in process.stdout.readline().split()} - {0}
    assert len(numbers) == 2
    process.kill()
    process.communicate(timeout=60)  # the ends of its streams are closed
    deadline = time.monotonic() + 60
    while alive(numbers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(numbers)


def alive(numbers: set[int]) -> list[int]:
    """Those of the processes that run; one that nobody has waited for yet does not."""
    return [
        number
        for number in numbers
        if os.path.exists(f"/proc/{number}")
        and Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    ]
