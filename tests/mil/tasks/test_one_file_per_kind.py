"""Behaviour by kind of task lives in mil/tasks: nobody else compares a kind."""

from __future__ import annotations

import ast
from pathlib import Path

from mil.tasks.table import TASKS

MIL = Path(__file__).parents[3] / "mil"
KINDS = {*TASKS, "binary", "multiclass"}


def strings(nodes) -> set[object]:
    return {n.value for n in nodes if isinstance(n, ast.Constant)} & KINDS


def test_nobody_else_compares_a_kind():
    found = []
    for path in (path for path in MIL.rglob("*.py") if path.parent != MIL / "tasks"):
        for node in ast.walk(ast.parse(path.read_text())):
            compared = isinstance(node, ast.Compare) and strings(ast.walk(node))
            by_kind = isinstance(node, ast.Dict) and len(strings(filter(None, node.keys))) > 1
            if compared or by_kind:
                found.append(f"{path.relative_to(MIL)}:{node.lineno}")
    found += [path.name for path in MIL.glob("templates/*.j2") if "task.kind" in path.read_text()]
    assert not found
