"""The filter between teacher and student: what it writes, whom it asks, and what it refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from detection_kd import filter_samples
from detection_kd.evaluation.hard_samples import MISSED
from detection_kd.filter_samples import Config, main
from tests.detection_kd.mitosis_runs import train, write_mitosis_set
from tests.training_harness import read_epochs
from wsi_common.cli import run as run_script
from wsi_common.config import load_config
from wsi_common.errors import UserError

WRONG = 2  # points per training field where there is nothing


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of a set without errors."""
    return write_mitosis_set(tmp_path_factory.mktemp("clean"))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The same fields, where more than half of the annotated positions are wrong."""
    return write_mitosis_set(tmp_path_factory.mktemp("noisy"), wrong=WRONG)


@pytest.fixture(scope="module")
def teacher(noisy: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher that was trained on the errors."""
    run = train(noisy, tmp_path_factory.mktemp("teacher") / "run")
    return run / "checkpoint_best.pt"


def apply_filter(
    inputs: list[str], teachers: Path | list[Path], output: Path, *settings: str
) -> list[dict[str, str]]:
    """Rows of the kept.csv that the script writes."""
    paths = teachers if isinstance(teachers, list) else [teachers]
    named = f"teachers=[{','.join(map(str, paths))}]"
    device = ("device=cpu", "precision=fp32", "workers=0")
    given = [*inputs, named, f"output={output}", *device, *settings]
    assert main(load_config(Config, given)) == 0
    with (output / "kept.csv").open() as stream:
        return list(csv.DictReader(stream))


def test_it_finds_most_errors_and_leaves_most_of_the_rest(
    noisy: list[str], clean: list[str], teacher: Path, tmp_path: Path
) -> None:
    truth = clean[0].partition("=")[2]
    rows = apply_filter(noisy, teacher, tmp_path, f"truth={truth}")
    audit = json.loads((tmp_path / "audit.json").read_text())
    assert audit["wrong_positives"] > 10 and audit["noise_before"] > 0.4
    assert audit["wrong_positives_dropped"] > 0.8
    assert audit["true_positives_dropped"] <= 0.25
    assert audit["correct_negatives_dropped"] <= 0.1
    assert len(rows) == 12 * 9 and all(
        bool(row["reason"]) != bool(int(row["keep"])) for row in rows
    )
    missed = [float(row["score"]) for row in rows if row["reason"] == MISSED]
    record = json.loads((tmp_path / "kept.json").read_text())
    assert max(missed) < record["summary"]["thresholds"][0]


def test_teacher_filter_student(noisy: list[str], teacher: Path, tmp_path: Path) -> None:
    """The student sees fewer tiles and the same validation fields; started again, all three have
    nothing to do.
    """
    apply_filter(noisy, teacher, tmp_path / "kept")
    stamp = (tmp_path / "kept" / "kept.csv").stat().st_mtime_ns
    table = f"kept={tmp_path}/kept/kept.csv"
    student = train(noisy, tmp_path / "student", table)
    assert json.loads((student / "results.json").read_text())["f1"] > 0.8
    assert read_epochs(student)[-1]["loss"] < read_epochs(teacher.parent)[-1]["loss"]
    apply_filter(noisy, teacher, tmp_path / "kept")
    assert (tmp_path / "kept" / "kept.csv").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("mode", ["relabel", "soft", "random"])
def test_every_mode_writes_what_a_student_can_read(
    noisy: list[str], teacher: Path, tmp_path: Path, mode: str
) -> None:
    rows = apply_filter(noisy, teacher, tmp_path / mode, f"mode={mode}", "criterion=FP_TP")
    changed = {
        name: sum(row[name] != plain for row in rows)
        for name, plain in (("keep", "1"), ("weight", "1.0"))
    }
    changed["new_label"] = sum(row["new_label"] != row["label"] for row in rows)
    column = {"relabel": "new_label", "soft": "weight", "random": "keep"}[mode]
    assert changed.pop(column) > 0 and not any(changed.values())
    train(noisy, tmp_path / "student", f"kept={tmp_path}/{mode}/kept.csv", "epochs=1")


def test_the_published_threshold_is_that_of_the_labels_it_filters(
    noisy: list[str], teacher: Path, tmp_path: Path
) -> None:
    own = apply_filter(noisy, teacher, tmp_path / "own", "teacher_threshold=own")
    scores = np.array([float(row["score"]) for row in own])
    labels = np.array([int(row["label"]) for row in own])
    kept = np.array([row["keep"] == "1" for row in own])

    def f1(cut: float) -> float:
        return 2 * (labels[scores >= cut]).sum() / ((scores >= cut).sum() + labels.sum())

    threshold = json.loads((tmp_path / "own" / "kept.json").read_text())["summary"]["thresholds"][0]
    assert f1(threshold) == max(f1(cut) for cut in scores)
    assert (kept == ((scores >= threshold) == (labels == 1))).all()


def test_out_of_fold_scores_come_from_who_was_not_trained_on_them(
    noisy: list[str], tmp_path: Path
) -> None:
    teachers = [
        train(noisy, tmp_path / str(part), f"leave_out={part}/2", "epochs=1") / "checkpoint_best.pt"
        for part in (1, 2)
    ]
    found = filter_samples.load_teachers([str(path) for path in teachers])
    rows = apply_filter(noisy, teachers, tmp_path / "both")
    cases = {row["sample"]: f"case{(int(row['sample'][:3]) - 1) // 2}" for row in rows}
    scores = [
        {row["sample"]: row["score"] for row in apply_filter(noisy, path, tmp_path / f"alone{n}")}
        for n, path in enumerate(teachers)
    ]
    for row in rows:
        (number,) = [n for n, t in enumerate(found) if cases[row["sample"]] in t.left_out()]
        assert float(row["score"]) == pytest.approx(float(scores[number][row["sample"]]), abs=1e-6)
    with pytest.raises(
        UserError, match=r"expected one that was not trained on case .*leave_out=1/2"
    ):
        apply_filter(noisy, [teachers[0], teachers[0]], tmp_path / "twice")


def test_teachers_of_other_tiles_are_refused(
    noisy: list[str], teacher: Path, tmp_path: Path
) -> None:
    other = train(noisy, tmp_path / "other", "tile_size=40", "epochs=1") / "checkpoint_best.pt"
    with pytest.raises(UserError, match=r"expected the same tiles for all, .*with side 32 -> 40"):
        apply_filter(noisy, [teacher, other], tmp_path / "kept")


def test_a_missing_teacher_is_one_line(
    noisy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [*noisy, f"teachers={tmp_path}/none.pt", f"output={tmp_path}/kept"]
    assert run_script(main, Config, given) == 2
    error = capsys.readouterr().err
    assert "key 'teachers': expected an existing path" in error and error.count("\n") == 1


def test_a_filter_with_other_settings_is_refused(
    noisy: list[str], teacher: Path, tmp_path: Path
) -> None:
    apply_filter(noisy, teacher, tmp_path)
    with pytest.raises(UserError, match="holds another filter: settings.criterion 'bag' -> 'TP'"):
        apply_filter(noisy, teacher, tmp_path, "criterion=TP")
    apply_filter(noisy, teacher, tmp_path, "criterion=TP", "overwrite=true")


def test_a_teacher_that_was_trained_again_makes_the_table_stale(
    noisy: list[str], teacher: Path, tmp_path: Path
) -> None:
    again = tmp_path / "teacher.pt"
    again.write_bytes(teacher.read_bytes())
    apply_filter(noisy, again, tmp_path / "kept")
    again.write_bytes(teacher.with_name("checkpoint_last.pt").read_bytes())
    with pytest.raises(UserError, match="the teacher .* has changed since this table was made"):
        train(noisy, tmp_path / "student", f"kept={tmp_path}/kept/kept.csv")


def test_truth_of_other_fields_is_refused(noisy: list[str], teacher: Path, tmp_path: Path) -> None:
    document = json.loads(Path(noisy[0].partition("=")[2]).read_text())
    document["images"] = document["images"][1:]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] > 1]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    with pytest.raises(UserError, match="expected the fields of data.annotations, found 11 of 12"):
        apply_filter(noisy, teacher, tmp_path / "kept", f"truth={other}")
