"""Where things are and what they are called: scripts at the roots, rooms of a few files, one class
per name, one meaning per key.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import re
from collections import defaultdict

from tests.helpers import ROOT
from tests.source import MODULES, SCRIPTS, defined, parse

SYSTEMS = ("patch_encoder", "detection_kd", "mil", "studies")
# rooms that are smaller or larger than others, and why
SIZES = {
    "wsi_common/processes": "one supervised pool",
    "detection_kd/models": "networks of four systems: detector, student, localiser, graders",
    "detection_kd/ops": "one operator",
    "mil/models": "a file per published model",
    "patch_encoder/viz": "overlays and their captions",
    "studies/ablations": "one table and its figure",
}


def test_files_at_the_root_of_a_package_are_scripts_or_its_engine() -> None:
    starters = {path.stem for path in (ROOT / "tools").rglob("*.sh")}
    for path in (path for path in MODULES if path.parent.name in SYSTEMS):
        if path.stem in {"__init__", "engine"} or path.parent.parent != ROOT:
            continue
        assert {"Config", "main"} <= defined(path), f"{path} is no script"
        assert {path.stem, f"mil_{path.stem}"} & starters, f"tools/{path.stem}.sh is not there"


def test_rooms_have_4_to_15_files() -> None:
    rooms = defaultdict(set)
    for path in MODULES:
        inside = path.relative_to(ROOT).parts
        if len(inside) > 2 and path.stem != "__init__":
            rooms["/".join(inside[:2])].add(inside[2])
    odd = {name for name, files in rooms.items() if not 4 <= len(files) <= 15}
    assert odd <= SIZES.keys(), f"split or join {sorted(odd - SIZES.keys())}, or say why not"


def test_every_module_says_what_it_is() -> None:
    for path in MODULES:
        assert ast.get_docstring(parse(path)), f"{path} has no docstring"


def test_one_class_has_one_name() -> None:
    places = defaultdict(list)
    for path in MODULES:
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef) and node.name != "Config":
                places[node.name].append(str(path.relative_to(ROOT)))
    assert not {name: paths for name, paths in places.items() if len(paths) > 1}


def test_one_key_has_one_meaning() -> None:
    """The type of a key, or of its items, and its help text up to the first semicolon (what
    follows is how the one script uses it) are the same in all scripts.
    """
    found = defaultdict(lambda: defaultdict(list))
    for script in sorted(SCRIPTS):
        for field in dataclasses.fields(importlib.import_module(script).Config):
            kind = re.sub(r"list\[(\w+)\]|(\w+) \| None", r"\1\2", str(field.type))
            kind = "block" if kind[:1].isupper() else kind
            found[field.name][kind, field.metadata["help"].split(";")[0]].append(script)
    clashes = {name: dict(ways) for name, ways in found.items() if len(ways) > 1}
    assert not clashes
