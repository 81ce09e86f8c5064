"""Students extracted together: the bags of one at a time to the last bit, who shares a trunk,
resuming, refusals.
"""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from detection_kd import extract_student
from detection_kd.models.backbone import load_backbone
from detection_kd.models.shared_trunk import TrunkMember, group_by_trunk
from detection_kd.models.student import Student, describe_student, load_student_encoder
from detection_kd.models.student_onnx import load_students
from patch_encoder import tile_slides
from studies import measure_encoders
from tests.helpers import forget_slides, make_cohort
from wsi_common.checkpoint import load_checkpoint, save_checkpoint
from wsi_common.cli import run
from wsi_common.shared_weights import write_shared_weights

DIM = 5
KINDS = {  # stages, adapter, pooling, input scale
    "plain": ([1], "mpa", "mean", 1.0),
    "both": ([0, 2], "ln", "mean", 1.0),
    "gem": ([0], "p", "gem", 1.0),
    "small": ([1], "mpa", "mean", 0.5),
    "tuned": ([1], "mpa", "mean", 1.0),
}


@pytest.fixture
def students(backbone_path: Path, tmp_path: Path) -> dict[str, Path]:
    """Checkpoints of random students; the trunk of `tuned` is another one in its last stage."""
    paths = {}
    for seed, (name, (stages, adapter, pooling, scale)) in enumerate(KINDS.items()):
        torch.manual_seed(seed)
        student = Student(load_backbone(backbone_path)[0], stages, adapter, DIM, scale, pooling)
        if name == "tuned":
            with torch.no_grad():
                student.backbone.layer3[0].conv1.weight.mul_(1.5)
        paths[name] = tmp_path / f"{name}.pt"
        config = {"student": describe_student(student, "teacher")}
        save_checkpoint(paths[name], model=student.state_dict(), config=config, epoch=1)
    return paths


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    """Two slides and their tiles."""
    root = make_cohort(tmp_path / "cohort", 2)
    arguments = [
        f"slides={root}/slides",
        f"output={root}/tiles",
        "tile_size=128",
        "min_tissue=0.0",
        "workers=1",
    ]
    assert run(tile_slides.main, tile_slides.Config, arguments) == 0
    return root


def sources(cohort: Path, output: Path) -> list[str]:
    places = [
        f"slides={cohort}/slides",
        f"coords={cohort}/tiles",
        f"labels={cohort}/labels.csv",
        f"output={output}",
    ]
    return [*places, "device=cpu", "precision=fp32", "workers=0", "batch_size=5"]


def together(cohort: Path, output: Path, students: dict[str, Path], *more: str) -> int:
    listed = "student=[" + ",".join(f"'{name}={path}'" for name, path in students.items()) + "]"
    return run(
        extract_student.main, extract_student.Config, [*sources(cohort, output), listed, *more]
    )


def bags(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray, dict]]:
    found = {}
    for path in sorted((folder / "h5_files").glob("*.h5")):
        with h5py.File(path) as file:
            found[path.stem] = (
                file["features"][()],
                file["coords"][()],
                dict(file["features"].attrs),
            )
    return found


@pytest.mark.process
def test_bags_are_those_of_one_student_at_a_time(
    cohort: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    assert together(cohort, tmp_path / "together", students) == 0
    for name, path in students.items():
        alone = [*sources(cohort, tmp_path / "alone"), f"student={name}={path}"]
        assert run(extract_student.main, extract_student.Config, alone) == 0
        expected, found = bags(tmp_path / "alone" / name), bags(tmp_path / "together" / name)
        assert list(expected) == list(found) == ["S000", "S001"]
        for slide in expected:
            assert (
                np.array_equal(expected[slide][0], found[slide][0])
                and np.ptp(found[slide][0], axis=0).min() > 0
            )
            assert np.array_equal(expected[slide][1], found[slide][1])
            assert expected[slide][2] == found[slide][2], "provenance and digest"


def test_a_folder_of_shared_weights_is_a_student(students: dict[str, Path], tmp_path: Path) -> None:
    shared = tmp_path / "model = a"
    write_shared_weights(shared, load_checkpoint(students["small"]))
    found = load_students([str(shared), f"b={shared}"], torch.device("cpu"))
    assert [student.name for student in found] == ["student", "b"]
    expected = load_student_encoder(students["small"], "student").provenance
    assert found[0].provenance == expected


def test_who_shares_a_trunk(students: dict[str, Path]) -> None:
    encoders = {name: load_student_encoder(path, name) for name, path in students.items()}
    groups = group_by_trunk(
        [TrunkMember(encoder, encoder.model.network) for encoder in encoders.values()]
    )
    assert [[member.encoder.name for member in group] for group in groups] == [
        ["both", "plain", "gem"],
        ["small"],
        ["tuned"],
    ]


def test_what_is_there_is_kept_and_what_is_stale_refused(
    cohort: Path, students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "features"
    pair = {name: students[name] for name in ("plain", "gem")}
    assert together(cohort, output, pair) == 0
    files = sorted(output.rglob("*.h5"))
    before = {file: file.stat().st_mtime_ns for file in files}
    assert together(cohort, output, pair) == 0
    assert {file: file.stat().st_mtime_ns for file in files} == before
    (output / "gem" / "h5_files" / "S001.h5").unlink()
    assert together(cohort, output, pair) == 0
    changed = {file.name for file in files if file.stat().st_mtime_ns != before[file]}
    assert changed == {"S001.h5"}, "S000 has all its bags"
    assert together(cohort, output, {"plain": students["tuned"]}) == 2
    assert "holds features of another provenance" in capsys.readouterr().err


def test_a_slide_that_fails_is_listed_with_every_student(
    cohort: Path, students: dict[str, Path], tmp_path: Path
) -> None:
    forget_slides(cohort / "tiles")
    (cohort / "slides" / "S001.tiff").write_bytes(b"no slide")
    pair = {name: students[name] for name in ("plain", "tuned")}
    assert together(cohort, tmp_path / "features", pair) == 1
    for name in pair:
        assert "S001" in (tmp_path / "features" / name / "failures.csv").read_text()
        assert list(bags(tmp_path / "features" / name)) == ["S000"]


def test_what_cannot_be_students_is_refused(
    cohort: Path, students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for listed, expected in (
        ("[plain]", "found no file plain"),
        (f"['a={students['plain']}','a={students['gem']}']", "students of different names"),
        (f"['../a={students['plain']}']", "expected a plain file name"),
        ("[]", "expected at least one checkpoint"),
    ):
        arguments = [*sources(cohort, tmp_path / "features"), f"student={listed}"]
        assert run(extract_student.main, extract_student.Config, arguments) == 2
        assert expected in capsys.readouterr().err
    assert together(cohort, tmp_path / "features", students, "engine=ray") == 2


@pytest.mark.process
def test_cost_times_one_student_of_each_kind(
    cohort: Path, students: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = "student=[" + ",".join(f"'{name}={path}'" for name, path in students.items()) + "]"
    output = tmp_path / "cost.json"
    arguments = [word for word in sources(cohort, output) if not word.startswith("precision")]
    sizes = ["tiles_per_round=6", "rounds=1", "encoders=[mean_colour]"]
    assert run(measure_encoders.main, measure_encoders.Config, [*arguments, listed, *sizes]) == 0
    costs = json.loads(output.read_text())
    assert set(costs) == {"mean_colour", *KINDS}
    before = output.stat().st_mtime_ns
    assert run(measure_encoders.main, measure_encoders.Config, [*arguments, listed, *sizes]) == 0
    assert output.stat().st_mtime_ns == before  # measured with the same: kept
    for other in ("rounds=2", "tiles_per_round=4", "encoders=[stain_texture]"):
        changed = [*arguments, listed, *sizes, other]
        assert run(measure_encoders.main, measure_encoders.Config, changed) == 2
        assert "cost.json: holds other encoder costs: " in capsys.readouterr().err
    (tmp_path / "cost.made_from.json").unlink()
    assert run(measure_encoders.main, measure_encoders.Config, [*arguments, listed, *sizes]) == 2
    assert "of unknown origin" in capsys.readouterr().err
    rates = {name: cost["tiles_per_second"] for name, cost in costs.items()}
    assert rates["plain"] == rates["tuned"], "the same work"
    assert len(set(rates.values())) == 5, "each other kind has its own clock"
    assert (
        costs["both"]["gflops"]
        > costs["plain"]["gflops"]
        > costs["gem"]["gflops"]
        > costs["small"]["gflops"]
        > 0
    )
    assert costs["both"]["parameters"] > costs["plain"]["parameters"]
