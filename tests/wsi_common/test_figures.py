"""Style, saving and data URIs of figures; importing a script never loads matplotlib."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest

from tests.helpers import ROOT
from wsi_common.figures import PALETTE, STYLE, line_style, new_figure, save_figure, styled, svg_uri


@styled()
def draw():
    figure = new_figure(2, 1.5)
    figure.add_subplot().plot([0, 1], [0, 1], label="line")
    return figure


def test_the_style_holds_inside_only():
    before = dict(matplotlib.rcParams)
    axes = draw().axes[0]
    assert not axes.spines["top"].get_visible() and axes.get_axisbelow() is True
    with styled():
        assert all(matplotlib.rcParams[name] == value for name, value in STYLE.items())
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize("form", ["png", "svg", "pdf"])
def test_one_figure_gives_the_same_bytes_twice(tmp_path: Path, form: str):
    first, second = (save_figure(draw(), tmp_path / f"{name}.{form}") for name in "ab")
    content = first.read_bytes()
    assert content == second.read_bytes()
    assert b"Matplotlib version" not in content or form != "png"
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"a.{form}", f"b.{form}"]


def test_svg_uri_is_the_saved_figure(tmp_path: Path):
    kind, content = svg_uri(draw()).split(",")
    assert kind == "data:image/svg+xml;base64"
    assert base64.b64decode(content) == save_figure(draw(), tmp_path / "a.svg").read_bytes()


def test_lines_differ_in_colour_or_dashes():
    looks = [tuple(line_style(index).values()) for index in range(24)]
    assert len(set(looks)) == 24 and line_style(24) == line_style(0)
    assert [look[0] for look in looks[:6]] == list(PALETTE)


def test_importing_scripts_does_not_load_matplotlib():
    scripts = ["mil.report", "mil.heatmap", "mil.evaluate", "detection_kd.train_detector"]
    scripts += ["detection_kd.evaluate_detector", "detection_kd.train_d2vfm"]
    scripts += [
        "patch_encoder.tile_slides",
        "patch_encoder.stain_preview",
        "studies.ablation_table",
    ]
    check = "; ".join(f"import {name}" for name in ["sys", *scripts])
    check += "; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
