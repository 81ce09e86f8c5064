"""Writes the reference pages that the code itself knows best: keys, encoders, modules.

They are made anew at every build (`docs/conf.py` calls `write_reference`) and git ignores them, so
that they cannot fall behind the code.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Any

from wsi_common.config import REQUIRED, _fields, _type_name
from wsi_common.files import write_text

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools"
PACKAGES = ("wsi_common", "patch_encoder", "detection_kd", "mil", "studies", "benchmarks")


@dataclass(frozen=True)
class Key:
    """One key of one script, as text for a table."""

    name: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Script:
    """A program that one starts with `python -m <module>`, and the shell scripts that start it."""

    module: str
    docstring: str
    shells: list[str]
    keys: list[Key]


def write_reference(folder: Path) -> None:
    """Write `keys.md`, `keys/`, `encoders.md`, `modules.md` and `modules/` below `folder`."""
    pages = {"encoders.md": encoder_page()} | key_pages(find_scripts()) | module_pages()
    for name, text in pages.items():
        path = folder / name
        # Sphinx reads a page again when its file is newer, so that an unchanged one is left alone
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            write_text(path, text)
    for kind in ("keys", "modules"):
        for path in (folder / kind).glob("*.md"):
            if f"{kind}/{path.name}" not in pages:
                path.unlink()


# --- keys -----------------------------------------------------------------------------------------


def find_scripts() -> list[Script]:
    """Every module that calls `launch(main, Config)`, in the order of the packages."""
    shells = shell_scripts()
    found = []
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))):
        text = path.read_text(encoding="utf-8")
        if re.search(r"^    launch\(main, Config\)$", text, re.MULTILINE):
            name = module_name(path)
            module = importlib.import_module(name)
            keys = [
                Key(key, _type_name(hint), default_text(field), meaning_text(field))
                for key, hint, field in _fields(module.Config)
            ]
            found.append(Script(name, module.__doc__ or "", shells.get(name, []), keys))
    return found


def shell_scripts() -> dict[str, list[str]]:
    """The files of `tools/` that run a module, by the module's name; those that only call another
    one, TS2G-KD's own names, come last.
    """
    found = defaultdict(list)
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(TOOLS.rglob("*.sh"))}
    for path, text in texts.items():
        for name in re.findall(r"^ *run_(?:module|python|shards) ([\w.]+)", text, re.MULTILINE):
            found[name].append(str(path.relative_to(ROOT)))
    for path, text in texts.items():
        called = re.search(r"^exec bash .*/(\w+\.sh)\"", text, re.MULTILINE)
        for shells in found.values() if called else ():
            if called and f"tools/{called[1]}" in shells:
                shells.append(str(path.relative_to(ROOT)))
    return found


def default_text(field: Field[Any]) -> str:
    """The default as one writes it in YAML."""
    default = field.default_factory() if field.default is MISSING else field.default
    if default == REQUIRED:
        return "required"
    if default is None or isinstance(default, bool):
        return {None: "null", True: "true", False: "false"}[default]
    return str(default) if default != "" else "empty"


def meaning_text(field: Field[Any]) -> str:
    """The help text, with the values that the key may have."""
    choices = [choice for choice in field.metadata["choices"] or () if choice]
    return field.metadata["help"] + (f" (one of {', '.join(choices)})" if choices else "")


def key_pages(scripts: Sequence[Script]) -> dict[str, str]:
    """An index with every key and the scripts that have it, and one page per script."""
    pages = {f"keys/{page_name(script.module)}.md": script_page(script) for script in scripts}
    rows = [
        (
            " ".join(
                f"[{code(start)}](keys/{page_name(script.module)}.md)"
                for start in script.shells or [f"-m {script.module}"]
            ),
            escape(first_paragraph(script.docstring)),
        )
        for script in scripts
    ]
    users = defaultdict(list)
    for script in scripts:
        for key in script.keys:
            users[key.name].append((script, key))
    meanings = [
        (
            code(name),
            escape(" · ".join(dict.fromkeys(key.meaning for _, key in found))),
            ", ".join(
                f"[{script.module.split('.')[-1]}](keys/{page_name(script.module)}.md)"
                for script, _ in found
            ),
        )
        for name, found in sorted(users.items())
    ]
    pages["keys.md"] = "\n\n".join(
        [
            "# Scripts and their keys",
            "Every script takes `--config FILE.yaml` and `key=value`, and prints its keys with "
            "`--help`. A value on the command line wins over the file, and the file over the "
            "default. A name with a dot belongs to a block: `training.lr=1e-4` on the command "
            "line is `training:` with `lr: 1e-4` below it in YAML. This page and those below it "
            "are written from the code at every build.",
            "## Scripts",
            table(("script", "what it does"), rows),
            "## Every key and the scripts that have it",
            table(("key", "meaning", "scripts"), meanings),
            toctree(f"keys/{page_name(script.module)}" for script in scripts),
        ]
    )
    return pages


def script_page(script: Script) -> str:
    """What the script does, what starts it, and a table of its keys."""
    starts = [f"bash {shell} [key=value ...]" for shell in script.shells]
    starts.append(f".venv/bin/python -m {script.module} [--config FILE.yaml] [key=value ...]")
    return "\n\n".join(
        [
            f"# {script.module}",
            escape(first_paragraph(script.docstring)),
            "```console\n" + "\n".join(starts) + "\n```",
            table(
                ("key", "type", "default", "meaning"),
                [
                    (code(key.name), escape(key.type), code(key.default), escape(key.meaning))
                    for key in script.keys
                ],
            ),
        ]
    )


# --- encoders -------------------------------------------------------------------------------------


def encoder_page() -> str:
    """The encoder table, and the names that a library resolves."""
    from patch_encoder.models.encoder_names import PATTERNS
    from patch_encoder.models.encoder_table import ALIASES, ENCODERS
    from patch_encoder.slide_encoders.table import SLIDE_ENCODERS

    rows = [
        (
            code(name),
            str(row.width),
            str(row.fit.size),
            "any" if row.mpp is None else f"{row.mpp:g}",
            escape(row.licence) + (" (gated)" if row.gated else ""),
            row.library,
            row.precision,
            code(row.place) if row.weights else "none needed, or a file",
            escape(row.citation),
        )
        for name, row in ENCODERS.items()
    ]
    head = ("name", "width", "px", "um/px", "licence", "library", "precision", "weights", "source")
    slides = [
        (
            code(name),
            "-" if row.width is None else str(row.width),
            ", ".join(map(code, row.tile_encoders)) or "any",
            "any" if row.mpp is None else f"{row.tile} px, {row.mpp:g} um/px",
            (escape(row.licence) or "-") + (" (gated)" if row.gated else ""),
            "code of its authors" if row.remote_code else "rebuilt here",
            code(row.weights) if row.weights else "none needed, or a file",
            escape(row.citation) or "-",
        )
        for name, row in SLIDE_ENCODERS.items()
    ]
    slide_head = ("name", "width", "tile encoder", "tiles", "licence", "how", "weights", "source")
    return "\n\n".join(
        [
            "# Encoders",
            f"These {len(rows)} names can be given as `encoder=`. *px* is the side of the input, "
            "and *um/px* the resolution that the encoder was trained for. The licence is that of "
            "the weights; *gated* weights ask you to accept it on their page before they can be "
            "fetched. This page is written from `patch_encoder/models/encoder_table.py` at every "
            "build; `bash tools/list_encoders.sh` prints the same in a terminal.",
            f"Further names: {', '.join(map(code, PATTERNS))}.",
            "Names of TRIDENT and STAMP for the same encoders: "
            + ", ".join(f"{code(other)} for {code(name)}" for other, name in ALIASES.items())
            + ".",
            table(head, rows),
            "## Slide encoders",
            "These names can be given as `slide_encoder=` of `tools/encode_slides.sh`; the "
            "[guide](../guides/slide_encoders.md) says more.",
            table(slide_head, slides),
        ]
    )


# --- modules --------------------------------------------------------------------------------------


def module_pages() -> dict[str, str]:
    """One page per package: each room, and the first paragraph of each module's docstring."""
    pages = {f"modules/{name}.md": package_page(name) for name in PACKAGES}
    rows = [
        (f"[{code(name)}](modules/{name}.md)", escape(docstring(ROOT / name / "__init__.py")))
        for name in PACKAGES
    ]
    pages["modules.md"] = "\n\n".join(
        [
            "# Modules",
            "What each file of the code is for, in the words of its own docstring.",
            table(("package", "what it is"), rows),
            toctree(f"modules/{name}" for name in PACKAGES),
        ]
    )
    return pages


def package_page(package: str) -> str:
    """The rooms of a package, the package itself first."""
    rooms = defaultdict(list)
    for path in sorted((ROOT / package).rglob("*.py")):
        rooms[path.parent].append(path)
    parts = [f"# {package}"]
    for room, paths in sorted(rooms.items()):
        if room != ROOT / package:
            parts.append(f"## {room.relative_to(ROOT)}")
        about = docstring(room / "__init__.py")
        rows = [
            (code(path.name), escape(docstring(path)))
            for path in paths
            if path.name != "__init__.py"
        ]
        parts += [escape(about)] if about else []
        parts += [table(("module", "what it is"), rows)] if rows else []
    return "\n\n".join(parts)


def docstring(path: Path) -> str:
    """The first paragraph of a module's docstring, empty where there is no file."""
    if not path.is_file():
        return ""
    return first_paragraph(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")


# --- Markdown -------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def toctree(pages: Iterable[str]) -> str:
    return "\n".join(["```{toctree}", ":hidden:", "", *pages, "```"])


def code(text: str) -> str:
    """Text as code within a table."""
    return f"`{text}`".replace("|", "\\|") if text else "-"


def escape(text: str) -> str:
    """Plain text for a table: what Markdown would take for markup is shown, code stays code."""
    parts = text.split("`")
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"([\\*_\[\]<>$#])", r"\\\1", parts[index])
    return "`".join(parts).replace("|", "\\|").replace("\n", " ")


def first_paragraph(text: str) -> str:
    return " ".join(text.strip().split("\n\n")[0].split())


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def page_name(module: str) -> str:
    return module.replace(".", "-")


if __name__ == "__main__":
    sys.exit(write_reference(ROOT / "docs" / "reference"))
