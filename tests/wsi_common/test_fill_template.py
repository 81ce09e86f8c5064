"""Pages from templates: text is escaped, nothing that is missing passes, the first folder wins."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from wsi_common import __version__
from wsi_common.pages import fill_template


def test_text_is_escaped_and_the_version_is_there(tmp_path: Path):
    (tmp_path / "a.html.j2").write_text(
        "{% if name %}\n<b>{{ name | loud }}</b>{% endif %}{{ version }}"
    )
    html = fill_template(tmp_path, "a.html.j2", name="<x>", filters={"loud": str.upper})
    assert html == f"<b>&lt;X&gt;</b>{__version__}"


def test_a_missing_value_is_an_error_and_the_first_folder_wins(tmp_path: Path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.html.j2").write_text(name + "{{ value(2) }}")
    folders = [tmp_path / "two", tmp_path / "one"]
    assert fill_template(folders, "a.html.j2", functions={"value": abs}) == "two2"
    with pytest.raises(UndefinedError):
        fill_template(folders, "a.html.j2")
