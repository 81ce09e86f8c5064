"""Trainings shared out under torchrun: the tables of one process, a training that kills its
process, who does what.
"""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import mil.benchmark as benchmark
from common.config import load_config
from common.errors import UserError
from mil.training import rank_queue as ranks
from mil.training.rank_queue import Ranks, device_of, join
from tests.mil.tasks.task_cohorts import rewrite

TABLES = (
    "results.csv",
    "summary.csv",
    "summary.json",
    "summary.md",
    "summary.tex",
    "predictions.csv",
    "comparisons.csv",
)
WHOLE = (*TABLES, "risk_groups.csv", "splits/splits_0.csv", "splits/splits_1.csv", "config.yaml")


def crew(size: int) -> list[Ranks]:
    store = dist.HashStore()
    return [Ranks(rank, size, rank, size, store) for rank in range(size)]


def test_every_number_goes_to_one_process_only():
    both = crew(2)
    first, second = (each.claims(5) for each in both)
    assert [next(first), next(second), next(second), next(first), next(second)] == [0, 1, 2, 3, 4]
    assert not list(first) and not list(second)


def test_the_first_process_decides_and_waits_for_all(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ranks, "POLL_SECONDS", 0.001)
    main, other = crew(2)
    seen, noted = [], []

    def work() -> None:
        seen.extend(other.agree(lambda: pytest.fail("not asked")))
        other.report(1, "out of memory")
        other.report(2, None)
        seen.append(other.leave())

    thread = threading.Thread(target=work)
    thread.start()
    assert main.agree(lambda: [7, 8, 9]) == [7, 8, 9]
    main.report(0, None)
    assert main.wait(3, noted.append) == {1: "out of memory"}
    assert main.end(4) == 4
    thread.join()
    assert seen == [7, 8, 9, 4] and noted[-1] == 3 and not main.agree(list)


def test_a_process_whose_store_is_gone_ends_with_an_error():
    class Gone(dist.HashStore):
        def check(self, keys):
            raise dist.DistNetworkError("connection reset")

    assert Ranks(1, 2, 1, 2, Gone()).leave() == 1


def test_a_process_that_cannot_decide_takes_the_others_with_it():
    main, other = crew(2)

    def refuse() -> list[int]:
        raise UserError("holds another run")

    with pytest.raises(UserError, match="holds another run"):
        main.agree(refuse)
    with pytest.raises(UserError, match="the first process has stopped"):
        other.agree(list)


def test_every_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch):
    rank = crew(6)[3]
    assert device_of("cpu", rank) == "cpu" and (
        torch.cuda.is_available() or device_of("auto", rank) == "cpu"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [device_of(name, rank) for name in ("auto", "cuda", "cpu")] == [
        "cuda:1",
        "cuda:1",
        "cpu",
    ]
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() is None


def test_devices_are_not_named_under_torchrun(
    make_cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(benchmark, "join", lambda: crew(2)[0])
    cohort = make_cohort(slides=8)
    given = [
        f"labels={cohort}/labels.csv",
        f"features=[{cohort}/bags]",
        f"output={tmp_path}/out",
        "devices=[cpu,cpu]",
    ]
    with pytest.raises(UserError, match="devices: expected none under torchrun"):
        benchmark.main(load_config(benchmark.Config, given))


@pytest.mark.process
def test_two_machines_write_the_tables_of_one_process(
    make_cohort, tmp_path: Path, root: Path, failing_training
):
    """Two torchruns that share a disk. One training kills its process wherever it runs: it is
    listed, the others go on, and the tables are those of one process in which it fails. Started
    again without torchrun, the benchmark is the one that nothing happened to."""
    cohort = rewrite(make_cohort(slides=32), "cox")
    recipe = ["epochs=2", "min_epochs=1", "accumulate=4"]
    more = [
        "task=cox",
        "device=cpu",
        "folds=2",
        "seeds=[1]",
        "models=[mean,max]",
        "headline=max",
        "resamples=50",
    ]
    given = [
        f"labels={cohort}/labels.csv",
        f"features=[{cohort}/bags]",
        *more,
        *(f"training.{key}" for key in recipe),
    ]

    def start(name: str) -> int:
        return benchmark.main(
            load_config(benchmark.Config, [*given, "isolated=false", f"output={tmp_path / name}"])
        )

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        endpoint = f"localhost:{probe.getsockname()[1]}"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
    ]
    command += [
        f"--rdzv-endpoint={endpoint}",
        "-m",
        "tests.mil.evaluation.dying_benchmark",
        *given,
        f"output={tmp_path}/two",
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    machines = [subprocess.Popen(command, env=environment, cwd=root, **streams) for _ in range(2)]
    said = [machine.communicate(timeout=200) for machine in machines]
    assert [machine.returncode for machine in machines] == [1, 1], [
        errors[-3000:] for _, errors in said
    ]
    with (tmp_path / "two" / "failures.csv").open() as stream:
        (failure,) = csv.DictReader(stream)
    assert failure["job"] == "bags/max/seed1_fold1" and "died twice" in failure["error"]
    with failing_training("max/seed1_fold1", "killed"):
        assert start("one") == 1
    for table in TABLES:
        first, second = ((tmp_path / name / table) for name in ("one", "two"))
        assert first.is_file() == second.is_file() and (
            not first.is_file() or first.read_bytes() == second.read_bytes()
        ), table
    assert (
        json.loads((tmp_path / "two" / "summary.json").read_text())["protocol"]["runs_missing"] == 1
    )
    assert (
        sum(out.count("feature set") for out, _ in said) == 1
    )  # the first process alone prints the table
    assert (
        start("two") == 0 and start("one") == 0 and not (tmp_path / "two" / "failures.csv").exists()
    )
    for table in WHOLE:
        text = [
            (tmp_path / name / table).read_text().replace(str(tmp_path / name), "")
            for name in ("one", "two")
        ]
        assert text[0] == text[1], table
