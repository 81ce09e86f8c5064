"""The shell scripts: clean, runnable from anywhere, `--help`, and refusing what they do not
know.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

import pytest

from tests.helpers import ROOT
from wsi_common.cli import run
from wsi_common.config import load_config

SCRIPTS = sorted([*(ROOT / "tools").rglob("*.sh"), *(ROOT / "tools").rglob("*.sbatch")])
RUNNABLE = [script for script in SCRIPTS if script.name != "lib.sh" and "slurm" not in script.parts]
WITHOUT_KEYS = {"setup.sh", "test.sh", "quickstart.sh", "cervical.sh", "docs.sh", "redis_server.sh"}
ENVIRONMENT = {
    **os.environ,
    "ENV": "active",
    "PYTHON": sys.executable,
    "PYTHON_BASE": sys.executable,
    "OMP_NUM_THREADS": "1",
}


def shellcheck() -> str:
    beside = Path(sys.executable).with_name("shellcheck")
    found = str(beside) if beside.is_file() else shutil.which("shellcheck")
    if not found:
        pytest.skip("shellcheck is not installed")
    return found


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda p: p.name)
def test_shellcheck_clean(script: Path) -> None:
    done = subprocess.run(
        [shellcheck(), "-x", "-P", str(ROOT), str(script)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    text = script.read_text()
    assert "set -euo pipefail" in text or script.name == "lib.sh"
    assert not any(
        line.rstrip().endswith(" python") or "/home/" in line for line in text.splitlines()
    )


def started(
    script: Path, arguments: list[str], folder: Path, **variables: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A script called from `folder` with an interpreter that only notes its arguments; what it was
    called with.
    """
    noted, interpreter = folder.parent / "noted", folder.parent / "interpreter"
    interpreter.write_text(f"#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" >{noted}\n")
    interpreter.chmod(0o755)
    environment = ENVIRONMENT | {"PYTHON": str(interpreter), "GPUS": "0"} | variables
    done = subprocess.run(
        ["bash", str(script), *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        check=False,
    )
    return done, noted.read_text().split("\0")[:-1] if noted.exists() else []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder far from the repository."""
    (tmp_path / "anywhere").mkdir()
    return tmp_path / "anywhere"


@pytest.mark.parametrize("script", RUNNABLE, ids=lambda p: p.name)
def test_help_works_from_any_folder(
    script: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done, called = started(script, ["--help"], folder)
    assert done.returncode == 0, done.stderr
    text = done.stdout
    if called:
        assert called[0] == "-m", "one plain process, no torchrun"
        module = importlib.import_module(called[1])
        assert run(module.main, module.Config, called[2:]) == 0
        text = capsys.readouterr().out
    else:
        lines = script.read_text().splitlines()
        assert text.splitlines() == [
            line[2:] for line in takewhile("set -euo pipefail".__ne__, lines[1:])
        ]
    assert len(text.strip()) > 20
    assert not list(folder.iterdir()), "asking for help leaves nothing behind"


@pytest.mark.parametrize(
    "script",
    [s for s in RUNNABLE if s.name not in WITHOUT_KEYS],
    ids=lambda p: p.name,
)
def test_unknown_keys_are_refused_before_any_work(
    script: Path, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    done, called = started(script, ["no_such_key=1"], folder)
    assert done.returncode == 0, done.stderr
    assert (called[0], called[-1]) == ("-m", "no_such_key=1")
    module = importlib.import_module(called[1])
    monkeypatch.chdir(folder)
    assert run(module.main, module.Config, called[2:]) == 2
    assert "unknown key 'no_such_key'" in capsys.readouterr().err
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    "script",
    [s for s in RUNNABLE if s.name not in WITHOUT_KEYS],
    ids=lambda p: p.name,
)
def test_a_file_of_settings_takes_the_place_of_the_default_one(script: Path, folder: Path) -> None:
    done, called = started(script, ["--config", "mine.yaml"], folder)
    assert done.returncode == 0, done.stderr
    files = [called[place + 1] for place, word in enumerate(called) if word == "--config"]
    assert files == ["mine.yaml"]


@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("detector_study", "recipe"),
        ("region_study", "mil_config"),
        ("ablation", "d2vfm_config"),
    ],
)
def test_a_recipe_that_a_file_of_settings_names_is_kept(
    folder: Path, script: str, name: str
) -> None:
    own = folder / "own.yaml"
    own.write_text(f"{name}: mine.yaml\n")
    tool = ROOT / "tools" / f"{script}.sh"
    for given in (["--config", str(own)], [f"--config={own}"]):
        _, words = started(tool, given, folder)
        assert not [word for word in words if word.startswith(f"{name}=")]
    _, words = started(tool, [], folder)
    (default,) = (word for word in words if word.startswith(f"{name}="))
    assert Path(default.partition("=")[2]).is_file()
    _, words = started(tool, [f"{name}=other.yaml"], folder)
    assert [word for word in words if word.startswith(f"{name}=")][-1] == f"{name}=other.yaml"


@pytest.mark.parametrize(
    ("script", "module"),
    [
        ("preprocess/extract-features.sh", "patch_encoder.extract_features"),
        ("preprocess/filter.sh", "mil.rank_patches"),
        ("distill.sh", "detection_kd.train_d2vfm"),
        ("r50_extract.sh", "detection_kd.extract_student"),
        ("mil_benchmark.sh", "mil.benchmark"),
    ],
)
def test_the_published_names_of_ts2gkd_run_the_stages(
    script: str, module: str, folder: Path
) -> None:
    done, called = started(ROOT / "tools" / script, ["output=here"], folder)
    assert done.returncode == 0, done.stderr
    assert called[:2] == ["-m", module] and called[-1] == "output=here"


@pytest.mark.process
def test_a_stage_runs_with_the_real_interpreter_from_any_folder(folder: Path) -> None:
    for argument, status, expected in (
        ("--help", 0, "target_mpp"),
        ("no_such_key=1", 2, "unknown key 'no_such_key'"),
    ):
        command = ["bash", str(ROOT / "tools" / "tile_slides.sh"), argument]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, check=False
        )
        assert done.returncode == status, done.stderr
        assert expected in done.stdout + done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "variables", "expected"),
    [
        ([], {"GPUS": "0"}, ["workers=1"]),
        ([], {"GPUS": "2", "WORKERS": "3"}, ["workers=6", "devices=[cuda:0,cuda:1]"]),
        ([], {"GPUS": "4"}, ["workers=4", "devices=[cuda:0,cuda:1]"]),
        (["device=cpu"], {"GPUS": "2"}, ["workers=2"]),
        (["engine=ray"], {"GPUS": "2"}, ["workers=1"]),
    ],
)
def test_a_benchmark_shares_the_gpus_of_a_machine(
    folder: Path, arguments: list[str], variables: dict[str, str], expected: list[str]
) -> None:
    variables = variables | {"CUDA_VISIBLE_DEVICES": "0,1"}
    script = ROOT / "tools" / "mil_benchmark.sh"
    done, called = started(script, arguments, folder, **variables)
    assert done.returncode == 0, done.stderr
    assert called[:2] == ["-m", "mil.benchmark"], "one plain process, no torchrun"
    assert called[called.index("output=runs/mil") + 1 :] == [*expected, *arguments]


def test_a_benchmark_on_several_machines_is_ray_s(folder: Path) -> None:
    script = ROOT / "tools" / "mil_benchmark.sh"
    done, called = started(script, [], folder, NNODES="2")
    assert done.returncode == 2 and not called and "engine=ray" in done.stderr


def test_every_stage_of_the_embedded_pre_training_is_started_with_keys_that_it_has(
    folder: Path,
) -> None:
    noted, interpreter = folder.parent / "noted", folder.parent / "interpreter"
    interpreter.write_text(f"#!/usr/bin/env bash\n(IFS=$'\\t'; echo \"$*\") >>{noted}\n")
    interpreter.chmod(0o755)
    environment = ENVIRONMENT | {"PYTHON": str(interpreter)}
    command = ["bash", str(ROOT / "tools" / "pretrain.sh")]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in noted.read_text().splitlines()]
    stages = [(line[1], line[2:]) for line in lines if line[0] == "-m"]
    configs = {
        name: load_config(importlib.import_module(name).Config, keys, check_paths=False)
        for name, keys in stages
    }
    assert list(configs) == [
        "patch_encoder.demo.render_cohort",
        "patch_encoder.tile_slides",
        "patch_encoder.pretrain_dino",
        "patch_encoder.extract_features",
        "mil.benchmark",
        "mil.report",
        "patch_encoder.pretrain_report",
    ]
    shown = Path(configs["patch_encoder.pretrain_report"].output) / "pretraining.html"
    assert str(shown) in done.stdout


def test_the_cervical_road_wants_a_folder(folder: Path) -> None:
    done, called = started(ROOT / "tools" / "cervical.sh", [], folder)
    assert done.returncode == 2 and not called and "expected DATA=" in done.stderr


def test_quickstart_refuses_a_folder_without_data(tmp_path: Path, warm_python: Path) -> None:
    python = {name: str(warm_python) for name in ("PYTHON", "PYTHON_BASE")}
    for variables, arguments, expected in (
        ({"DATA": str(tmp_path)}, [], "fields named NL_12_ (3).jpg, found none"),
        ({}, ["--fast"], "no arguments"),
    ):
        done = subprocess.run(
            ["bash", str(ROOT / "tools" / "quickstart.sh"), *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=ENVIRONMENT | python | variables,
            check=False,
        )
        assert done.returncode == 2
        assert expected in done.stderr


def test_setup_takes_an_active_environment_as_it_is() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "setup.sh")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "")
    wrong = ENVIRONMENT | {"REQUIREMENTS": "gpu"}
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "setup.sh")],
        env=wrong,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
