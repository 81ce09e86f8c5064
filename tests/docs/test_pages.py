"""The README, CONTRIBUTING, AGENTS and the pages of docs/: they build, no link is dead, and what they name
is there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT
from wsi_common.config import describe

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "AGENTS.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "build" not in path.parts),
]
LONGEST = {"README.md": 250}  # lines; every other page has at most 300
GENERATED = re.compile(r"docs/reference/(encoders|keys|modules)\b")
# a path of the repository, as text or code names it; `<`, `*` and `...` are placeholders
NAMED = re.compile(
    r"(?<![\w./<-])((?:\.ci|benchmarks|wsi_common|configs|detection_kd|docs|images|mil|notebooks"
    r"|patch_encoder|studies|tests|tools)/[\w./-]*\w/?)(?![\w<*{-]|\.\.)"
)
OUTPUT = re.compile(r"^```text\n.*?^```$", re.MULTILINE | re.DOTALL)  # what commands print
OTHERS = {"RAY_ADDRESS", "REDIS_URL"}  # what Python reads
LINK = re.compile(r"\]\(([^)\s#]*)(?:#[^)\s]*)?\)")


def written_pages() -> list[Path]:
    """All pages but those that are made at every build."""
    return [page for page in PAGES if not GENERATED.match(str(page.relative_to(ROOT)))]


@pytest.mark.parametrize("page", written_pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_page_is_short_and_what_it_names_is_there(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST.get(page.name, 300)
    for name in NAMED.findall(OUTPUT.sub("", text)):
        path = ROOT / name
        assert path.exists() or GENERATED.match(name) or name.startswith("docs/build"), (
            f"{page.name} names {name}, which is not there"
        )
    for module in re.findall(r"python -m ((?:\w+\.)+\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file() or module.startswith("torch"), (
            f"{page.name} names the module {module}, which is not there"
        )
    for link in filter(None, LINK.findall(text)):
        target = (page.parent / link).resolve()
        inside = target.is_relative_to(ROOT) and GENERATED.match(str(target.relative_to(ROOT)))
        assert link.startswith(("http://", "https://")) or inside or target.exists(), (
            f"{page.name} links to {link}, which is not there"
        )


def test_made_pages_name_what_is_there() -> None:
    for name in NAMED.findall((ROOT / "docs" / "generate.py").read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"docs/generate.py names {name}, which is not there"


def keys_of(script: Path) -> list[str]:
    """The keys of the module that a shell script starts, directly or through another one; none
    where it starts no module.
    """
    text = script.read_text(encoding="utf-8")
    if other := re.search(r"^exec bash .*/(\w+\.sh)\"", text, re.MULTILINE):
        return keys_of(ROOT / "tools" / other[1])
    found = re.search(r"^run_\w+ ([\w.]+)", text, re.MULTILINE)
    if not found:
        return []
    config = importlib.import_module(found[1]).Config
    return re.findall(r"^  ([\w.]+) \(", describe(config), re.MULTILINE)


def settings(text: str) -> Iterator[tuple[str, str]]:
    """(shell script, key) of every `bash tools/x.sh key=value` of a page."""
    whole = OUTPUT.sub("", text).replace("\\\n", " ")
    for script, arguments in re.findall(r"bash (tools/[\w/-]+\.sh)([^\n`#|]*)", whole):
        for key in re.findall(r"(?:^|\s)['\"]?([\w.]+)=", arguments):
            yield script, key


@pytest.mark.parametrize("page", written_pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_set_keys_that_their_script_has(page: Path) -> None:
    for script, key in settings(page.read_text(encoding="utf-8")):
        known = keys_of(ROOT / script)
        assert key in known or not known, f"{page.name}: {script} has no key {key}"


def variables(text: str) -> Iterator[tuple[str, str]]:
    """(shell script, variable) of every `NAME=value ... bash tools/x.sh` of a page."""
    whole = OUTPUT.sub("", text).replace("\\\n", " ")
    for names, script in re.findall(r"((?:[A-Z_]+=\S+\s+)+)bash (tools/[\w/-]+\.sh)", whole):
        for name in re.findall(r"(?:^|\s)([A-Z_]+)=", names):
            yield script, name


def variables_of(script: Path) -> set[str]:
    """The variables that a shell script reads: by name, as a key it collects, or through lib.sh."""
    code = "".join(
        line + "\n"
        for path in (script, ROOT / "tools" / "lib.sh")
        for line in path.read_text(encoding="utf-8").splitlines()
        if not line.lstrip().startswith("#")
    )
    collected = " ".join(re.findall(r"collect_keys (.*)", code))
    keys = re.findall(r"([\w]+)(?:\[\])?'?(?=\s|$)", collected)
    return {key.upper() for key in keys} | set(re.findall(r"\b[A-Z][A-Z_]+\b", code)) | OTHERS


@pytest.mark.parametrize("page", written_pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_set_variables_that_their_script_reads(page: Path) -> None:
    for script, name in variables(page.read_text(encoding="utf-8")):
        assert name in variables_of(ROOT / script), f"{page.name}: {script} does not read {name}"


def test_settings_are_found() -> None:
    text = "`A=b bash tools/x.sh --config c a.b=1 'd=[e, f]'`\nbash tools/y.sh \\\n  g=h  # i=j\n"
    assert list(settings(text)) == [
        ("tools/x.sh", "a.b"), ("tools/x.sh", "d"), ("tools/y.sh", "g")
    ]  # fmt: skip
    assert list(variables("A=b \\\n  C_D=e bash tools/x.sh f=g\n")) == [
        ("tools/x.sh", "A"), ("tools/x.sh", "C_D")
    ]  # fmt: skip
    read = variables_of(ROOT / "tools" / "evaluate_mitosis.sh")
    assert {"DETECTIONS", "ANNOTATIONS", "SPLITS", "GPUS"} <= read and "MITOSES" not in read
    assert "models" in keys_of(ROOT / "tools" / "mil_benchmark.sh")
    assert "adapter" in keys_of(ROOT / "tools" / "distill.sh")


def test_the_example_classifier_is_one() -> None:
    """The model of docs/develop/add_a_model.md, as it is printed."""
    page = (ROOT / "docs" / "develop" / "add_a_model.md").read_text(encoding="utf-8")
    names: dict[str, type[torch.nn.Module]] = {}
    code = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)[0]
    exec(compile(code, "add_a_model.md", "exec"), names)
    output = names["MedianMIL"](8, 2)(torch.randn(5, 8))
    assert output.logits.shape == (2,)
    assert torch.allclose(output.attention, torch.full((5,), 0.2))


def build(python: Path, output: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "tools" / "docs.sh")],
        env=os.environ | {"PYTHON": str(python), "OUTPUT": str(output)},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def needs_sphinx() -> None:
    for name in ("sphinx", "myst_parser", "furo"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; pip install -r requirements-docs.txt")


@pytest.mark.process
def test_pages_build_without_a_warning(tmp_path: Path, warm_python: Path) -> None:
    needs_sphinx()
    done = build(warm_python, tmp_path / "html")
    assert done.returncode == 0, done.stdout + done.stderr
    keys = (tmp_path / "html" / "reference" / "keys" / "mil-benchmark.html").read_text()
    assert "mil_benchmark.sh" in keys and "standardize" in keys


def test_dead_links_and_other_hosts_are_found(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from check_pages import check_pages
    finally:
        sys.path.remove(str(ROOT / "docs"))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.html").write_text('<h1 id="here">B</h1><a href="https://a.org">a</a>')
    page = tmp_path / "a.html"
    page.write_text('<a href="sub/b.html#here">b</a><img src="data:image/png;base64,AA==">')
    assert check_pages(tmp_path) == []
    for text, problem in (
        ('<a href="sub/c.html">c</a>', "leads nowhere"),
        ('<a href="sub/b.html#there">b</a>', "leads nowhere"),
        ('<a href="#there">here</a>', "leads nowhere"),
        ('<img src="none.png">', "leads nowhere"),
        ('<script src="https://cdn.example.org/x.js"></script>', "another host"),
        ('<link rel="stylesheet" href="//fonts.example.org/x.css">', "another host"),
    ):
        page.write_text(text)
        assert len(found := check_pages(tmp_path)) == 1 and problem in found[0], text
    page.write_text("")
    (tmp_path / "x.css").write_text("@font-face { src: url('https://fonts.example.org/a.woff2') }")
    assert "another host" in check_pages(tmp_path)[0]
    assert "no" in check_pages(tmp_path / "empty")[0]
