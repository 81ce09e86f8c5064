"""HTML pages from Jinja templates: all text is escaped, and a name that is missing is an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from wsi_common import __version__


def make_environment(
    *folders: Path,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    functions: Mapping[str, Callable[..., Any]] | None = None,
) -> Environment:
    """The templates of some folders, of which the first has precedence.

    Args:
        folders: of `<name>.html.j2`.
        filters: further filters by name.
        functions: that templates may call, by name.
    """
    made = Environment(
        loader=FileSystemLoader([str(folder) for folder in folders]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= dict(filters or {})
    made.globals |= {"version": __version__, **(functions or {})}
    return made


def fill_template(
    folders: Path | Sequence[Path],
    template: str,
    *,
    filters: Mapping[str, Callable[..., Any]] | None = None,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    **values: Any,
) -> str:
    """The HTML of a template; `version` is there without being given.

    Args:
        folders: of templates.
        template: file name in them.
        filters, functions: as for `make_environment`.
        values: what the template shows.
    """
    places = [folders] if isinstance(folders, Path) else folders
    environment = make_environment(*places, filters=filters, functions=functions)
    return environment.get_template(template).render(**values)
