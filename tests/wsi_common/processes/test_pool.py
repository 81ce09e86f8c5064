"""Processes that really die or hang: what they were at is known, the others go on, nothing is left
behind.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import children, die
from tests.wsi_common.processes.light_jobs import (
    dies_on,
    doubles,
    exits,
    leaves_its_device,
    loses_its_gpu,
)
from wsi_common.errors import FullDisk, UserError
from wsi_common.processes import pool
from wsi_common.processes.mapped import Mapped
from wsi_common.processes.pool import (
    Lost,
    Pool,
    call,
    check_workers,
    heartbeat,
    pick_workers,
    run_jobs,
)


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
            heartbeat()
    return f"{job} done"


def outcomes(jobs: list[str], workers: int, timeout: float = 60.0) -> list[object]:
    before = children()
    found = dict(run_jobs(misbehave, jobs, workers, timeout))
    assert children() <= before, "no process is left"
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
        "the worker ended with status 3",
        "the worker crashed (signal 6, SIGABRT)",
    ]
    assert found[1] == "the worker crashed (signal 11, SIGSEGV)"
    assert found[3] == "the worker was killed (signal 9, SIGKILL: out of memory?)"
    again = [
        record.getMessage() for record in caplog.records if "tried once more" in record.getMessage()
    ]
    assert len(again) == 4, "each had a second try"


def test_one_that_hangs_is_given_up_and_one_that_is_slow_is_not() -> None:
    start = time.monotonic()
    found = outcomes(["sleep 60", "a", "steps 14", "b"], 2, timeout=0.7)
    assert found == ["the worker did not answer for 0.7 s", "a done", "steps 14 done", "b done"]
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


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_full_or_read_only_disk_ends_all_jobs_in_one_line(workers: int, number: int) -> None:
    done = []
    with pytest.raises(FullDisk, match="out.h5") as caught:
        for job, _ in run_jobs(partial(write_nowhere, number), range(50), workers):
            done.append(job)
    assert "\n" not in str(caught.value) and len(done) < 10


def write_nowhere(number: int, job: int) -> None:
    if job > 2:
        raise OSError(number, os.strerror(number), "out.h5")


def test_an_accident_is_made_good_by_the_second_try(tmp_path: Path) -> None:
    def once(job: int) -> int:
        if job == 1 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            die(signal.SIGKILL)
        return job * job

    assert sorted(run_jobs(once, [0, 1, 2, 3], 2)) == [(0, 0), (1, 1), (2, 4), (3, 9)]


def test_results_in_mapped_memory_outlive_their_process_and_positions_are_told() -> None:
    def work(job: int) -> object:
        heartbeat(job, 7)
        if job == 2:
            die(signal.SIGSEGV)
        result = Mapped({"job": job}, 40_000_000)
        np.frombuffer(result.memory, np.uint8)[:] = job
        return result

    Pool([work]).close()  # the memory of slots stays open
    descriptors = len(os.listdir("/proc/self/fd"))
    with closing(Pool([work], 60.0, depth=4)) as pool:
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
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is deaf to it
from wsi_common.processes.pool import run_jobs
from tests.wsi_common.processes.plain_jobs import sleeps
if sys.argv[1] == "no signal":
    sys.platform = "another"
jobs = [1, 1] if sys.argv[1] == "no signal" else [0, 1]
for result in run_jobs(sleeps, jobs, 2, fresh=sys.argv[1] == "fresh"):
    pass
"""


@pytest.mark.parametrize("start", ["fork", "fresh", "no signal"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_main_one(number: int, start: str, root: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, start],
        cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    workers = {int(process.stdout.readline()) for _ in range(2)}
    workers |= descendants(process.pid)  # the server of fresh workers too
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        os.kill(process.pid, number)
    process.wait(20)
    deadline = time.monotonic() + 10
    while any(map(running, workers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(running, workers))
    errors = process.stderr.read()
    assert errors.count("KeyboardInterrupt") == (number == signal.SIGINT), (
        "the main process says so, no worker does"
    )
    process.stdout.close()
    process.stderr.close()


def descendants(pid: int) -> set[int]:
    """Processes that this one and those below it have started."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in listed}.union(*(descendants(int(child)) for child in listed))


def running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_numbers_that_no_pool_can_have_are_refused() -> None:
    check_workers(0, 1e-3)
    check_workers(1, least=1)
    with pytest.raises(UserError, match="workers=0: expected at least 1"):
        check_workers(0, least=1)
    with pytest.raises(UserError, match="workers=-1: expected at least 0"):
        check_workers(-1, 1.0)
    for timeout in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match="read_timeout="):
            check_workers(1, timeout)


def test_workers_follow_the_cores_unless_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, share, expected in ((1, 1, 1), (6, 1, 6), (64, 1, 8), (8, 4, 2), (2, 4, 1)):
        monkeypatch.setattr(pool, "usable_cores", lambda cores=cores: cores)
        assert pick_workers(None, share=share) == expected
        assert pick_workers(0) == 0 and pick_workers(12, share=share) == 12
    with pytest.raises(UserError, match="workers=-1"):
        pick_workers(-1)


def test_a_raised_error_is_one_plain_line() -> None:
    def fail(job: str) -> None:
        raise ValueError("x\n  y")

    found = call(fail, "")
    assert found.reason == "ValueError: x y" and not found.by_user


def lost(found: dict[int, object]) -> dict[int, str]:
    return {number: result.reason for number, result in found.items() if isinstance(result, Lost)}


def test_fresh_workers_that_die_are_lost_jobs_not_a_hang() -> None:
    for jobs, workers in (([9, 9], 2), ([9, 9], 1), ([9], 4)):
        found = dict(run_jobs(exits, jobs, workers, fresh=True))
        assert lost(found) == dict.fromkeys(range(len(jobs)), "the worker ended with status 9")


@pytest.mark.parametrize("workers", [1, 3])
def test_results_do_not_depend_on_the_number_of_fresh_workers(workers: int) -> None:
    found = dict(run_jobs(doubles, range(5), workers, fresh=True, threads=2))
    assert {number: result[0] for number, result in found.items()} == {i: 2 * i for i in range(5)}
    pids, threads = {result[1] for result in found.values()}, {r[2] for r in found.values()}
    assert os.getpid() not in pids and 1 <= len(pids) <= workers and threads == {2}


def test_a_worker_whose_gpu_context_is_lost_takes_no_other_job(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One of two workers is struck at its first job: a fresh one does that job again, and the
    others are well.
    """
    jobs = [("a", tmp_path, True), *((name, tmp_path, False) for name in "bcdef")]
    for workers in (1, 2):
        found = dict(run_jobs(loses_its_gpu, jobs, workers, fresh=True))
        assert found == dict.fromkeys(range(6))
        assert len(list(tmp_path.glob("a.try*"))) == 2
        for path in tmp_path.iterdir():
            path.unlink()
    assert caplog.text.count("the worker lost its GPU (its CUDA context is broken)") == 2


def test_a_killed_job_is_tried_once_more_and_takes_no_other_with_it(tmp_path: Path) -> None:
    jobs = [(f"j{i}", tmp_path, {1: 1, 3: 9}.get(i, 0)) for i in range(5)]
    found = dict(run_jobs(dies_on, jobs, 2, fresh=True))
    assert len(found) == 5
    assert lost(found) == {3: "the worker was killed (signal 9, SIGKILL: out of memory?)"}
    assert len(list(tmp_path.glob("*.done"))) == 4
    tries = {f"j{i}": len(list(tmp_path.glob(f"j{i}.try*"))) for i in range(5)}
    assert tries["j1"] == 2 and tries["j3"] == 2 and all(tries[f"j{i}"] == 1 for i in (0, 2, 4))


def test_workers_share_the_devices(tmp_path: Path) -> None:
    jobs, devices = [tmp_path] * 4, ["a", "b"]
    found = dict(run_jobs(leaves_its_device, jobs, 3, fresh=True, devices=devices))
    assert found == dict.fromkeys(range(4))
    used = [path.name.split(".") for path in tmp_path.iterdir()]
    assert {device for device, _ in used} == {"a", "b"} and len({pid for _, pid in used}) == len(
        used
    ) <= 3
    (alone := tmp_path / "alone").mkdir()
    (alone / "b.0").touch()
    assert dict(run_jobs(leaves_its_device, [alone], 0, devices=devices)) == {0: None}
    assert (alone / f"a.{os.getpid()}").exists(), "in this process"


def test_the_program_that_runs_is_not_imported_by_its_workers(root: Path) -> None:
    """Else each worker would import it a second time under another name, with a warning."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.wsi_common.processes.light_program"],
        cwd=root, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert sorted(done.stdout.split("\n")[:-1]) == ["0 10", "1 20", "2 30", "imported"]
    assert (done.returncode, done.stderr) == (0, "")


def test_a_function_of_the_program_is_refused_by_fresh_workers() -> None:
    def job(number: int) -> int:
        return number

    job.__module__ = "__main__"
    with pytest.raises(AssertionError, match="the program that runs"):
        Pool([job], fresh=True)
