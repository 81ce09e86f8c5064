"""The shell scripts: clean, runnable from anywhere, `--help`, and refusing what they do not know."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "tools").rglob("*.sh"), *(ROOT / "tools").rglob("*.sbatch")])
RUNNABLE = [script for script in SCRIPTS if script.name != "lib.sh" and "slurm" not in script.parts]
ENVIRONMENT = {**os.environ, "ENV": "active", "PYTHON": sys.executable, "PYTHON_BASE": sys.executable, "OMP_NUM_THREADS": "1"}


def shellcheck() -> str:
    beside = Path(sys.executable).with_name("shellcheck")
    found = str(beside) if beside.is_file() else shutil.which("shellcheck")
    if not found:
        pytest.skip("shellcheck is not installed")
    return found


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_shellcheck_clean(script: Path) -> None:
    done = subprocess.run(
        [shellcheck(), "-x", "-P", str(ROOT), str(script)], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout
    text = script.read_text()
    assert "set -euo pipefail" in text or script.name == "lib.sh"
    assert not any(line.rstrip().endswith(" python") or "/home/" in line for line in text.splitlines())


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda p: p.name)
def test_help_works_from_any_folder(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(script), "--help"], capture_output=True, text=True, cwd=tmp_path, env=ENVIRONMENT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip()) > 20
    assert not list(tmp_path.iterdir()), "asking for help leaves nothing behind"


@pytest.mark.parametrize(
    "script", [s for s in RUNNABLE if s.name not in {"setup.sh", "test.sh", "quickstart.sh"}], ids=lambda p: p.name
)
def test_unknown_keys_are_refused_before_any_work(script: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(script), "no_such_key=1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**ENVIRONMENT, "GPUS": "0"},
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "unknown key 'no_such_key'" in done.stderr
    assert "Traceback" not in done.stderr


def test_quickstart_refuses_a_folder_without_data(tmp_path: Path) -> None:
    for environment, arguments, expected in (
        (ENVIRONMENT | {"DATA": str(tmp_path)}, [], "found neither"),
        (ENVIRONMENT, ["--fast"], "no arguments"),
    ):
        done = subprocess.run(
            ["bash", str(ROOT / "tools" / "quickstart.sh"), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            check=False,
        )
        assert done.returncode == 2
        assert expected in done.stderr


def test_setup_takes_an_active_environment_as_it_is() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "setup.sh")], env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    wrong = ENVIRONMENT | {"REQUIREMENTS": "gpu"}
    done = subprocess.run(["bash", str(ROOT / "tools" / "setup.sh")], env=wrong, capture_output=True, text=True, check=False)
    assert done.returncode == 2


def test_requirement_files_agree() -> None:
    def lines(name: str) -> dict[str, str]:
        rows = (line.split("#") for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#"))
        found = {}
        for requirement, comment in rows:
            assert comment.strip(), f"{name}: {requirement} has no comment"
            text = requirement.strip()
            found[text.split(">")[0]] = text
        return found

    det, mil = lines("requirements-det.txt"), lines("requirements-mil.txt")
    assert {name: det[name] for name in det.keys() & mil.keys()} == {name: mil[name] for name in det.keys() & mil.keys()}
