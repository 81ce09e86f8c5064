"""Files are whole or absent; ids stay inside their root."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT
from wsi_common.errors import UserError
from wsi_common.files import (
    TEMPORARY,
    AtomicFile,
    atomic_path,
    read_json,
    safe_id,
    sha256_file,
    write_csv,
    write_json,
    write_text,
)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.txt"
    write_text(target, "old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        assert target.read_text() == "old"
        raise RuntimeError
    assert [file.name for file in target.parent.iterdir()] == ["a.txt"]
    assert target.read_text() == "old"


def test_writers_of_one_name_do_each_other_no_harm(tmp_path: Path) -> None:
    """Also where they share host name and process id, as in two containers."""
    first, second = (AtomicFile(tmp_path / "a.txt") for _ in range(2))
    first.temporary.write_text("first")
    second.temporary.write_text("second")
    second.commit()
    assert (tmp_path / "a.txt").read_text() == "second"
    first.commit()
    assert (tmp_path / "a.txt").read_text() == "first"
    assert os.listdir(tmp_path) == ["a.txt"]


def leave_behind(folder: Path, target: str, age: float) -> Path:
    """A temporary file whose process is gone: nobody holds its lock."""
    file = folder / f".{target}.{'0' * 16}.tmp"
    assert TEMPORARY.match(file.name)
    file.write_text("half")
    os.utime(file, (time.time() - age,) * 2)
    return file


@pytest.mark.parametrize("locks", [True, False])
def test_stale_temporaries_are_removed_and_those_in_use_kept(
    tmp_path: Path, locks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.ENOTSUP, "no locks here")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", unsupported)
    held = AtomicFile(tmp_path / "held.h5")  # by somebody else, for long
    os.utime(held.temporary, (1.0, 1.0) if locks else None)
    young = leave_behind(tmp_path, "d", 0.0)
    hour, days = (leave_behind(tmp_path, *pair) for pair in (("b", 3600.0), ("c", 2e5)))
    foreign = [tmp_path / name for name in (".mine.tmp", f"x.{'0' * 16}.tmp", ".hidden")]
    for file in foreign:
        file.write_text("x")
        os.utime(file, (1.0, 1.0))
    write_text(tmp_path / "a.txt", "new")
    assert hour.exists() != locks, "without locks only age tells"
    assert not days.exists()
    assert young.exists() and held.temporary.exists() and all(file.exists() for file in foreign)
    assert TEMPORARY.match(held.temporary.name)
    held.temporary.write_text("whole")
    held.commit()
    assert (tmp_path / "held.h5").read_text() == "whole"


def test_a_temporary_that_is_swept_away_before_its_lock_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, calls = fcntl.flock, []

    def sweep_first(descriptor: int, operation: int) -> None:
        if not calls:
            (own,) = tmp_path.iterdir()
            own.unlink()
        calls.append(descriptor)
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new" and os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("name", ["a" * 230 + ".h5", "a" * 255, "\u00e9" * 127])
def test_names_may_be_as_long_as_the_file_system_has_them(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]


TERMINATED = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job is deaf to it
from dataclasses import dataclass
from wsi_common.cli import launch
from wsi_common.files import atomic_path

@dataclass
class Config:
    target: str = ""

def main(config):
    with atomic_path(config.target) as temporary:
        temporary.write_text("half")
        print("ready", flush=True)
        time.sleep(60)

launch(main, Config)
"""


@pytest.mark.process
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_script_that_is_told_to_end_leaves_no_temporary(
    tmp_path: Path, number: int, status: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TERMINATED, f"target={tmp_path}/a.txt"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    assert len(os.listdir(tmp_path)) == 1
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status, errors
    assert errors.count("\n") == 1 and "same command" in errors, errors
    assert not os.listdir(tmp_path)


def test_json_has_null_for_nan_and_reports_broken_files(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"auc": float("nan"), "more": [1.0, (float("inf"),)]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"auc": None, "more": [1.0, [None]]}
    values = {"n": 2, "none": [], "more": [{"x": float("nan")}, [1, 2]], "about": {"a": [1]}}
    write_json(tmp_path / "l.json", values, lines=True)
    text = (tmp_path / "l.json").read_text()
    assert json.loads(text) == {**values, "more": [{"x": None}, [1, 2]]}
    assert text.splitlines()[4:6] == ['    {"x": null},', "    [1, 2]"]
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match="expected a cost table as JSON"):
        read_json(tmp_path / "b.json", "a cost table")
    (tmp_path / "d.json").write_text("[" * 10_000)
    with pytest.raises(UserError, match="as JSON, found maximum recursion depth"):
        read_json(tmp_path / "d.json", "a cost table")
    with pytest.raises(UserError, match="found no file"):
        read_json(tmp_path / "c.json", "a cost table")


def test_csv_columns_follow_the_header(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ["x", "y"], [{"y": 2, "x": "a,b"}])
    assert (tmp_path / "a.csv").read_text() == 'x,y\n"a,b",2\n'


@pytest.mark.parametrize("identifier", ["", ".", "..", "a/b", "../a", "a\\b", "a\nb"])
def test_unsafe_ids_are_refused(identifier: str) -> None:
    with pytest.raises(UserError, match="plain file name"):
        safe_id(identifier)


def test_safe_ids_and_digest(tmp_path: Path) -> None:
    assert safe_id("007.a-b c") == "007.a-b c"
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a").startswith("ba7816bf8f01cfea")
