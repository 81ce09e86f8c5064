"""Published splits that share patients between the sides of a fold, in HIPT's files: refused with a
line per fold, or made clean with their test sets kept.
"""

from __future__ import annotations

import csv
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from mil import benchmark, make_splits, train
from mil.datasets.labels import LabelledSlides
from mil.datasets.splits import SETS, Split, read_stored_splits
from mil.datasets.stored_splits import check_splits
from patch_encoder.cohort.labels import SlideRecord
from wsi_common.cli import run as run_script
from wsi_common.config import load_config
from wsi_common.errors import UserError

# patients p0 to p7 with two slides each, of the classes a and b by turns
SLIDES = LabelledSlides(
    tuple(SlideRecord(f"p{i}", f"p{i}-{j}", "ab"[i % 2]) for i in range(8) for j in range(2)),
    ("a", "b"),
)


def split_of(fold: int, train: str, val: str, test: str) -> Split:
    """A split from slides such as `00 01`: patient and number."""
    sets = (tuple(f"p{x[0]}-{x[1]}" for x in text.split()) for text in (train, val, test))
    return Split(fold, *sets)


LEAKY = split_of(0, "00 01 10 11 20 60", "30 61 40 70", "31 50 21")
CLEAN = split_of(1, "00 01 10 11", "20 30", "40 50")


def write_hipts_files(folder: Path, splits: list[Split]) -> None:
    """As the authors publish them: an index column, short columns padded with blanks."""
    folder.mkdir()
    for split in splits:
        rows = max(len(getattr(split, name)) for name in SETS)
        columns = [[*getattr(split, name), *[""] * rows][:rows] for name in SETS]
        with (folder / f"splits_{split.fold}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(["", *SETS])
            writer.writerows([i, *row] for i, row in enumerate(zip(*columns, strict=True)))


def test_every_fold_that_leaks_has_its_line_before_they_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    write_hipts_files(
        tmp_path / "splits", [LEAKY, CLEAN, split_of(2, "00 10 20 31", "40 50", "41 30")]
    )
    splits = read_stored_splits(tmp_path / "splits")
    assert splits[:2] == [LEAKY, CLEAN]
    with pytest.raises(
        UserError,
        match=r"^split 0: case 'p6' is in train and in val, case 'p2' is in train and in test, case "
        r"'p3' is in val and in test; 2 of 3 splits share patients; .* shared_patients=leave_out",
    ):
        check_splits(splits, SLIDES, SLIDES.slide_ids)
    lines = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.split(":")[0] for line in lines] == ["split 0", "split 2"]
    assert lines[1].endswith("case 'p3' is in train and in test, case 'p4' is in val and in test")


def test_patients_on_two_sides_keep_the_last_of_them(caplog: pytest.LogCaptureFixture):
    found = check_splits([LEAKY, CLEAN], SLIDES, SLIDES.slide_ids, "leave_out")
    # p2 and p3 are tested, p6 validates, nobody else moves
    assert found == [split_of(0, "00 01 10 11", "61 40 70", "31 50 21"), CLEAN]
    assert "split 0: 3 slides of patients on two sides are left out: p3-0, p2-0, p6-0" in (
        caplog.text
    )
    # a shared patient without a bag on one side is on one side
    without = [slide for slide in SLIDES.slide_ids if slide not in ("p2-0", "p3-0", "p6-0")]
    assert check_splits([LEAKY], SLIDES, without) == found[:1]


def test_what_is_left_must_still_be_a_split():
    with pytest.raises(UserError, match="split 0: expected slides of other patients in val"):
        check_splits(
            [split_of(0, "00 10", "20 30", "21 31")], SLIDES, SLIDES.slide_ids, "leave_out"
        )
    with pytest.raises(UserError, match=r"every class in the val set \(1 slides\), 'b' is absent"):
        check_splits(
            [split_of(0, "00 10", "40 30", "21 31")], SLIDES, SLIDES.slide_ids, "leave_out"
        )


def test_scripts_refuse_published_splits_or_train_on_what_is_clean(
    make_cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root, folder = make_cohort(signal=5.0), tmp_path / "splits"
    # s00 and s02 are slides of one patient, s01 and s03 of another
    slides = [f"s{i:02d}" for i in range(24)]
    leaky = Split(0, ("s00", *slides[4:14]), tuple(slides[14:18]), ("s02", *slides[18:]))
    write_hipts_files(folder, [leaky])
    given = [f"labels={root}/labels.csv"]
    assert (
        run_script(make_splits.main, make_splits.Config, [*given, f"output={folder}", "check=true"])
        == 2
    )
    assert "case 'case00' is in train and in test" in capsys.readouterr().err
    run = [*given, f"splits={folder}", "device=cpu", "training.epochs=1", "training.min_epochs=1"]
    bench = [
        *run,
        f"features=[{root}/bags]",
        f"output={tmp_path}/bench",
        "models=[mean]",
        "seeds=[1]",
    ]
    assert run_script(benchmark.main, benchmark.Config, bench) == 2
    assert "or set shared_patients=leave_out" in capsys.readouterr().err
    bench += ["shared_patients=leave_out", "resamples=20", "headline=mean", "isolated=false"]
    assert run_script(benchmark.main, benchmark.Config, bench) == 0
    stored = read_stored_splits(tmp_path / "bench" / "splits")
    assert stored == [replace(leaky, train=leaky.train[1:])]
    one = [*run, f"features={root}/bags", f"output={tmp_path}/run", "model=mean", "fold=0"]
    job = train.build_job(load_config(train.Config, [*one, "shared_patients=leave_out"]))
    assert job.split == stored[0]
