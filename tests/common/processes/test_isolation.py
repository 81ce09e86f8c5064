"""Processes that really die or hang: what they were at is known, the others go on, nothing is left
behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.processes.isolation import Lost, Mapped, Pool, Raised, alive, check_workers, isolated
from tests.helpers import children, die

pytestmark = pytest.mark.process


def misbehave(job: str) -> str:
    """A job by its name."""
    kind, _, rest = job.partition(" ")
    if kind == "signal":
        die(int(rest))
    elif kind == "sleep":
        time.sleep(float(rest))
    elif kind == "exit":
        os._exit(int(rest))
    elif kind == "raise":
        raise UserError(rest) if rest.startswith("expected") else KeyError(rest)
    elif kind == "steps":  # longer than any timeout here, but alive
        for _ in range(int(rest)):
            time.sleep(0.1)
            alive()
    return f"{job} done"


def outcomes(jobs: list[str], workers: int, timeout: float = 60.0) -> list[object]:
    before = children()
    found = dict(isolated(misbehave, jobs, workers, timeout))
    assert children() == before, "no process is left"
    assert sorted(found) == list(range(len(jobs)))
    return [getattr(found[number], "reason", found[number]) for number in range(len(jobs))]


def test_one_that_dies_takes_no_other_with_it(caplog: pytest.LogCaptureFixture) -> None:
    jobs = [
        "a",
        f"signal {signal.SIGSEGV:d}",
        "b",
        f"signal {signal.SIGKILL:d}",
        "exit 3",
        "c",
        f"signal {signal.SIGABRT:d}",
    ]
    found = outcomes(jobs, 2)
    assert found[0::2] == [
        "a done",
        "b done",
        "the reader ended with status 3",
        "the reader crashed (signal 6, SIGABRT)",
    ]
    assert found[1] == "the reader crashed (signal 11, SIGSEGV)"
    assert found[3] == "the reader was killed (signal 9, SIGKILL: out of memory?)"
    again = [
        record.getMessage() for record in caplog.records if "tried once more" in record.getMessage()
    ]
    assert len(again) == 4, "each had a second try"


def test_one_that_hangs_is_given_up_and_one_that_is_slow_is_not() -> None:
    start = time.monotonic()
    found = outcomes(["sleep 60", "a", "steps 14", "b"], 2, timeout=0.7)
    assert found == ["the reader did not answer for 0.7 s", "a done", "steps 14 done", "b done"]
    assert 1.4 < time.monotonic() - start < 15, "two tries"


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_job_raises_is_its_result(workers: int, caplog: pytest.LogCaptureFixture) -> None:
    assert outcomes(["raise lost", "a", "raise expected x, found y"], workers) == [
        "KeyError: 'lost'",
        "a done",
        "expected x, found y",
    ]
    text = caplog.text
    assert text.count("Traceback") == 1 and "misbehave" in text, (
        "where a bug is, but not what the user has to mend"
    )
    assert outcomes([], workers) == []


def test_an_accident_is_made_good_by_the_second_try(tmp_path: Path) -> None:
    def once(job: int) -> int:
        if job == 1 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            die(signal.SIGKILL)
        return job * job

    assert sorted(isolated(once, [0, 1, 2, 3], 2)) == [(0, 0), (1, 1), (2, 4), (3, 9)]


def test_results_in_mapped_memory_outlive_their_process_and_positions_are_told() -> None:
    def work(job: int) -> object:
        alive(job, 7)
        if job == 2:
            die(signal.SIGSEGV)
        result = Mapped({"job": job}, 40_000_000)
        np.frombuffer(result.memory, np.uint8)[:] = job
        return result

    descriptors = len(os.listdir("/proc/self/fd"))
    with closing(Pool(work, 1, 60.0, depth=4)) as pool:
        for job in (0, 1, 2, 3):
            pool.submit(job, job)
        found = [pool.wait() for _ in range(3)]
        assert pool.room == 4
    (zero,), (one,), lost = found
    for key, (number, result) in enumerate((zero, one)):
        assert number == key and isinstance(result, Mapped) and result.value == {"job": key}
        assert (np.frombuffer(result.memory, np.uint8) == key).all()
    assert [number for number, _ in lost] == [2, 3]
    assert lost[0][1].at == (2, 7) and "SIGSEGV" in lost[0][1].reason and lost[1][1] == Lost("")
    del found, zero, one, lost, result
    assert len(os.listdir("/proc/self/fd")) == descriptors


SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is deaf to it
from common.processes.isolation import isolated
def job(number):
    os.write(1, f"{os.getpid()}\\n".encode())  # in one piece
    if number == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # as deaf as native code
    time.sleep(60)
for result in isolated(job, [0, 1], 2):
    pass
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_main_one(number: int, root: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    workers = [int(process.stdout.readline()) for _ in range(2)]
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        os.kill(process.pid, number)
    process.wait(20)
    errors = process.stderr.read()
    assert errors.count("KeyboardInterrupt") == (number == signal.SIGINT), (
        "the main process says so, no worker does"
    )
    deadline = time.monotonic() + 10
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(running, workers))
    process.stdout.close()
    process.stderr.close()


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_numbers_that_no_pool_can_have_are_refused() -> None:
    check_workers(0, 1e-3)
    with pytest.raises(UserError, match="workers=-1: expected at least 0"):
        check_workers(-1, 1.0)
    for timeout in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="read_timeout="):
            check_workers(1, timeout)


def test_raised_is_plain() -> None:
    try:
        raise ValueError("x")
    except ValueError as error:
        assert Raised.of(error).reason == "ValueError: x" and not Raised.of(error).by_user
