"""The page of a real, tiny run: whole in itself, with every part, and one line for what is wrong."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from markupsafe import escape
from PIL import Image

from patch_encoder import pretrain_dino, pretrain_report
from patch_encoder.models.encoder_table import IMAGENET
from patch_encoder.models.encoders import PixelEncoder
from patch_encoder.pretrain_page.curves import PANELS, draw_panel, find_points
from patch_encoder.pretrain_page.run_folder import load_network, read_run
from patch_encoder.pretrain_page.tile_sample import read_sample
from patch_encoder.selfdistill.backbone import build_student_backbone
from patch_encoder.tile_stream.stream import TileStream
from tests.html_pages import PageChecker
from tests.training_rows import slides_inputs
from wsi_common.cli import run
from wsi_common.config import load_config
from wsi_common.errors import UserError


def train(folder: Path, *settings: str) -> Path:
    """A run of two epochs of six steps."""
    arguments = [*slides_inputs(folder), "epochs=2", f"output={folder}/run", *settings]
    assert run(pretrain_dino.main, pretrain_dino.Config, arguments) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus and the finished run of a ViT with a pyramid view."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, "pyramid.factor=2")
    return folder


def make_page(trained: Path, output: Path, *arguments: str) -> str:
    given = [f"run={trained}/run", f"output={output}", "tiles=40", "workers=0", "device=cpu"]
    config = load_config(pretrain_report.Config, [*given, *arguments])
    assert pretrain_report.main(config) == 0
    return (output / "pretraining.html").read_text()


def write_labelled(folder: Path) -> Path:
    rng = np.random.default_rng(1)
    for number in range(12):
        place = folder / ("dark", "light")[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        low = 150 * (number % 2)
        Image.fromarray(rng.integers(low, low + 100, (40, 30, 3), dtype=np.uint8)).save(place)
    return folder


def test_page_is_self_contained_and_has_its_parts(trained: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.csv"
    rows = [f"c{n},s{n},{('tumour <1>', 'normal')[n % 2]}\n" for n in range(6)]
    labels.write_text("case_id,slide_id,label\n" + "".join(rows))
    given = (f"labels={labels}", f"tile_set={write_labelled(tmp_path / 'set')}", "title=A & B")
    html = make_page(trained, tmp_path / "page", *given)
    checker = PageChecker()
    checker.feed(html)
    assert checker.open == []
    assert not re.search(r"(src|href)=\"(?!data:)", html) and "<script" not in html
    assert "http" not in re.sub(r"data:[^\"]*", "", html) and "url(" not in html
    assert "A &amp; B" in html and "tumour &lt;1&gt;" in html and "<1>" not in html

    found = checker.images
    for panel in PANELS:
        logged = panel.title not in ("k-NN probe", "Regularising terms")
        assert (panel.title in found) == logged and (escape(panel.healthy) in html) == logged
    for name in ("views of some tiles", "maps of some tiles"):
        (uri,) = found[name]
        content = base64.b64decode(uri.partition("base64,")[2])
        assert np.asarray(Image.open(io.BytesIO(content))).std() > 20, f"{name} is empty"
    assert sum("overview of slide" in name for name in found) == 1
    assert "planes of features of the run's tiles" in found
    assert "planes of features of labelled tiles" in found
    # queries and ten neighbours each: the first 40 tiles are of five slides, 6 pictures are queries
    tiles = sum(len(uris) for name, uris in found.items() if name.startswith("tile of"))
    assert tiles == 11 * (5 + 6) and html.count('class="same"') > 0
    assert html.count("by chance") == 2 and html.count("by mean colour") == 3
    assert "The attention of the class token" in html and "not those" not in html

    settings = yaml.safe_load((trained / "run" / "config.yaml").read_text())
    for name, value in settings["training"].items():
        assert f"<tr><td>{name}</td><td>{value}</td></tr>" in html
    environment = json.loads((trained / "run" / "environment.json").read_text())
    assert environment["started"] in html and environment["torch"] in html
    assert html == make_page(trained, tmp_path / "again", *given), "seeded"


def test_a_network_without_attention_says_so_and_a_changed_corpus_too(
    tmp_path: Path,
) -> None:
    train(tmp_path, "network.arch=timm:test_resnet", "network.out_dim=64")
    removed = tmp_path / "corpus" / "site0" / "s0.tiff"
    removed.unlink()
    (tmp_path / "run" / "results.json").unlink()
    html = make_page(tmp_path, tmp_path / "page", "tiles=20")
    assert "no attention to show" in html and "last feature map" in html
    assert "not those that the run was trained on" in html and "not finished" in html
    assert "5 slides" in html and "by chance" not in html and "Labelled tiles" not in html


def test_tiles_are_those_of_the_training(trained: Path) -> None:
    opened = read_run(trained / "run")
    sources = opened.settings.find({}, 0)
    sample = read_sample(opened.settings, sources, 21, workers=0, with_context=True)
    config = load_config(
        pretrain_dino.Config, ["--config", f"{trained}/run/config.yaml", "output=unused"]
    )
    plan = config.plan(sources, config.seed)
    stream = TileStream(plan, 7, context_factor=2)
    batches = list(stream.batches(0, 3))
    assert torch.equal(sample.tiles, torch.cat([batch.tiles for batch in batches]))
    assert sample.context is not None and sample.tiles.shape == sample.context.shape
    assert torch.equal(sample.context, torch.cat([batch.context for batch in batches]))
    names = [sources[slide].name for batch in batches for slide in batch.slides]
    assert sample.slides == names and sample.ids == [name.split("/")[1] for name in names]


def test_features_are_those_of_the_teacher(trained: Path) -> None:
    given = [f"run={trained / 'run'}", "output=unused", "workers=0", "device=cpu", "precision=fp32"]
    page = pretrain_report.open_page(load_config(pretrain_report.Config, given))
    pictures = np.random.default_rng(0).integers(0, 255, (3, 32, 32, 3), dtype=np.uint8)
    last = torch.load(trained / "run" / "checkpoint_last.pt", weights_only=True)
    weights = {
        name.removeprefix("backbone."): value
        for name, value in last["teacher"].items()
        if name.startswith("backbone.")
    }
    backbone = build_student_backbone("timm:test_vit", image_size=32)
    backbone.load_state_dict(weights)
    with torch.no_grad():
        tiles = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        expected = PixelEncoder(backbone, IMAGENET).eval()(tiles)
    np.testing.assert_allclose(page.encode(pictures), expected, rtol=1e-3, atol=1e-4)


def test_views_and_features_have_the_statistics_of_the_run(trained: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "backbone.pt"):
        (tmp_path / name).write_bytes((trained / "run" / name).read_bytes())
    described = json.loads((trained / "run" / "encoder.json").read_text())
    described |= {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    (tmp_path / "encoder.json").write_text(json.dumps(described))
    encoder, recipe = load_network(read_run(tmp_path))
    assert (recipe.mean, recipe.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    torch.testing.assert_close(encoder.mean.flatten() / 255, torch.tensor(recipe.mean))


def test_curves_take_steps_by_epoch_and_leave_out_what_is_not_finite() -> None:
    lines = [
        {"epoch": 1, "step": 0, "loss": 3.0, "teacher_entropy": 2.0},
        {"epoch": 1, "step": 5, "loss": None},
        {"epoch": 1, "loss": 2.5},
        {"epoch": 2, "step": 14, "loss": 2.0},
    ]
    within, epochs = find_points(lines, "loss", steps=10)
    assert within == [(0.1, 3.0), (1.5, 2.0)] and epochs == [(1, 2.5)]
    panels = {panel.title: panel for panel in PANELS}
    figure = draw_panel(panels["Entropy of the targets"], lines, 10, prototypes=64)
    assert figure is not None
    (axes,) = figure.axes
    assert [list(line.get_ydata()) for line in axes.lines] == [[2.0], [math.log(64)] * 2]
    assert draw_panel(panels["k-NN probe"], lines, 10, 64) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tiles=1",), "key 'tiles': expected at least 2, found 1"),
        (("slides=", "moved"), "slides=.*: expected an existing path.*give slides="),
        (("config", "network: 3"), "expected the settings of pretrain_dino"),
        (("config", "a: [1"), "expected YAML"),
        (("backbone", ""), "expected a run directory of pretrain_dino with config.yaml and backbo"),
        (("architecture", ""), "weights of another architecture"),
    ],
)
def test_what_cannot_be_shown_is_one_line(
    change: tuple[str, ...], message: str, trained: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.yaml", "backbone.pt", "encoder.json", "metrics.jsonl"):
        (folder / name).write_bytes((trained / "run" / name).read_bytes())
    config = folder / "config.yaml"
    given = [f"run={folder}", f"output={tmp_path}/page", "workers=0"]
    if change[0] == "config":
        config.write_text(change[1])
    elif change[0] == "backbone":
        (folder / "backbone.pt").unlink()
    elif change[0] == "slides=":
        config.write_text(config.read_text().replace("/corpus", "/moved"))
    elif change[0] == "architecture":
        described = folder / "encoder.json"
        described.write_text(described.read_text().replace("test_vit", "test_vit2"))
    else:
        given.append(change[0])
    with pytest.raises(UserError, match=message) as caught:
        pretrain_report.main(load_config(pretrain_report.Config, given))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "page" / "pretraining.html").exists()
