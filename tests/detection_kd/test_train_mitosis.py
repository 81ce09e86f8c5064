"""Training of the mitosis localiser: what it reads, what it keeps, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from detection_kd import train_mitosis
from detection_kd.evaluation.point_metrics import Operating, compute_rates, count_fields
from detection_kd.evaluation.tile_predictions import find_field_detections, predict_tiles
from detection_kd.fields import open_fields
from detection_kd.fields.augmentation import PointAugmentationKeys, augment_tiles
from detection_kd.fields.tile_loader import make_tile_loader
from detection_kd.mitosis_sets import keys
from detection_kd.models.cam import WeakLocaliser, load_localiser
from detection_kd.train_mitosis import Config, open_job, read_tiles
from patch_encoder.slides import open_slide
from tests.detection_kd.mitosis_runs import (
    SPLIT,
    configure,
    train,
    write_kept_table,
    write_mitosis_set,
)
from tests.helpers import ROOT
from tests.training_harness import read_epochs
from wsi_common.config import load_config
from wsi_common.distributed import World
from wsi_common.errors import UserError

ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a set of ten cases."""
    return write_mitosis_set(tmp_path_factory.mktemp("mitoses"))


@pytest.fixture(scope="module")
def run(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished teacher."""
    return train(inputs, tmp_path_factory.mktemp("teacher") / "run", "epochs=2")


def test_it_finds_mitoses_whose_positions_it_was_never_told(run: Path) -> None:
    found = json.loads((run / "results.json").read_text())
    assert found["f1"] > 0.9 and found["bag_auc"] > 0.95


def test_thresholds_are_stored_to_the_last_bit(inputs: list[str], run: Path) -> None:
    """At the threshold of the checkpoint the validation fields have the F1 of the results."""
    model, described = load_localiser(run / "checkpoint_best.pt")
    results = json.loads((run / "results.json").read_text())
    assert described["threshold"] == results["threshold"]
    assert described["bag_threshold"] == results["bag_threshold"]
    assert f"{described['threshold']:.12f}".rstrip("0")[-1] != "."  # not rounded
    _, val, _, _ = read_tiles(configure(inputs), None)
    options = {"batch_size": 16, "precision": "fp32", "workers": 0, "label": ""}
    fields = find_field_detections(val, predict_tiles(model, val, ONE, **options))
    rates = compute_rates(count_fields(fields, described["threshold"]).sum(0))
    assert float(rates["f1"]) == results["f1"]
    assert (described["side"], described["stain"], described["left_out"]) == (32, None, [])


def test_no_image_of_a_test_field_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by Python's open nor by a slide reader; and then they are not even there."""
    inputs, opened, watching = write_mitosis_set(tmp_path / "set"), [], [True]

    def watch(event: str, details: tuple) -> None:
        if watching[0] and event == "open":
            opened.append(str(details[0]))

    def spy(path: Path, *given: object) -> object:
        opened.append(str(path))
        return open_slide(path, *given)

    sys.addaudithook(watch)
    for module in (keys, open_fields):
        monkeypatch.setattr(module, "open_slide", spy)
    train(inputs, tmp_path / "with", "epochs=1")
    watching[0] = False
    images = {f"{number + 1:03d}.tiff": SPLIT[number // 2] for number in range(20)}
    seen = {images[name] for path in opened if (name := Path(path).name) in images}
    assert seen == {"train", "val"}
    for name, side in images.items():
        if side == "test":
            (tmp_path / "set" / "images" / name).unlink()
    train(inputs, tmp_path / "without", "epochs=1")
    results = [(tmp_path / name / "results.json").read_text() for name in ("with", "without")]
    assert results[0] == results[1]


def test_metrics_tell_what_is_worth_watching(run: Path) -> None:
    epochs = read_epochs(run)
    wanted = {"loss", "bag_loss", "bag_accuracy", "bag_auc", "f1", "precision", "recall"}
    assert wanted <= epochs[0].keys()
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"lr", "time/data", "time/augmentation"} <= steps[0].keys()


@pytest.mark.parametrize("kind", ["l2", "lb"])
def test_the_location_term_is_part_of_the_loss(
    inputs: list[str], tmp_path: Path, kind: str
) -> None:
    settings = (f"location.kind={kind}", "location.weight=0.5", "location.margin=4", "epochs=1")
    line = read_epochs(train(inputs, tmp_path / "run", *settings))[0]
    expected = line["bag_loss"] + 0.5 * line["location_loss"]
    assert line["loss"] == pytest.approx(expected, rel=1e-5)


def test_the_student_trains_on_what_the_filter_left(inputs: list[str], tmp_path: Path) -> None:
    config = configure(inputs)
    tiles = read_tiles(config, None)[0]
    keep = np.arange(len(tiles)) % 3 > 0
    labels = np.where(np.arange(len(tiles)) == 1, 1 - tiles.labels, tiles.labels)
    weights = np.linspace(0.1, 1, len(tiles))
    table = write_kept_table(tmp_path / "kept", config, keep=keep, labels=labels, weights=weights)
    student = read_tiles(configure(inputs, f"kept={table}"), None)[0]
    chosen = np.flatnonzero(keep)
    assert student.sample_ids == [tiles.sample_ids[tile] for tile in chosen]
    assert (student.labels == labels[keep]).all()
    np.testing.assert_allclose(student.weights, weights[keep], rtol=1e-6)


def test_pseudo_labels_act_although_labels_follow_positions(
    inputs: list[str], tmp_path: Path
) -> None:
    """The original computes the labels of augmented tiles from their marks, and its pseudo labels
    are lost.
    """
    config = configure(inputs)
    tiles = read_tiles(config, None)[0]
    changed = (
        np.flatnonzero(tiles.labels == 1)[:3].tolist()
        + np.flatnonzero(tiles.labels == 0)[:2].tolist()
    )
    labels = tiles.labels.copy()
    labels[changed] = 1 - labels[changed]
    table = write_kept_table(tmp_path / "kept", config, labels=labels)
    student = read_tiles(configure(inputs, f"kept={table}"), None)[0]
    order = np.array([*changed, *np.flatnonzero(tiles.labels == 1)[3:6]])
    (batch,) = make_tile_loader(student, order, len(order), ONE)
    for epoch in range(3):
        varied = augment_tiles(batch, PointAugmentationKeys(rotation=90), 0, epoch)
        assert varied.labels.tolist() == labels[order].tolist()


def test_soft_weights_act(inputs: list[str], tmp_path: Path) -> None:
    """Tiles of weight 0 do not change the network."""
    config = configure(inputs)
    table = write_kept_table(
        tmp_path / "kept", config, weights=np.zeros(len(read_tiles(config, None)[0]))
    )
    line = read_epochs(train(inputs, tmp_path / "run", f"kept={table}", "epochs=1"))[0]
    assert line["loss"] == 0


def test_cases_left_out_are_in_the_checkpoint(inputs: list[str], tmp_path: Path) -> None:
    seen = []
    for part in ("1/3", "2/3", "3/3"):
        job = open_job(configure(inputs, f"leave_out={part}", f"output={tmp_path}/{part[0]}"), ONE)
        out = job.described["left_out"]
        assert len(out) == 2 and not {field.case for field in job.train.fields} & set(out)
        seen += out
    assert sorted(seen) == [f"case{number}" for number in range(6)]


def test_a_kept_table_of_other_data_or_tiles_is_refused(inputs: list[str], tmp_path: Path) -> None:
    table = write_kept_table(tmp_path / "kept", configure(inputs))
    with pytest.raises(
        UserError, match=r"other training tiles: .*side 32 -> 48.*run filter_samples"
    ):
        read_tiles(configure(inputs, f"kept={table}", "tile_size=48"), None)
    other = write_mitosis_set(tmp_path / "other", wrong=1)
    with pytest.raises(
        UserError, match=r"kept.csv: made for other training tiles: digest '\w+' ->"
    ):
        read_tiles(configure(other, f"kept={table}"), None)


def test_a_kept_table_whose_teacher_has_changed_is_refused(
    inputs: list[str], tmp_path: Path
) -> None:
    table, teacher = write_kept_table(tmp_path / "kept", configure(inputs)), tmp_path / "teacher.pt"
    teacher.write_text("new")
    record = table.with_name("kept.json")
    content = json.loads(record.read_text()) | {"teachers": {str(teacher): "0" * 64}}
    record.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"kept.csv: the teacher .*teacher.pt has changed since"):
        read_tiles(configure(inputs, f"kept={table}"), None)
    teacher.unlink()  # moved elsewhere
    read_tiles(configure(inputs, f"kept={table}"), None)


def test_a_kept_table_that_was_edited_or_has_no_record_is_refused(
    inputs: list[str], tmp_path: Path
) -> None:
    table = write_kept_table(tmp_path / "kept", configure(inputs))
    table.write_text(table.read_text() + "more\n")
    with pytest.raises(UserError, match="expected the table that kept.json describes"):
        read_tiles(configure(inputs, f"kept={table}"), None)
    table.with_name("kept.json").unlink()
    with pytest.raises(
        UserError, match=r"kept.json: expected the record of a filter, found no file"
    ):
        read_tiles(configure(inputs, f"kept={table}"), None)


def keep_class(label: int, inputs: list[str], folder: Path) -> Path:
    """A table that keeps one class only."""
    config = configure(inputs)
    return write_kept_table(folder, config, keep=read_tiles(config, None)[0].labels == label)


@pytest.mark.parametrize(("label", "found"), [(0, "0 with and"), (1, "0 without")])
def test_a_side_of_one_class_is_refused(
    inputs: list[str], tmp_path: Path, label: int, found: str
) -> None:
    table = keep_class(label, inputs, tmp_path / "kept")
    with pytest.raises(UserError, match=rf"train: expected tiles with and without .*{found}"):
        read_tiles(configure(inputs, f"kept={table}"), None)


def test_a_fold_of_one_class_is_refused(inputs: list[str]) -> None:
    """A tile of the size of a field always holds a mitosis here."""
    with pytest.raises(UserError, match=r"train: expected tiles .*found 12 with and 0 without"):
        read_tiles(configure(inputs, "tile_size=96"), None)


@pytest.mark.parametrize("part", ["0/3", "4/3", "1/1", "third", "1/9"])
def test_parts_that_cannot_be_left_out_are_refused(inputs: list[str], part: str) -> None:
    with pytest.raises(UserError, match=f"leave_out={part}: expected"):
        read_tiles(configure(inputs, f"leave_out={part}"), None)


def test_a_loss_that_is_not_finite_names_the_tiles(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(*_: object, **__: object) -> torch.Tensor:
        return torch.tensor(float("nan"), requires_grad=True)

    monkeypatch.setattr(train_mitosis, "binary_cross_entropy_with_logits", overflow)
    with pytest.raises(
        UserError, match=r"tiles \['\d+_\d+_\d+'.*expected a finite loss, found nan"
    ):
        train(inputs, tmp_path / "run")


def test_without_a_single_hit_the_best_tile_scores_are_kept(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    """The original stops with an error where F1 never exceeds 0."""
    monkeypatch.setattr(train_mitosis, "choose_threshold", lambda _: Operating(np.inf, 0.0))
    run = train(inputs, tmp_path / "run", "epochs=1")
    assert (run / "checkpoint_best.pt").is_file()
    assert "no epoch found a mitosis" in caplog.text
    assert json.loads((run / "results.json").read_text())["f1"] == 0


def test_fields_of_unknown_resolution_are_refused(tmp_path: Path) -> None:
    inputs = write_mitosis_set(tmp_path / "set", mpp=None)
    with pytest.raises(
        UserError, match=r"field 0\d\d: expected its um per px, found none.*data.mpp"
    ):
        train(inputs, tmp_path / "run", "epochs=1")
    assert train(inputs, tmp_path / "given", "epochs=1", "data.mpp=0.5")


def test_a_student_of_the_same_tiles_is_another_run(
    inputs: list[str], run: Path, tmp_path: Path
) -> None:
    table = write_kept_table(tmp_path / "kept", configure(inputs))
    with pytest.raises(UserError, match="holds another run: inputs.kept"):
        train(inputs, run, "epochs=2", f"kept={table}")


@pytest.mark.parametrize("name", ["tupac16", "midog21", "demo"])
def test_the_published_settings_build_their_networks(name: str) -> None:
    file = ROOT / "configs" / "uts" / f"{name}.yaml"
    given = ["--config", str(file), "data.annotations=x", "output=x"]
    config = load_config(Config, given, check_paths=False)
    config.augmentation.check()
    config.network.init = "random"  # nothing is fetched
    with torch.device("meta"):
        maps = WeakLocaliser(config.network)(torch.empty(1, 3, *[config.tile_size] * 2)).maps
    assert maps.shape[-1] == (16 if name == "demo" else 32)
