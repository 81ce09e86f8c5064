"""What pip installs: the packages that each use needs, and every file that the code reads."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import chain
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.source import PACKAGES, SCRIPTS
from wsi_common.run import find_commit

tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
FILES = sorted(ROOT.glob("requirements-*.txt"))
USES = [path.stem.removeprefix("requirements-") for path in FILES]
# extras of requirements-options.txt are named for their package, but for these
TOGETHER = {"onnx": ["onnx", "onnxruntime", "onnxscript"], "redis": ("redis", "isal")}
# what extraction does without: packages of the tests, of tracking, of tables, of single settings
NOT_FOR_EXTRACTION = ("pytest", "wandb", "openpyxl", "pandas", "ray", "redis", "pycocotools")


def read_lines(use: str) -> dict[str, str]:
    """Package -> line of a requirements file, without those of the files that it includes."""
    found = {}
    for line in (ROOT / f"requirements-{use}.txt").read_text().splitlines():
        if line and not line.startswith(("#", "-r ")):
            requirement, _, comment = line.partition("#")
            assert comment.strip(), f"requirements-{use}.txt: {requirement} has no comment"
            found[re.split("[<>=]", requirement)[0]] = requirement.strip()
    return found


def read_project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_pip_installs_the_lines_of_the_requirement_files() -> None:
    project = read_project()
    extras = project["optional-dependencies"]
    assert project["dependencies"] == list(read_lines("extract").values())
    options = read_lines("options")
    together = {name: [options[one] for one in names] for name, names in TOGETHER.items()}
    single = {
        name: [line] for name, line in options.items() if name not in chain(*TOGETHER.values())
    }
    wanted = {
        use: list(read_lines(use).values()) for use in USES if use not in ("extract", "options")
    }
    everything = ",".join(
        [*("det", "mil"), *(name for name in extras if name in single | together)]
    )
    wanted["test"].insert(0, f"{project['name']}[{everything}]")
    assert extras == wanted | single | together


def test_one_package_has_one_line() -> None:
    lines: dict[str, str] = {}
    for use in USES:
        for name, line in read_lines(use).items():
            assert lines.setdefault(name, line) == line, f"{name}: two lines of requirements-*.txt"
            assert name not in NOT_FOR_EXTRACTION or use != "extract"


def test_a_use_includes_what_it_stands_on() -> None:
    for use in ("det", "mil"):
        assert "-r requirements-extract.txt" in (ROOT / f"requirements-{use}.txt").read_text()
    includes = re.findall("^-r (.*)$", (ROOT / "requirements-test.txt").read_text(), re.MULTILINE)
    assert {name.split("-")[1] for name in includes} == {"det.txt", "mil.txt", "options.txt"}


@pytest.mark.process
def test_a_wheel_holds_every_file_of_the_packages(tmp_path: Path) -> None:
    """Built from what git knows: what a build of the operators leaves behind is no part of it."""
    listed = subprocess.run(
        ["git", "ls-files", *PACKAGES, "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    ).stdout.split()  # fmt: skip
    if not listed:
        pytest.skip("this is no clone of the repository")
    for name in listed:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "mil" / "ops" / "build").mkdir()
    (tmp_path / "mil" / "ops" / "build" / "libmil_cpu.so").touch()
    code = "from setuptools import build_meta; build_meta.build_wheel('wheel')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    held = {name for name in names if ".dist-info/" not in name}
    assert held == {name for name in listed if name.startswith(PACKAGES)}


@pytest.mark.process
def test_every_script_starts_without_what_its_use_does_not_need(tmp_path: Path) -> None:
    """Its help is printed where pytest, wandb, openpyxl and all other optional packages are not,
    from a folder that is not the repository.
    """
    code = f"""
import importlib, sys
sys.path.insert(0, {str(ROOT)!r})
for name in {(*NOT_FOR_EXTRACTION, "onnx", "onnxruntime", "tensorboard", "beartype", "umap")}:
    sys.modules[name] = None
from wsi_common.cli import run
for script in {sorted(SCRIPTS)}:
    module = importlib.import_module(script)
    assert run(module.main, module.Config, ["--help"]) == 0
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-1000:]
    assert done.stdout.count("keys (type = default)") == len(SCRIPTS)


def test_a_commit_is_that_of_this_code_and_not_of_the_folder_around_it(tmp_path: Path) -> None:
    """An environment may lie in a repository of the user's, whose commit says nothing of ours."""
    assert find_commit(ROOT / "wsi_common") is None
    if (ROOT / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", find_commit(ROOT) or "")


def test_a_missing_redis_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    server = importlib.import_module("patch_encoder.regions.redis_server")
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(Exception, match="expected the package redis, found none; pip install"):
        server.RegionServer("redis://localhost:1")


def test_files_that_others_read_are_what_they_expect() -> None:
    """conda's environment and the citation are YAML with the keys that their readers ask for."""
    import yaml

    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    (packages,) = (entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict))
    (line,) = packages
    extras = set(re.fullmatch(r"-e \.\[(.*)\]", line)[1].split(","))  # type: ignore[index]
    assert extras <= read_project()["optional-dependencies"].keys()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "version"} <= citation.keys()
    version = importlib.import_module("wsi_common").__version__
    assert citation["version"] == version
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_image_installs_the_requirement_files() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for name in re.findall(r"requirements-[a-z]+\.txt", text):
        assert (ROOT / name).is_file()
    for name in re.findall(r"\$\{?([A-Z_]+)", text.split("\nFROM")[1]):
        known = [*re.findall(r"(?:ARG|ENV) ([A-Z_]+)", text), "PATH", "PWD"]
        assert name in known, f"Dockerfile: {name} is set nowhere"
