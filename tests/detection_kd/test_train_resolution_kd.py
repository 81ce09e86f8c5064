"""Training of graders at several resolutions: what they learn from, keep, and refuse."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from detection_kd import train_resolution_kd
from detection_kd.engine import SMALL_BLOCK
from detection_kd.evaluation.grading_metrics import GradedRun, grade_metrics
from detection_kd.graded_patches.keys import GradedSetKeys, read_graded_split
from detection_kd.graded_patches.patch_loader import make_patch_loader
from detection_kd.graded_patches.patch_pixels import PatchPixels
from detection_kd.graded_patches.splits import GradedSplit
from detection_kd.grading.grade_predictions import predict_grades
from detection_kd.models.low_resolution import load_grading_network
from detection_kd.train_resolution_kd import ask_teacher, open_job, prepare_training
from tests.detection_kd.grading_runs import (
    GRADES,
    SIDE,
    configure,
    train,
    write_graded_set,
    write_ungraded,
)
from tests.training_harness import read_epochs
from wsi_common.distributed import World
from wsi_common.errors import UserError

ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments that name a set of twelve slides."""
    return write_graded_set(tmp_path_factory.mktemp("grades"))


@pytest.fixture(scope="module")
def teacher(inputs: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished teacher."""
    return train(inputs, tmp_path_factory.mktemp("teacher") / "run", "epochs=5")


@pytest.fixture(scope="module")
def student_inputs(inputs: list[str], teacher: Path) -> list[str]:
    """Arguments of a student at half the resolution."""
    return [*inputs, f"teacher_checkpoint={teacher}/checkpoint_best.pt", "ratio=2"]


def test_a_grader_learns_and_its_checkpoint_predicts_as_its_run_did(
    inputs: list[str], teacher: Path
) -> None:
    """Metrics of results.json are those of predictions.csv, and of the checkpoint loaded anew."""
    results = json.loads((teacher / "results.json").read_text())
    assert results["test"]["kappa_quadratic"] > 0.7 and results["val"]["epoch"] >= 1
    with (teacher / "predictions.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["patch", "slide", "case", "target", "called", *GRADES]
    targets = np.array([GRADES.index(row["target"]) for row in rows])
    called = np.array([GRADES.index(row["called"]) for row in rows])
    probabilities = np.array([[float(row[grade]) for grade in GRADES] for row in rows])
    assert (called == probabilities.argmax(1)).all()
    run = GradedRun(0, 1, np.array([row["case"] for row in rows]), targets, called, len(GRADES))
    assert {k: float(v[0]) for k, v in grade_metrics(run).items()} == results["test"]
    network = load_grading_network(teacher / "checkpoint_best.pt")
    test = open_job(configure(inputs, f"output={teacher}", "epochs=5"), ONE).test
    options = {"batch_size": 6, "precision": "fp32", "workers": 0, "label": ""}
    assert (predict_grades(network, test, ONE, **options) == probabilities).all()


def test_test_patches_are_predicted_once_with_the_best_epoch(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    original = train_resolution_kd.predict_grades

    def spy(network: object, pixels: PatchPixels, *given: object, **named: object) -> object:
        asked.append(",".join(sorted({patch.split for patch in pixels.patches.patches})))
        return original(network, pixels, *given, **named)

    monkeypatch.setattr(train_resolution_kd, "predict_grades", spy)
    train(inputs, tmp_path / "run", "epochs=3", "eval_every=2")
    assert asked == ["train", "train", "test"]  # validation after epochs 2 and 3


def test_the_epoch_with_the_best_validation_kappa_is_kept(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small it is, and although the last one differs; not a number is the worst."""
    kappas = iter([float("nan"), -0.4, 0.004, 0.002, 0.5])
    monkeypatch.setattr(
        train_resolution_kd,
        "measure_predictions",
        lambda *_: {"kappa_quadratic": next(kappas), "balanced_accuracy": 0.3},
    )
    run = train(inputs, tmp_path / "run", "epochs=4")
    assert torch.load(run / "checkpoint_best.pt", weights_only=True)["epoch"] == 3
    assert json.loads((run / "results.json").read_text())["val"]["kappa_quadratic"] == 0.004


def test_logged_terms_add_up_to_the_loss(student_inputs: list[str], tmp_path: Path) -> None:
    settings = ("terms.kd=0.5", "terms.fm=0.1", "terms.at_plus=10", "epochs=1", "log_every=1")
    run = train(student_inputs, tmp_path / "run", *settings)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        terms = {name: value for name, value in line.items() if name.startswith("loss_")}
        assert set(terms) == {"loss_ce", "loss_kd", "loss_fm", "loss_at_plus"}
        assert sum(terms.values()) == pytest.approx(line["loss"], rel=1e-5)
    assert "time/teacher" in lines[0]


def test_the_student_checkpoint_says_what_it_sees_and_learned_from(
    student_inputs: list[str], tmp_path: Path
) -> None:
    run = train(
        student_inputs, tmp_path / "run", "terms.kd=1", "network.removed_strides=1", "epochs=1"
    )
    network = load_grading_network(run / "checkpoint_best.pt")
    scale = network.scale
    assert (scale.side, scale.ratio, scale.own_side, scale.own_mpp) == (SIDE, 2, SIDE // 2, 2.0)
    assert network.map_side == SIDE // 8 and network.grades == GRADES
    described = torch.load(run / "checkpoint_best.pt", weights_only=True)["config"]
    assert described["terms"] == {"kd": 1.0}
    assert set(described["inputs"]) == {"train", "val", "test", "teacher"}


def test_ungraded_patches_teach_through_the_teacher(
    student_inputs: list[str], tmp_path: Path
) -> None:
    """One epoch with 36 of them has as many steps more; the labels' term stays that of labels."""
    further = write_ungraded(tmp_path / "further", 36)
    settings = ("terms.kd=1", "epochs=1", "lr=0", "augmentation.symmetry=false")
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (
            train(student_inputs, tmp_path / "plain", *settings, "log_every=1"),
            train([*student_inputs, further], tmp_path / "more", *settings, "log_every=1"),
        )
    ]
    assert len(lines[1]) - len(lines[0]) == 6
    graded = [own[-1]["loss_ce"] for own in lines]
    assert graded[0] == pytest.approx(graded[1], rel=1e-5)
    assert lines[0][-1]["loss_kd"] != pytest.approx(lines[1][-1]["loss_kd"], rel=1e-3)


@pytest.mark.parametrize("level", [-1, -2])
def test_a_teacher_keeps_nothing_for_a_backward_pass(
    student_inputs: list[str], tmp_path: Path, level: int
) -> None:
    """Below the level whose maps are compared, no layer saves a tensor."""
    config = configure(student_inputs, "terms.at_plus=1", f"terms.level={level}")
    config.output = str(tmp_path / "run")
    job = open_job(config, ONE)
    assert job.teacher is not None and not any(p.requires_grad for p in job.teacher.parameters())
    batch = next(iter(make_patch_loader(job.train, range(4), 4, ONE)))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        output = ask_teacher(job, batch.pixels.float() / 255, batch)
    assert output is not None
    if level == -1:
        assert not saved and output.logits.grad_fn is None
    else:
        assert output.inner is not None and output.inner.is_leaf
        # none is larger than the last map; those of earlier layers are
        assert max(x.numel() for x in saved if x.ndim == 4 and len(x) == 4) <= output.maps.numel()


def test_arms_of_one_seed_start_from_the_same_weights(
    inputs: list[str], student_inputs: list[str], tmp_path: Path
) -> None:
    """A difference between them is not one of their draws."""
    starts = []
    for name, given in (("ce", [*inputs, "ratio=2"]), ("kd", [*student_inputs, "terms.kd=1"])):
        config = configure(given)
        config.output = str(tmp_path / name)
        job = open_job(config, ONE)
        starts.append(prepare_training(job).plain.state_dict())
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])


def test_kept_maps_of_plain_patches_train_as_the_teacher_itself(
    student_inputs: list[str], tmp_path: Path
) -> None:
    settings = ("terms.at_plus=5", "terms.kd=1", "augmentation.symmetry=false", "epochs=1")
    lines = [
        read_epochs(train(student_inputs, tmp_path / kept, f"cache_teacher={kept}", *settings))[0]
        for kept in ("false", "true")
    ]
    for name in ("loss", "loss_kd", "loss_at_plus"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=5e-3), name


def test_a_training_on_other_patches_is_not_resumed(inputs: list[str], tmp_path: Path) -> None:
    train(inputs, tmp_path / "run", "epochs=1")
    other = write_graded_set(tmp_path / "other", per_grade=2)
    with pytest.raises(UserError, match="another run"):
        train(other, tmp_path / "run", "epochs=1")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["ratio=3"], "ratio=3: expected a divisor of the side of patches, 32 px"),
        (["terms.kd=1"], "teacher_checkpoint=none: expected a teacher where a term .* found kd"),
        (["terms.kd=-1"], "expected weights of at least 0"),
        (["network.init=nowhere"], "init"),
        (["tile_size=64"], "expected a square picture of at least 64 px"),
        (["batch_size=5", "data.grades=[low,high]"], "expected labels among grades=low,high"),
        (["augmentation.rotation=200"], "rotation <= 180"),
        (["data.ungraded=tests"], "data.ungraded=tests: expected a teacher that grades"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    inputs: list[str], tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(inputs, tmp_path / "run", *settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["terms.kd=0"], "expected a teacher where a term has a weight, .* found no term"),
        (["terms.kd=1", "tile_size=16"], "16 px.* found .*32 px"),
        (["terms.kd=1", "data.grades=[high,middle,low]"], "expected the grades high, middle, low"),
        (["terms.kd=1", "cache_teacher=true", "augmentation.stain=0.1"], "cache_teacher=true"),
        (["terms.kd=1", "teacher_checkpoint=nowhere.pt"], "nowhere.pt"),
    ],
)
def test_teachers_that_cannot_teach_are_refused(
    student_inputs: list[str], tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(student_inputs, tmp_path / "run", *settings)


def test_a_loss_that_is_not_a_number_names_its_patches(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(logits: torch.Tensor, *_: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return logits.sum() * float("nan"), {}

    monkeypatch.setattr(train_resolution_kd, "resolution_loss", explode)
    with pytest.raises(UserError, match=r"patches \['\d+.png'.*lower lr"):
        train(inputs, tmp_path / "run")


def test_a_grade_without_validation_patches_does_not_stop_a_training(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kappa keeps the distances of the others, and means are over those that are there."""

    def leave_out(keys: GradedSetKeys, seed: int) -> GradedSplit:
        split = read_graded_split(keys, seed)
        return replace(split, val=split.val.select(split.val.labels < 2))

    monkeypatch.setattr(train_resolution_kd, "read_graded_split", leave_out)
    line = read_epochs(train(inputs, tmp_path / "run", "epochs=1"))[0]
    assert np.isfinite([line["kappa_quadratic"], line["balanced_accuracy"]]).all()


def test_a_finished_run_whose_test_patches_are_of_one_grade_says_so(
    inputs: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """All of them called right: there is no kappa."""

    def keep_one(keys: GradedSetKeys, seed: int) -> GradedSplit:
        split = read_graded_split(keys, seed)
        return replace(split, test=split.test.select(split.test.labels == 1))

    def call_all(network: object, pixels: PatchPixels, *_: object, **__: object) -> np.ndarray:
        return np.tile([0.2, 0.6, 0.2], (len(pixels.patches), 1))

    monkeypatch.setattr(train_resolution_kd, "read_graded_split", keep_one)
    monkeypatch.setattr(train_resolution_kd, "predict_grades", call_all)
    run = train(inputs, tmp_path / "run", "epochs=1")
    assert json.loads((run / "results.json").read_text())["test"]["kappa_quadratic"] is None
    with caplog.at_level("INFO"):
        train(inputs, tmp_path / "run", "epochs=1")
    assert "finished run, accuracy 1.000; nothing to do" in caplog.text


def test_a_training_on_a_cpu_keeps_the_memory_of_its_activations(
    inputs: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mapped anew in every step, they cost a quarter more (the demonstration's student)."""
    asked: list[int] = []
    monkeypatch.setattr("detection_kd.engine.reuse_large_blocks", asked.append)
    prepare_training(open_job(configure(inputs, f"output={tmp_path}/run"), ONE))
    assert asked == [SMALL_BLOCK]
