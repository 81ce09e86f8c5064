"""Imports point down: common <- patch_encoder <- detection_kd | mil; scripts never import scripts,
losses never models.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

PACKAGES = ("common", "patch_encoder", "detection_kd", "mil")
ALLOWED = {
    "common": {"common"},
    "patch_encoder": {"common", "patch_encoder"},
    "detection_kd": {"common", "patch_encoder", "detection_kd"},
    "mil": {"common", "patch_encoder", "mil"},
}
# a folder may import from itself and from what stands left of it
LAYERS = ("ops", "losses", "datasets", "models")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] in PACKAGES}


def is_script(path: Path) -> bool:
    return 'if __name__ == "__main__":' in path.read_text()


SCRIPTS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES if is_script(path)
}


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 50
    assert {
        "detection_kd.train_detector",
        "mil.benchmark",
        "patch_encoder.extract_features",
    } <= SCRIPTS


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    package, folder = path.relative_to(ROOT).parts[:2]
    for name in own_imports(path):
        assert name.split(".")[0] in ALLOWED[package], f"{path} imports {name}"
        assert name not in SCRIPTS, f"{path} imports the script {name}"
    if folder not in LAYERS:
        return
    for name in own_imports(path):
        parts = name.split(".")
        if parts[0] != package or len(parts) < 2 or parts[0] == "common":
            continue
        inside = parts[1] in LAYERS
        assert (
            inside
            or not (ROOT / package / f"{parts[1]}.py").is_file()
            or parts[1] not in {"engine"}
        ), f"{path} imports {name}"
        if folder in {"losses", "ops"} and inside:
            assert parts[1] in {"ops", folder}, f"{path}: a {folder} module imports {name}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_no_import_cycles() -> None:
    graph = {}
    for path in MODULES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = own_imports(path) - {name}
    graph = {
        name: {target for target in targets if target in graph} for name, targets in graph.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in graph[name]:
                # a package's __init__ that re-exports its own modules is no cycle of theirs
                if not name.startswith(f"{target}."):
                    visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_stages_start_without_what_they_may_never_use() -> None:
    """Each of these takes about as long to load as torch: a stage over finished work, a worker or
    --help would wait for it.
    """
    stages = (
        "patch_encoder.tile_slides, patch_encoder.extract_features, mil.train, mil.rank_patches"
    )
    heavy = (
        "{'torch._dynamo', 'torchvision', 'timm', 'open_clip', 'transformers', 'pandas', "
        "'sklearn', 'scipy.stats'}"
    )
    code = f"import sys, {stages}\nprint(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_no_unsafe_loading_and_no_bare_except() -> None:
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
                f"{path}:{node.lineno}: bare except"
            )
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in {"eval", "exec", "pickle.load", "pickle.loads", "os.system"}, (
                    f"{path}:{node.lineno}: {called}"
                )
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert called != "torch.load" or keywords.get("weights_only") == "True", (
                    f"{path}:{node.lineno}: torch.load"
                )
