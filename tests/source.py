"""Our own source, each file read and parsed once per process, for the tests of its rules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from tests.helpers import ROOT

PACKAGES = ("wsi_common", "patch_encoder", "detection_kd", "mil", "studies")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@cache
def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text())


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of a file."""
    return tuple(ast.walk(parse(path)))


def dotted(path: Path) -> str:
    """The module's name."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(path: Path) -> str:
    """The folder below the package, or the file's own name for one at the package's root."""
    return path.relative_to(ROOT).with_suffix("").parts[1]


@cache
def own_imports(path: Path) -> frozenset[str]:
    """Modules of ours, and names in them, that a file imports anywhere in it."""
    return frozenset(name for name in _imports(path) if name.split(".")[0] in PACKAGES)


def _imports(path: Path) -> Iterator[str]:
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def defined(path: Path) -> set[str]:
    """Names of the classes and functions at the top of a file."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {node.name for node in parse(path).body if isinstance(node, kinds)}


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of every string that is not a docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    prose = {
        id(node.body[0].value)
        for node in nodes(path)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in nodes(path):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value


SCRIPTS = {dotted(path): path for path in MODULES if {"Config", "main"} <= defined(path)}
