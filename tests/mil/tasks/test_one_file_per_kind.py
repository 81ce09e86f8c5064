"""Behaviour by kind of task lives in mil/tasks: nobody else compares a kind, and every kind answers
all that the base class leaves open.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("kind", TASKS)
def test_every_kind_fills_in_what_its_bases_leave_open(kind):
    task = TASKS[kind]
    one_loss = {"loss"} if task.needs_all_bags else {"step_loss"}  # of a bag, or of a step's bags
    checked = 0
    for base in task.__mro__[1:-1]:
        for name, member in vars(base).items():
            function = getattr(member, "fget", None) or getattr(member, "__func__", member)
            code = getattr(function, "__code__", None)
            if code is not None and "NotImplementedError" in code.co_names:
                checked += 1
                found = next(vars(c)[name] for c in task.__mro__ if name in vars(c))
                assert found is not member or name in one_loss, f"{kind}: {name} is missing"
    assert checked > 8
