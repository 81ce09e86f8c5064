"""The script that probes encoders: tables, controls, intervals; finished work is reused or refused."""

from __future__ import annotations

import csv
import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from patch_encoder.bags.writer import write_bag
from patch_encoder.probe_tiles import Config, main
from patch_encoder.probing import encoders
from patch_encoder.probing.encoders import CONTROLS, choose_encoders
from patch_encoder.probing.report import HEADER
from patch_encoder.probing.scores import TilePredictions, evaluate, score_runs
from wsi_common.cli import run
from wsi_common.errors import UserError

TINY = "timm:test_vit"  # 306 thousand parameters
COMMON = ["workers=0", "resamples=200", "precision=fp32"]


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    """Two classes of 15 noisy pictures, of which the second is redder on the whole."""
    random = np.random.default_rng(0)
    for index in range(30):
        pixels = random.integers(60, 160, (24, 24, 3))
        pixels[..., 0] += 30 * (index % 2) + random.integers(0, 40)
        folder = tmp_path / "tiles" / ("normal", "tumour")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"p{index:02d}.png")
    return tmp_path / "tiles"


@pytest.fixture
def colour_controls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the controls that cost nothing."""
    monkeypatch.setattr(encoders, "CONTROLS", ("mean_colour", "colour_statistics"))


def probe(output: Path, *arguments: str) -> int:
    return run(main, Config, [f"output={output}", *COMMON, *arguments])


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_tables_with_controls_intervals_and_a_reference(
    tiles: Path, tmp_path: Path, no_rendering: None
) -> None:
    output = tmp_path / "probe"
    given = (f"tile_set={tiles}", "encoders=[stain_texture, mean_colour]", "folds=3")
    assert probe(output, *given) == 0
    rows = read_csv(output / "probe.csv")
    assert list(rows[0]) == HEADER
    assert [row["encoder"] for row in rows if row["probe"] == "knn"][:2] == [
        "stain_texture",
        "mean_colour",
    ]
    assert {row["encoder"] for row in rows} >= set(CONTROLS) - {"imagenet_lite0"}
    by_name = {(row["probe"], row["encoder"]): row for row in rows}
    colour = by_name["linear", "mean_colour"]
    assert float(colour["auc"]) > 0.7 and colour["control"] == "True"
    low, high = float(colour["auc_ci_low"]), float(colour["auc_ci_high"])
    assert low < float(colour["auc"]) <= high
    for name in ("auc", "average_precision", "balanced_accuracy"):
        own = by_name["linear", "stain_texture"]
        assert float(own[f"{name}_difference"]) == 0 and own[f"{name}_difference_ci_low"] == ""
        difference = float(colour[name]) - float(own[name])
        assert float(colour[f"{name}_difference"]) == pytest.approx(difference)
    predictions = read_csv(output / "predictions.csv")
    mine = [r for r in predictions if (r["probe"], r["encoder"]) == ("linear", "mean_colour")]
    assert sorted(row["tile"] for row in mine) == sorted(
        path.relative_to(tiles).as_posix() for path in tiles.rglob("*.png")
    )
    assert all(float(r["prob_normal"]) + float(r["prob_tumour"]) == pytest.approx(1) for r in mine)
    text = (output / "probe.md").read_text()
    assert "| linear | *mean_colour* | 3 |" in text and "difference to stain_texture" in text
    assert "30 tiles (normal 15, tumour 15; positive: tumour) of 30 groups, 3 folds." in text
    results = json.loads((output / "results.json").read_text())
    assert results["classes"] == ["normal", "tumour"] and len(results["rows"]) == len(rows)
    assert (output / "probe.png").is_file()


def test_finished_work_is_reused_and_other_tiles_or_settings_are_refused(
    tiles: Path,
    tmp_path: Path,
    no_rendering: None,
    colour_controls: None,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output, given = tmp_path / "probe", (f"tile_set={tiles}", "probes=[knn]", "folds=3")
    assert probe(output, *given) == 0
    made = {path: path.stat().st_mtime_ns for path in output.rglob("*.*")}
    with caplog.at_level(logging.INFO):
        assert probe(output, *given, "batch_size=7") == 0
    assert "nothing to do" in caplog.text
    kept = ("probe.csv", "predictions.csv", "features/mean_colour-0.pt")
    assert all((output / n).stat().st_mtime_ns == made[output / n] for n in kept)
    assert probe(output, *given, "knn.k=3") == 2
    assert "knn.k 20 -> 3" in capsys.readouterr().err
    # features that are there serve the other settings, too
    assert probe(output, *given, "knn.k=3", "overwrite=true") == 0
    features = output / "features" / "mean_colour-0.pt"
    assert features.stat().st_mtime_ns == made[features]
    Image.new("RGB", (24, 24), (9, 9, 9)).save(tiles / "normal" / "p00.png")
    assert probe(output, *given, "knn.k=3") == 2
    assert "holds another run: inputs.tiles" in capsys.readouterr().err
    assert probe(output, *given, "knn.k=3", "overwrite=true") == 0
    assert features.stat().st_mtime_ns != made[features], "features of other pixels"


def test_an_interrupted_run_goes_on_from_its_features(
    tiles: Path,
    tmp_path: Path,
    no_rendering: None,
    colour_controls: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output, given = tmp_path / "probe", (f"tile_set={tiles}", "probes=[knn]", "folds=3")
    with monkeypatch.context() as patch:
        patch.setattr("patch_encoder.probe_tiles.write_results", lambda *_: None)
        assert probe(output, *given) == 0
    (output / "features" / "colour_statistics-0.pt").write_bytes(b"cut")
    before = (output / "features" / "mean_colour-0.pt").stat().st_mtime_ns
    assert probe(output, *given) == 0
    assert (output / "features" / "mean_colour-0.pt").stat().st_mtime_ns == before
    assert (output / "results.json").is_file()


def test_a_network_is_probed_beside_itself_untrained_and_fine_tuned(
    tiles: Path, tmp_path: Path, no_rendering: None, colour_controls: None
) -> None:
    import timm

    torch.manual_seed(7)
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    torch.save(state, tmp_path / "trained.pt")
    output, spec = tmp_path / "probe", f"{TINY}={tmp_path}/trained.pt"
    given = (
        f"tile_set={tiles}", f"encoders=[{spec}]", "random_starts=2", "folds=2",
        "probes=[knn, fine_tune]", "fine_tune.epochs=1",
    )  # fmt: skip
    assert probe(output, *given) == 0
    rows = read_csv(output / "probe.csv")
    label = f"{TINY}={tmp_path.name}/trained.pt"
    tuned = {row["encoder"]: row for row in rows if row["probe"] == "fine_tune"}
    assert list(tuned)[:2] == [label, f"{label}, random weights"]
    assert len(tuned) == 2, "classical descriptors have nothing to train"
    assert (tuned[label]["runs"], tuned[f"{label}, random weights"]["runs"]) == ("2", "4")
    starts = [output / "features" / f.name for f in (output / "features").glob("*random_weights*")]
    first, second = (torch.load(path, weights_only=True)["array"] for path in sorted(starts))
    assert first.shape == (30, 64) and not torch.equal(first, second), "two random networks"
    # a change of the file that is meant by the same name is noticed
    torch.save({name: value + 1 for name, value in state.items()}, tmp_path / "trained.pt")
    assert probe(output, *given) == 2


def test_stored_bags_are_looked_up_by_place(
    tmp_path: Path, no_rendering: None, capsys: pytest.CaptureFixture[str]
) -> None:
    random, lines = np.random.default_rng(0), ["slide_id,x,y,label,case_id"]
    bags = tmp_path / "features" / "mean_colour" / "h5_files"
    for slide in range(12):
        coords = np.array([[x, y] for x in (0, 64) for y in (0, 64)])
        values = random.normal(size=(4, 3)) + slide % 2
        values[3] = 1e3  # a tile without a label, which nobody may read
        attributes = {"patch_size": 64, "patch_level": 0, "patch_size_level0": 64}
        attributes |= {"level0_width": 128, "level0_height": 128}
        write_bag(bags / f"S{slide:02d}.h5", values.astype(np.float32), coords, attributes)
        lines += [
            f"S{slide:02d},{x},{y},{'ab'[slide % 2]},C{slide // 2 * 2 + slide % 2}"
            for x, y in coords[[2, 0, 1]]
        ]
    table = tmp_path / "places.csv"
    table.write_text("\n".join(lines) + "\n")
    output = tmp_path / "probe"
    given = (f"tile_set={table}", f"features=[{bags.parent}]", "folds=3")
    assert probe(output, *given) == 0
    rows = {row["probe"]: row for row in read_csv(output / "probe.csv")}
    assert float(rows["linear"]["auc"]) > 0.8 and rows["linear"]["control"] == "True"
    table.write_text("\n".join([*lines, "S00,32,0,a,C0"]) + "\n")
    assert probe(tmp_path / "other", *given) == 2
    assert "found 1 of 4 that are none, first x=32 y=0" in capsys.readouterr().err
    table.write_text("\n".join([*lines, "S99,0,0,a,C0"]) + "\n")
    assert probe(tmp_path / "other", *given) == 2
    assert "1 missing, first 'S99'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["encoders=[resnet51]"], "did you mean 'resnet50'"),
        (["encoders=[mean_colour, mean_colour]"], "mean_colour twice"),
        (["reference=resnet50"], "reference=resnet50: expected a row of the table"),
        (["folds=40"], "found normal: 15, tumour: 15"),
        (["knn.k=0"], "knn.k=0: expected at least 1"),
        (["knn.temperature=0"], "knn.temperature=0.0: expected more than 0"),
        (["probes=[]"], "probes=[]: expected at least one"),
        (["probes=[knn, knn]"], "and each once"),
        (["features=[.]", "encoders=[mean_colour]"], "expected no encoders"),
        (["features=[.]"], "expected a CSV slide_id,x,y,label beside features="),
        (["probes=[svm]"], "expected one of knn, linear, fine_tune"),
    ],
)
def test_bad_settings_are_one_line(
    arguments: list[str],
    message: str,
    tiles: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert probe(tmp_path / "probe", f"tile_set={tiles}", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "probe").exists()


def test_a_broken_picture_is_named(
    tiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiles / "normal" / "p00.png").write_bytes(b"broken")
    assert probe(tmp_path / "probe", f"tile_set={tiles}", "folds=3", "workers=1") == 2
    assert "normal/p00.png: expected a picture" in capsys.readouterr().err


def test_the_controls_stand_beside_every_encoder() -> None:
    labels = [probed.label for probed in choose_encoders(["resnet50", "dino=a/b/c.pt"], 3)]
    assert labels[:2] == ["resnet50", "dino=b/c.pt"]
    assert labels[2:4] == ["resnet50, random weights", "dino=b/c.pt, random weights"]
    assert labels[4:] == list(CONTROLS)
    further = {p.label: p.control for p in choose_encoders(["imagenet_lite0=runs/last.pt"], 1)}
    assert not further["imagenet_lite0=runs/last.pt"], "weights of one's own are no control"
    assert further["imagenet_lite0=runs/last.pt, random weights"] and further["imagenet_lite0"]
    random = choose_encoders(["resnet50=random"], 2)[0]
    assert random.control and random.seeds == (0, 1)
    with pytest.raises(UserError, match="found resnet50 twice"):
        choose_encoders(["resnet50", "resnet50"], 0)


# --- scores ---------------------------------------------------------------------------------------


def make_runs(shift: float) -> list[TilePredictions]:
    """Two folds of 60 tiles in groups of three; a score that is `shift` higher in class 1."""
    random = np.random.default_rng(0)
    runs = []
    for fold in range(2):
        groups = np.arange(60) // 3
        targets = groups % 2
        score = 1 / (1 + np.exp(-random.normal(size=60) - shift * (targets - 0.5)))
        shares = np.stack([1 - score, score], 1)
        runs.append(TilePredictions(fold, groups + 100 * fold, targets, shares))
    return runs


def test_the_difference_of_an_encoder_to_itself_is_nothing() -> None:
    score = score_runs(make_runs(1.0), 300, 0)
    same = score.differences(score_runs(make_runs(1.0), 300, 0))
    for name in ("auc", "average_precision", "balanced_accuracy"):
        assert same[f"{name}_difference"] == 0 and same[f"{name}_difference_ci"] is None
        assert same[f"{name}_difference_p"] == 1


def test_a_better_encoder_is_better_with_an_interval_above_0() -> None:
    good, poor = (score_runs(make_runs(shift), 300, 0) for shift in (3.0, 0.2))
    found = good.differences(poor)
    low, high = found["auc_difference_ci"]
    assert 0 < low < found["auc_difference"] < high and found["auc_difference_p"] < 0.05
    low, high = good.summary["auc_ci"]
    assert low < good.summary["auc_mean"] < high


def test_intervals_are_by_group() -> None:
    """Copies of a tile in one group say nothing new, copies as groups of their own would."""
    single = make_runs(1.0)
    index = np.repeat(np.arange(60), 9)

    def copy(groups: bool) -> list[TilePredictions]:
        return [
            TilePredictions(
                run.fold,
                run.cases[index] if groups else 1000 * run.fold + np.arange(len(index)),
                run.targets[index],
                run.probabilities[index],
            )
            for run in single
        ]

    plain, grouped, alone = (
        np.subtract(*score_runs(runs, 500, 0).summary["auc_ci"])
        for runs in (single, copy(True), copy(False))
    )
    assert grouped == pytest.approx(plain, rel=1e-6)
    assert alone > 0.6 * plain, "negative widths: the interval would be far too narrow"


def test_metrics_of_three_classes_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import average_precision_score, balanced_accuracy_score, roc_auc_score

    random = np.random.default_rng(0)
    targets, shares = np.arange(90) % 3, random.dirichlet(np.ones(3), 90)
    found = evaluate(TilePredictions(0, np.arange(90), targets, shares))
    expected = {
        "auc": roc_auc_score(targets, shares, multi_class="ovr"),
        "average_precision": average_precision_score(np.eye(3)[targets], shares),
        "balanced_accuracy": balanced_accuracy_score(targets, shares.argmax(1)),
    }
    assert {name: value[0] for name, value in found.items()} == pytest.approx(expected)


# --- real pictures --------------------------------------------------------------------------------


def test_colour_alone_on_real_fields_comes_near_the_published_control(
    real_data: Path, tmp_path: Path, no_rendering: None, colour_controls: None
) -> None:
    """INVENTORY.md of the data: 33 colour numbers and a logistic regression reach .843 at 100x."""
    source = real_data / "oral_oscc_he"
    if not source.is_dir():
        pytest.skip("oral_oscc_he is not there")
    given = (f"tile_set={source}", "where=_100x_", "probes=[linear]")
    assert probe(tmp_path / "probe", *given) == 0
    rows = {row["encoder"]: row for row in read_csv(tmp_path / "probe" / "probe.csv")}
    assert 0.79 < float(rows["colour_statistics"]["balanced_accuracy"]) < 0.89
    assert float(rows["mean_colour"]["auc"]) < float(rows["colour_statistics"]["auc"])
    assert re.search(r"528 tiles \(Normal 89, OSCC 439", (tmp_path / "probe/probe.md").read_text())
