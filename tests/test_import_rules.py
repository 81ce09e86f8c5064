"""Imports point down: wsi_common <- patch_encoder <- detection_kd | mil <- studies, and inside a package
from scripts to operators; and nothing heavy is imported before it is used.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.source import MODULES, PACKAGES, SCRIPTS, dotted, nodes, own_imports, room, strings

ALLOWED = {
    "wsi_common": {"wsi_common"},
    "patch_encoder": {"wsi_common", "patch_encoder"},
    "detection_kd": {"wsi_common", "patch_encoder", "detection_kd"},
    "mil": {"wsi_common", "patch_encoder", "mil"},
    "studies": set(PACKAGES),
}
# a room imports from rooms of smaller numbers only; heatmaps use the figures of reports
ROOMS = {
    "wsi_common": {},
    "patch_encoder": {
        "slides": 0,
        "descriptors": 0,
        "tiles": 1,
        "bags": 2,
        "stain": 2,
        "tissue": 2,
        "viz": 3,
        "models": 3,
        "demo": 3,
        "extraction": 5,
        "selfdistill": 5,
        "regions": 5,
        "cohort": 4,
        "viewer": 5,
        "tile_stream": 5,
        "probing": 6,
        "pretraining": 7,
        "prototypes": 8,
        "slide_encoders": 9,
        "pretrain_page": 8,
        "region_page": 9,
    },
    "detection_kd": {"ops": 0, "losses": 1, "datasets": 2, "models": 3, "evaluation": 5},
    "mil": {"ops": 0, "losses": 1, "datasets": 2, "models": 3, "tasks": 4, "training": 5},
}
ROOMS["detection_kd"] |= {"mitosis_sets": 2, "graded_patches": 2, "fields": 3, "box_sets": 3}
ROOMS["detection_kd"] |= {"grading": 6, "whole_slides": 7, "figures": 8}
ROOMS["mil"] |= {"evaluation": 5, "classic": 6, "figures": 6, "heatmaps": 7, "ensembles": 8}
NAMES_A_MODULE = re.compile(r"\b(patch_encoder|detection_kd|mil|studies|benchmarks)\.[a-z_]\w*")
# a library that takes about as long to load as torch, or most of a second
HEAVY = {"torch._dynamo", "torchvision", "timm", "open_clip", "transformers", "pandas", "sklearn"}
HEAVY |= {"scipy.stats", "scipy.optimize", "skimage", "pycocotools", "matplotlib"}


def test_there_is_something_to_check() -> None:
    assert len(MODULES) > 50
    assert {"detection_kd.train_detector", "mil.benchmark"} <= SCRIPTS.keys()
    assert {"patch_encoder.extract_features", "studies.ablation"} <= SCRIPTS.keys()


def test_packages_import_and_name_only_what_stands_below_them() -> None:
    for path in MODULES:
        allowed = ALLOWED[path.relative_to(ROOT).parts[0]]
        for name in own_imports(path):
            assert name.split(".")[0] in allowed, f"{path} imports {name}"
        for line, text in strings(path):
            for package in NAMES_A_MODULE.findall(text):
                assert package in allowed, f"{path}:{line} names a module of {package}: {text!r}"


# a study of a hundred short trainings runs their scripts in its own process, through one file
RUN_SCRIPTS = {
    "studies.ablation_table": {"studies.ablation"},
    "studies.region_tables.stages": {
        *("patch_encoder.build_regions", "patch_encoder.pretrain_slpd", "mil.benchmark"),
        *("patch_encoder.demo.compose_mitoses", "detection_kd.train_mitosis"),
        *("detection_kd.filter_samples", "detection_kd.train_detector"),
        "detection_kd.evaluate_detector",
    },
}


def test_scripts_never_import_scripts() -> None:
    for path in MODULES:
        found = own_imports(path) & SCRIPTS.keys()
        allowed = RUN_SCRIPTS.get(dotted(path), set())
        assert found <= allowed, f"{path} imports the scripts {sorted(found)}"


@pytest.mark.parametrize("package", ROOMS)
def test_rooms_import_only_from_rooms_below_them(package: str) -> None:
    ranks = ROOMS[package]
    for path in (path for path in MODULES if path.relative_to(ROOT).parts[0] == package):
        here = room(path)
        if here not in ranks:
            assert not ranks or path.parent == ROOT / package, f"{path}: give the room its place"
            continue
        for name in own_imports(path):
            there, depth = (*name.split("."), "")[1], len(name.split("."))
            if not name.startswith(f"{package}.") or there == here:
                continue
            assert there in ranks, f"{path} imports {name} of the package's root"
            assert depth < 2 or ranks[there] < ranks[here], f"{path} imports {name}"


def test_no_import_cycles() -> None:
    graph = {dotted(path): own_imports(path) - {dotted(path)} for path in MODULES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for target in graph[name] & graph.keys():
                # a package's __init__ that re-exports its own modules is no cycle of theirs
                if not name.startswith(f"{target}."):
                    visit(target, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.process
def test_no_script_starts_with_what_it_may_never_use() -> None:
    """A stage over finished work, a worker or --help would wait for it."""
    code = f"""
import importlib, sys
for script in {sorted(SCRIPTS)}:
    importlib.import_module(script)
    found = {HEAVY} & set(sys.modules)
    assert not found, f"importing {{script}} loads {{sorted(found)}}"
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.process
@pytest.mark.parametrize("script", ["detection_kd.split_coco", "studies.ablation"])
def test_scripts_without_tensors_start_without_torch(script: str) -> None:
    code = f"import sys, {script}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_unsafe_loading_and_no_bare_except() -> None:
    for path in MODULES:
        for node in nodes(path):
            assert not (isinstance(node, ast.ExceptHandler) and node.type is None), (
                f"{path}:{node.lineno}: bare except"
            )
            if isinstance(node, ast.Call):
                check_call(path, node)


def check_call(path: Path, node: ast.Call) -> None:
    """No code from data, and tensors are loaded as tensors only."""
    called, place = ast.unparse(node.func), f"{path}:{node.lineno}"
    unsafe = {"eval", "exec", "pickle.load", "pickle.loads", "os.system"}
    assert called not in unsafe, f"{place}: {called}"
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    assert called != "torch.load" or keywords.get("weights_only") == "True", f"{place}: torch.load"
