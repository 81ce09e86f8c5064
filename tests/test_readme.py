"""The README matches the tree: every file has its line, every path that a command names is there."""

from __future__ import annotations

import re
import subprocess
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [name for name in listed if not name.endswith("__init__.py") and name != ".gitignore"]


def tree() -> list[str]:
    """Paths of the file tree, from its indentation."""
    block = re.search(r"```\n(README\.md.*?)```", README, re.DOTALL)
    assert block
    paths, top = [], ""
    for line in block[1].splitlines():
        name = line.split()[0] if line.strip() else ""
        if re.match(r"^\S", line):
            top = name if name.endswith("/") else ""
            paths.append(name)
        elif re.match(r"^  \S", line):
            paths.append(top + name)
    return paths


def test_every_file_has_its_line_and_every_line_its_file() -> None:
    listed = tree()
    files = tracked()
    for name in files:
        picture = name.startswith("images/") and "images/" in listed
        assert picture or any(fnmatch(name, path) for path in listed), f"{name} has no line"
    for path in listed:
        assert any(fnmatch(name, path) or (path.endswith("/") and name.startswith(path)) for name in files), path


def test_each_file_has_one_line_in_order() -> None:
    """Alphabetical within a folder, files before folders: two branches that add a file clash instead of doubling it."""
    listed = tree()
    assert not [path for path in set(listed) if listed.count(path) > 1]
    tops = [path for path in listed if path.endswith("/")]
    for top in tops:
        inside = [path[len(top) :] for path in listed if path.startswith(top) and path != top]
        assert inside == sorted(inside, key=lambda path: ("/" in path, path.rpartition("/")[0], path)), top


def test_no_sentence_is_said_twice() -> None:
    sentences = [" ".join(text.split()) for text in re.split(r"(?<=[.:;])\s", README.split("## The house")[0])]
    long = [text for text in sentences if len(text) > 25 and "|" not in text]
    assert not [text for text in set(long) if long.count(text) > 1]


def test_commands_name_files_that_exist() -> None:
    for path in re.findall(r"(?:tools|configs)/[\w./-]+\.(?:sh|sbatch|yaml)", README):
        assert (ROOT / path).is_file(), path


def test_no_placeholder_is_left() -> None:
    assert "PLACEHOLDER" not in README
