"""The study of filters from end to end on drawn crops: all kinds of rows, a row that is refused, and
a second start.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from studies.filter_study import Config, main
from tests.patch_encoder.demo.drawn_crops import write_crops
from wsi_common.cli import run

pytestmark = pytest.mark.process

SMALL = [
    "seeds=[1,2]",
    "compose=['field_counts=[60,24,24]','positive_fields=[20,8,8]','look_alike_fields=[6,2,2]',"
    "'wrong_share=0.3']",
    "train_mitosis=['tile_size=84','network.trunk=small','network.init=random','epochs=1','batch_size=16',"
    "'lr=4e-3','workers=0','precision=fp32']",
    "device=cpu",
    "resamples=60",
]
FILTERS = (
    "filters={soft_weights: {mode: soft}, out_of_fold: {mode: soft, folds: 2}, "
    "refused: {criterion: FP_TP, teacher_threshold: own, folds: 1}}"
)


def test_all_rows_are_in_the_table_and_a_second_start_trains_nothing(tmp_path: Path):
    arguments = [f"crops={write_crops(tmp_path / 'crops')}", f"output={tmp_path / 'study'}"]
    assert run(main, Config, [*arguments, *SMALL, FILTERS]) == 1, "a row is refused"
    output = tmp_path / "study" / "MIDOG_noisy"
    with (output / "filter_study.csv").open() as stream:
        rows = {row["row"]: row for row in csv.DictReader(stream)}
    assert list(rows) == ["teacher", "teacher_again", "clean_labels", "soft_weights", "out_of_fold"]
    assert all(row["seeds"] == "2" for row in rows.values())
    assert rows["soft_weights"]["minus_teacher"] and not rows["teacher"]["minus_teacher"]
    assert float(rows["soft_weights"]["noise_after"]) == pytest.approx(0.3, abs=0.05)
    failures = (output / "failures.csv").read_text()
    assert failures.count("expected 2 or more") == 2
    parts = [output / "seed1" / f"out_of_fold_part{part}" for part in (1, 2)]
    assert all((part / "checkpoint_best.pt").is_file() for part in parts)
    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("checkpoint_*.pt")}
    table = (output / "filter_study.md").read_text()
    assert run(main, Config, [*arguments, *SMALL, FILTERS]) == 1
    assert stamps == {path: path.stat().st_mtime_ns for path in output.rglob("checkpoint_*.pt")}
    assert table == (output / "filter_study.md").read_text()


def test_seeds_have_to_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert run(main, Config, [f"crops={tmp_path}", f"output={tmp_path}", "seeds=[1,1]"]) == 2
    assert "seeds: expected different whole numbers" in capsys.readouterr().err
