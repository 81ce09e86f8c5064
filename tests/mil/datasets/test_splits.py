"""Splits as files: nested, repeated and official ones, what leaks are found and named, and who
reads them back.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from mil import benchmark, make_splits, train
from mil.datasets.labels import LabelledSlides
from mil.datasets.splits import (
    SETS,
    Split,
    read_stored_splits,
    select_known_slides,
    write_clam_splits,
    write_splits,
)
from mil.datasets.stored_splits import check_splits
from patch_encoder.cohort.labels import SlideRecord
from tests.mil.tasks.task_cohorts import COHORTS, rewrite
from wsi_common.cli import run as run_script
from wsi_common.config import load_config
from wsi_common.errors import UserError

EVENTS = ["censored", "event"]
STRATA = {"multilabel": ["-", "a", "b"], "ordinal": list("0123"), "cox": EVENTS, "discrete": EVENTS}
STRATA["regression"] = ["bin1", "bin2", "bin3"]


def cohort(patients: int = 24) -> LabelledSlides:
    """Every third patient has two slides."""
    rows = [
        (f"p{i:02d}", f"p{i:02d}-{j}", "ab"[i % 2])
        for i in range(patients)
        for j in range(1 + (i % 3 == 0))
    ]
    return LabelledSlides(
        tuple(SlideRecord(case, slide, label) for case, slide, label in rows), ("a", "b")
    )


def sides(split: Split) -> dict[str, set[str]]:
    return {name: {slide.split("-")[0] for slide in getattr(split, name)} for name in SETS}


def test_nested_folds_test_every_patient_once_and_validate_every_other_once():
    slides = cohort()
    splits = make_splits.make_splits(slides, "cv", 3, 0.2, 5, 4, 2)
    assert [split.fold for split in splits] == list(range(3 * 4 * 2))
    for repeat in range(2):
        mine = splits[12 * repeat : 12 * repeat + 12]
        tested = Counter(slide for split in mine[::4] for slide in split.test)
        assert set(tested) == set(slides.slide_ids) and set(tested.values()) == {1}
        for outer in range(3):
            inner = mine[4 * outer : 4 * outer + 4]
            assert len({split.test for split in inner}) == 1
            validated = Counter(slide for split in inner for slide in split.val)
            assert set(validated.values()) == {1} and set(validated) == set(slides.slide_ids) - set(
                inner[0].test
            )
            for split in inner:
                found = sides(split)
                assert not (
                    found["train"] & found["val"]
                    or found["train"] & found["test"]
                    or found["val"] & found["test"]
                )
    assert splits[0].test != splits[12].test  # another draw
    assert make_splits.make_splits(slides, "cv", 3, 0.2, 6, 4)[0].test == splits[12].test


def test_all_three_files_say_the_same(tmp_path: Path):
    slides = cohort()
    splits = make_splits.make_splits(slides, "cv", 3, 0.25, 1)
    write_clam_splits(tmp_path, splits, slides)
    assert read_stored_splits(tmp_path) == splits
    boolean = pd.read_csv(tmp_path / "splits_1_bool.csv", index_col=0)
    assert boolean.dtypes.tolist() == [bool] * 3 and (boolean.sum(axis=1) == 1).all()
    for name in SETS:
        assert set(boolean.index[boolean[name]]) == set(getattr(splits[1], name))
    described = pd.read_csv(tmp_path / "splits_1_descriptor.csv", index_col=0)
    assert described[list(SETS)].to_numpy().sum() == len(slides.records)
    assert described.loc["a", "test_patients"] == len(
        {s[:3] for s in splits[1].test if int(s[1:3]) % 2 == 0}
    )
    for path in tmp_path.glob("splits_[0-9].csv"):
        path.unlink()
    again = read_stored_splits(tmp_path)  # from the boolean form, in the order of labels.csv
    assert [{name: set(getattr(s, name)) for name in SETS} for s in again] == [
        {name: set(getattr(s, name)) for name in SETS} for s in splits
    ]


def test_splits_from_a_spreadsheet(tmp_path: Path):
    """A byte order mark before the header changes nothing."""
    (tmp_path / "splits_0.csv").write_bytes("\ufefftrain,val,test\r\na,b,c\r\n".encode())
    assert read_stored_splits(tmp_path) == [Split(0, ("a",), ("b",), ("c",))]


def test_clams_index_column_is_passed_over(tmp_path: Path):
    frame = pd.DataFrame({"train": ["001", "002"], "val": ["003", None], "test": ["004", None]})
    frame.to_csv(tmp_path / "splits_7.csv")
    assert read_stored_splits(tmp_path) == [Split(7, ("001", "002"), ("003",), ("004",))]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train,val\na,b\n", "expected the columns train, val, test, found train, val"),
        (
            "train,val,test\na,b,c\na,,\n",
            r"expected every slide once, found 1 more often: a \(a in train and in train\)",
        ),
        ("train,val,test\na,b,c\nb,,d\n", r"b \(b in train and in val\)"),
        ("train,val,test\na,,c\n", "expected slides in train, val and test, found none in val"),
    ],
)
def test_faulty_files_are_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "splits_0.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_stored_splits(tmp_path)


def test_patients_on_two_sides_unknown_slides_and_missing_classes_are_named():
    slides = cohort(12)
    ids = slides.slide_ids
    split = make_splits.make_splits(slides, "cv", 2, 0.25, 0)[0]
    both = next(s for s in split.train if s.endswith("-0") and s[:3] + "-1" in split.train)
    moved = Split(0, tuple(s for s in split.train if s != both), split.val, (*split.test, both))
    with pytest.raises(
        UserError, match=f"case '{both[:3]}' is in train and in test; 1 of 1 .* give a patient one"
    ):
        check_splits([moved], slides, ids)
    pairs = [s[:3] for s in ids if s.endswith("-1")]
    first = tuple(s for s in ids if s.endswith("-0"))
    with pytest.raises(
        UserError,
        match=rf"case '{pairs[0]}' is in train and in val \(and 3 more: {', '.join(pairs[1:])}\)",
    ):
        check_splits([Split(0, first, tuple(s for s in ids if s.endswith("-1")), ())], slides, ids)
    with pytest.raises(
        UserError, match=r"1 of 3 slides have no row in labels.csv: p00-9; did you mean"
    ):
        select_known_slides("folder", [Split(0, ("p00-9",), ("p01-0",), ("p02-0",))], slides)
    only_a = Split(0, split.train, split.val, tuple(s for s in split.test if int(s[1:3]) % 2 == 0))
    with pytest.raises(UserError, match="every class in the test set .* 'b' is absent"):
        check_splits([only_a], slides, ids)
    with pytest.raises(
        UserError, match="'b' is absent"
    ):  # what is left without the slides that have no bag
        check_splits([split], slides, [s for s in ids if int(s[1:3]) % 2 == 0])


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_script_makes_once_and_never_remakes(
    make_cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root, output = make_cohort(), tmp_path / "splits"
    arguments = [
        f"labels={root}/labels.csv",
        f"output={output}",
        f"features=[{root}/bags]",
        "folds=3",
    ]
    bag = root / "bags" / "h5_files" / "s00.h5"
    bag.rename(root / "away.h5")
    assert run_script(make_splits.main, make_splits.Config, arguments) == 2
    line = capsys.readouterr().err  # without a key that the script does not have
    assert "have no bag: s00; extract them" in line and "skip_missing" not in line
    (root / "away.h5").rename(bag)
    assert run_script(make_splits.main, make_splits.Config, arguments) == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()}
    assert len(before) == 3 * 3 + 1
    assert run_script(make_splits.main, make_splits.Config, arguments) == 0
    assert run_script(make_splits.main, make_splits.Config, [*arguments, "split_seed=7"]) == 2
    assert "splits=<folder> uses as they are: splits_0.csv '" in capsys.readouterr().err
    assert run_script(make_splits.main, make_splits.Config, [*arguments, "folds=4"]) == 2
    assert "splits_3.csv nothing -> '" in capsys.readouterr().err
    assert {
        path: (path.read_bytes(), path.stat().st_mtime_ns) for path in output.iterdir()
    } == before
    assert (
        run_script(make_splits.main, make_splits.Config, [*arguments, "folds=2", "overwrite=true"])
        == 0
    )
    assert len(read_stored_splits(output)) == 2 and len(list(output.iterdir())) == 2 * 3 + 1
    assert run_script(make_splits.main, make_splits.Config, [*arguments, "check=true"]) == 0
    (root / "bags" / "h5_files" / "s03.h5").unlink()
    capsys.readouterr()
    assert run_script(make_splits.main, make_splits.Config, [*arguments, "check=true"]) == 2
    assert "1 of 24 labelled slides have no bag: s03" in capsys.readouterr().err


def test_official_test_set_with_inner_folds(make_cohort, tmp_path: Path):
    root = make_cohort()
    arguments = [
        f"labels={root}/labels.csv",
        f"output={tmp_path}",
        "protocol=fixed",
        "inner_folds=3",
    ]
    make_splits.main(load_config(make_splits.Config, arguments))
    official = {row["slide_id"] for row in read(root / "labels.csv") if row["split"] == "test"}
    splits = read_stored_splits(tmp_path)
    assert len(splits) == 3 and all(set(split.test) == official for split in splits)
    assert len({slide for split in splits for slide in split.val}) == 24 - len(official)


@pytest.mark.process
def test_train_and_benchmark_read_them_back(
    make_cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root, folder = make_cohort(signal=5.0), tmp_path / "splits"
    make_splits.main(
        load_config(
            make_splits.Config,
            [f"labels={root}/labels.csv", f"output={folder}", "folds=2", "split_seed=9"],
        )
    )
    (folder / "splits_0.csv").unlink()
    (folder / "splits_0_bool.csv").unlink()  # a folder may hold any numbers
    small = [
        "device=cpu",
        "training.epochs=2",
        "training.min_epochs=1",
        f"labels={root}/labels.csv",
        f"splits={folder}",
    ]
    config = load_config(
        train.Config, [*small, f"features={root}/bags", f"output={tmp_path}/run", "fold=1"]
    )
    job = train.build_job(config)
    assert job.split == read_stored_splits(folder)[0]
    config.fold = 0
    with pytest.raises(UserError, match="fold=0: expected 1 to 1 with splits="):
        train.build_job(config)
    bench = [
        *small,
        f"features=[{root}/bags]",
        f"output={tmp_path}/bench",
        "models=[mean]",
        "headline=mean",
        "seeds=[1]",
    ]
    assert run_script(benchmark.main, benchmark.Config, [*bench, "resamples=20"]) == 0
    tested = {row["slide_id"] for row in read(tmp_path / "bench" / "predictions.csv")}
    assert tested == set(job.split.test)
    text = (folder / "splits_1.csv").read_text()
    (folder / "splits_1.csv").write_text(text.replace(job.split.test[0], "lost"))
    capsys.readouterr()
    assert run_script(benchmark.main, benchmark.Config, bench) == 2
    assert "1 of 24 slides have no row in labels.csv: lost" in capsys.readouterr().err


@pytest.mark.parametrize("kind", list(COHORTS))
def test_splits_of_every_task_are_those_its_trainings_draw(
    make_cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
):
    root, folder = rewrite(make_cohort(slides=32), kind), tmp_path / "splits"
    made = [
        f"labels={root}/labels.csv",
        f"output={folder}",
        "folds=3",
        "split_seed=6",
        f"task={kind}",
    ]
    assert run_script(make_splits.main, make_splits.Config, made) == 0
    small = [
        f"labels={root}/labels.csv",
        f"task={kind}",
        "training.accumulate=4",
        "folds=3",
        "split_seed=6",
        "fold=1",
    ]
    one = [*small, f"features={root}/bags", f"output={tmp_path}/run"]
    drawn = train.build_job(load_config(train.Config, one)).split
    assert read_stored_splits(folder)[1] == drawn
    stored = train.build_job(
        load_config(train.Config, [*one, f"splits={folder}", "split_seed=7"])
    ).split
    assert stored == drawn
    described = pd.read_csv(folder / "splits_1_descriptor.csv", index_col=0)
    assert described.index.astype(str).tolist() == STRATA[kind] and (described[list(SETS)] > 0).all(
        axis=None
    )
    assert run_script(make_splits.main, make_splits.Config, [*made, "check=true"]) == 0
    case_of = {row["slide_id"]: row["case_id"] for row in read(root / "labels.csv")}
    moved = next(s for s in drawn.train if list(case_of.values()).count(case_of[s]) == 2)
    leaky = Split(1, tuple(s for s in drawn.train if s != moved), drawn.val, (*drawn.test, moved))
    write_splits(folder, [leaky])
    capsys.readouterr()
    assert run_script(make_splits.main, make_splits.Config, [*made, "check=true"]) == 2
    assert f"split 1: case '{case_of[moved]}' is in train and in test" in capsys.readouterr().err


def test_named_grades_need_their_order(
    make_cohort, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root = make_cohort()
    made = [f"labels={root}/labels.csv", f"output={tmp_path}/splits", "folds=2", "task=ordinal"]
    assert run_script(make_splits.main, make_splits.Config, made) == 2
    assert "name the grades from the lowest with grades=[...]" in capsys.readouterr().err
    assert run_script(make_splits.main, make_splits.Config, [*made, "grades=[pos,neg]"]) == 0
    assert pd.read_csv(
        tmp_path / "splits" / "splits_0_descriptor.csv", index_col=0
    ).index.tolist() == ["pos", "neg"]
