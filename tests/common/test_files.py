"""Files are whole or absent; ids stay inside their root."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import (
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


def test_orphans_of_dead_processes_are_removed_and_live_ones_kept(tmp_path: Path) -> None:
    host = socket.gethostname()
    dead = tmp_path / f".a.txt.{host}.99999999.tmp"
    alive = tmp_path / f".a.txt.{host}.{os.getppid()}.tmp"
    other = tmp_path / f".b.txt.{host}.99999999.tmp"
    for file in (dead, alive, other):
        file.write_text("x")
    write_text(tmp_path / "a.txt", "new")
    assert not dead.exists()
    assert alive.exists()
    assert other.exists()


def test_json_refuses_nan_and_reports_broken_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"auc": float("nan")})
    assert not (tmp_path / "a.json").exists()
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match="expected a cost table as JSON"):
        read_json(tmp_path / "b.json", "a cost table")
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
