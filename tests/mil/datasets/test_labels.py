"""Labels, bags and splits: what is refused, and that no patient is on two sides."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mil.datasets.bags import digest_bags, find_bags, load_bags
from mil.datasets.labels import LabelledSlides, read_labelled_slides
from mil.datasets.splits import (
    SETS,
    Split,
    carve_validation,
    check_split,
    list_split_values,
    make_splits,
    write_splits,
)
from patch_encoder.bags.writer import write_bag
from patch_encoder.cohort.labels import SlideRecord
from wsi_common.errors import UserError


def patients(per_class: dict[str, int], slides_each: int = 1, seed: int = 0) -> LabelledSlides:
    """Patients p0.. of each class in shuffled order; every third patient has one slide more."""
    records = []
    for label, count in per_class.items():
        for p in range(count):
            for s in range(slides_each + (p % 3 == 0)):
                records.append(SlideRecord(f"{label}{p}", f"{label}{p}_{s}", label))
    order = np.random.default_rng(seed).permutation(len(records))
    return LabelledSlides(tuple(records[i] for i in order), tuple(sorted(per_class)))


@pytest.mark.parametrize("seed", range(4))
def test_folds_never_share_a_patient_and_are_stratified(seed: int):
    slides = patients({"a": 30, "b": 15})
    case_of = {r.slide_id: r.case_id for r in slides.records}
    splits = make_splits(slides, "cv", 5, 0.2, seed)
    assert sorted(s for split in splits for s in split.test) == sorted(slides.slide_ids)
    for split in splits:
        assert sorted(split.train + split.val + split.test) == sorted(slides.slide_ids)
        cases = [{case_of[slide] for slide in getattr(split, name)} for name in SETS]
        assert not (cases[0] & cases[1] or cases[0] & cases[2] or cases[1] & cases[2])
        share = [np.mean([s.startswith("a") for s in getattr(split, name)]) for name in SETS]
        np.testing.assert_allclose(share, 2 / 3, atol=0.13)
        assert 0.1 < len(split.val) / (len(split.val) + len(split.train)) < 0.3


@pytest.mark.parametrize("fraction", [0.1, 0.2, 0.3, 0.4, 0.5])
def test_val_fraction_is_the_share_of_patients_of_every_class(fraction: float):
    """A rare class does not change it for the other one."""
    slides = patients({"a": 40, "b": 3})
    train, val = carve_validation(slides, fraction, 0)
    case_of = {r.slide_id: r.case_id for r in slides.records}
    assert sorted(train + val) == sorted(slides.slide_ids)
    held = {case_of[slide] for slide in val}
    assert not held & {case_of[slide] for slide in train}
    assert sum(case.startswith("a") for case in held) == round(40 * fraction)
    assert sum(case.startswith("b") for case in held) == max(1, round(3 * fraction))
    assert (train, val) == carve_validation(slides, fraction, 0)
    assert (train, val) != carve_validation(slides, fraction, 1)


@pytest.mark.parametrize("spelling", ["val", "Validation", "valid", "dev", "tune"])
def test_official_sets_in_any_spelling(spelling: str):
    rows = [(f"s{i}", ("Training", spelling, "TEST")[i // 4], "ab"[i % 2]) for i in range(12)]
    records = [SlideRecord(slide, slide, label, split) for slide, split, label in rows]
    unused = SlideRecord("s12", "s12", "a", None)
    (split,) = make_splits(LabelledSlides((*records, unused), ("a", "b")), "fixed", 5, 0.2, 0)
    assert split.val == ("s4", "s5", "s6", "s7"), "nothing is carved out of training"
    assert len(split.train) == len(split.test) == 4
    odd = SlideRecord("s13", "s13", "a", "hold-out")
    with pytest.raises(UserError, match=r"slide s13: expected a split of train.*found 'hold-out'"):
        make_splits(LabelledSlides((*records, odd), ("a", "b")), "fixed", 5, 0.2, 0)


@pytest.mark.parametrize(
    ("labels", "positive"),
    [
        (("abnormal", "normal"), None),
        (("HSIL", "NILM"), None),
        (("Mutated", "Wild-Type"), None),
        (("abnormal", "normal"), "abnormal"),
        (("neg", "pos"), None),
    ],
)
def test_the_positive_class_is_named_and_never_the_normal_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, labels: tuple[str, str], positive: str | None
):
    table = tmp_path / "labels.csv"
    rows = [f"c{i},s{i},{labels[i % 2]}" for i in range(4)]
    table.write_text("\n".join(["case_id,slide_id,label", *rows]) + "\n")
    refused = positive is None and labels[1] != "pos"
    if refused:
        with pytest.raises(UserError, match=f"give positive={labels[0]}"):
            read_labelled_slides(table, (), positive)
        return
    with caplog.at_level("INFO"):
        slides = read_labelled_slides(table, (), positive)
    assert slides.classes[1] == (positive or "pos")
    assert f"the positive class is {slides.classes[1]}" in caplog.text


def test_folds_are_the_same_for_one_seed_and_differ_for_another():
    slides = patients({"a": 12, "b": 12})
    assert make_splits(slides, "cv", 3, 0.2, 1) == make_splits(slides, "cv", 3, 0.2, 1)
    assert make_splits(slides, "cv", 3, 0.2, 1) != make_splits(slides, "cv", 3, 0.2, 2)


def test_too_few_patients_is_said_with_the_numbers():
    with pytest.raises(
        UserError, match=r"folds=5: expected at least 5 patients per class, found a: 12, b: 4"
    ):
        make_splits(patients({"a": 12, "b": 4}, slides_each=3), "cv", 5, 0.2, 0)
    with pytest.raises(
        UserError, match=r"expected 2 training patients or more per class, found a: \d+, b: 1"
    ):
        make_splits(patients({"a": 12, "b": 2}), "cv", 2, 0.2, 0)
    with pytest.raises(UserError, match=r"val_fraction=0\.0"):
        make_splits(patients({"a": 12, "b": 12}), "cv", 2, 0.0, 0)


def official(**sets: list[tuple[str, str]]) -> LabelledSlides:
    records = [
        SlideRecord(case, f"{case}-{i}", label, name)
        for name, rows in sets.items()
        for i, (case, label) in enumerate(rows)
    ]
    return LabelledSlides(tuple(records), ("a", "b"))


def test_fixed_split_takes_the_column(caplog: pytest.LogCaptureFixture):
    rows = [(f"p{i}", "ab"[i % 2]) for i in range(12)]
    with_val = make_splits(
        official(train=rows[:6], val=rows[6:8], test=rows[8:]), "fixed", 5, 0.2, 0
    )[0]
    assert [len(with_val.train), len(with_val.val), len(with_val.test)] == [6, 2, 4]
    caplog.set_level("INFO")
    carved = make_splits(official(train=rows[:8], test=rows[8:]), "fixed", 5, 0.25, 0)[0]
    assert len(carved.test) == 4 and len(carved.val) == 2 and len(carved.train) == 6
    assert "no split 'val'; 2 of 8 training slides" in caplog.text
    with pytest.raises(UserError, match="expected slides with split 'test', found train"):
        make_splits(official(train=rows), "fixed", 5, 0.2, 0)


def test_fixed_split_with_a_patient_on_two_sides_or_a_missing_class_is_refused():
    rows = [(f"p{i}", "ab"[i % 2]) for i in range(8)]
    with pytest.raises(UserError, match="case 'p0' is in train and in test"):
        make_splits(
            official(train=rows[:4], val=rows[4:6], test=[*rows[6:], ("p0", "a")]),
            "fixed",
            5,
            0.2,
            0,
        )
    with pytest.raises(UserError, match=r"every class in the test set \(1 slides\), 'b' is absent"):
        make_splits(official(train=rows[:4], val=rows[4:6], test=rows[6:7]), "fixed", 5, 0.2, 0)


def test_val_and_train_leaks_are_found():
    slides = official(
        train=[("p0", "a"), ("p1", "b")],
        val=[("p0", "a"), ("p2", "b")],
        test=[("p3", "a"), ("p4", "b")],
    )
    ids = {name: tuple(r.slide_id for r in slides.records if r.split == name) for name in SETS}
    with pytest.raises(UserError, match="case 'p0' is in train and in val"):
        check_split(slides, Split(0, ids["train"], ids["val"], ids["test"]))


def test_carve_works_with_two_patients_a_class():
    train, val = carve_validation(patients({"a": 2, "b": 2}), 0.2, 0)
    assert {s[:2] for s in train}.isdisjoint({s[:2] for s in val}) and {s[0] for s in val} == {
        "a",
        "b",
    }


def test_split_files_are_what_clam_reads(tmp_path: Path):
    slides = patients({"a": 9, "b": 9})
    split = make_splits(slides, "cv", 3, 0.25, 0)[1]
    write_splits(tmp_path, [split])
    with (tmp_path / "splits_1.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["train", "val", "test"]
    for name in SETS:
        assert [row[name] for row in rows if row[name]] == list(getattr(split, name))


def test_subset_chooses_by_the_split_column(make_cohort):
    labels = make_cohort(slides=12) / "labels.csv"
    assert len(read_labelled_slides(labels).records) == 12
    assert len(read_labelled_slides(labels, ("test",)).records) == 4
    with pytest.raises(
        UserError, match="expected slides with split tset, found none; did you mean 'test'"
    ):
        read_labelled_slides(labels, ("tset",))
    unsplit = labels.with_name("unsplit.csv")
    unsplit.write_text("case_id,slide_id,label\nC1,S1,a\nC2,S2,b\n")
    with pytest.raises(UserError, match=r"found none; the split column is empty; set protocol=cv"):
        read_labelled_slides(unsplit, SETS)
    assert list_split_values("") == () and list_split_values("a, b") == ("a", "b")
    assert read_labelled_slides(labels, (), "neg").classes == ("pos", "neg")


def test_one_class_and_repeated_slides_are_refused(make_cohort):
    labels = make_cohort(slides=6) / "labels.csv"
    text = labels.read_text()
    labels.write_text(text.replace("pos", "neg"))
    with pytest.raises(UserError, match="expected at least two classes"):
        read_labelled_slides(labels)
    labels.write_text(text + text.splitlines()[1] + "\n")
    with pytest.raises(UserError, match="more than once, first 's00'"):
        read_labelled_slides(labels)


def test_missing_bags_come_in_one_line(make_cohort, caplog: pytest.LogCaptureFixture):
    folder = make_cohort(slides=6) / "bags"
    (folder / "h5_files" / "s01.h5").unlink()
    (folder / "h5_files" / "s04.h5").unlink()
    ids = [f"s{i:02d}" for i in range(6)]
    with pytest.raises(UserError, match="2 of 6 labelled slides have no bag: s01, s04"):
        find_bags(folder, ids)
    assert list(find_bags(folder, ids, skip_missing=True)) == ["s00", "s02", "s03", "s05"]
    assert "s01, s04; left out" in caplog.text
    with pytest.raises(UserError, match="2 of 2"):
        find_bags(folder, ["s01", "s04"], skip_missing=True)


def test_bags_are_loaded_as_float32_with_their_corners(make_cohort):
    files = find_bags(make_cohort(slides=4, dim=5) / "bags", ["s03", "s00"])
    bags = load_bags(files)
    assert list(bags) == ["s03", "s00"] and bags["s00"].shape == (12, 5)
    assert bags["s00"].read().shape == (12, 5) and bags["s00"].read().dtype == torch.float32
    assert bags["s00"].coords.shape == (12, 2) and bags["s00"].tiling["patch_size_level0"] == 16


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.full((3, 8), np.nan, np.float32), "s01.h5.*NaN"),
        (np.full((3, 8), np.inf, np.float32), "s01.h5.*infinity"),
        (np.zeros((0, 8), np.float32), "s01.h5.*empty"),
        (np.zeros((3, 7), np.float32), "s01.h5: expected 8 features as in slide s00, found 7"),
    ],
)
def test_bad_bags_are_refused_by_name(make_cohort, features: np.ndarray, message: str):
    folder = make_cohort(slides=3) / "bags"
    with h5py.File(folder / "h5_files" / "s01.h5", "w") as file:
        file["features"] = features
    with pytest.raises(UserError, match=message):
        load_bags(find_bags(folder, ["s00", "s01", "s02"]))


def test_digest_follows_the_bags_not_their_place(make_cohort, tmp_path: Path):
    folder = make_cohort(slides=3) / "bags"
    files = find_bags(folder, ["s00", "s01"])
    before = digest_bags(files)
    shutil.copytree(folder, tmp_path / "copy")
    assert digest_bags(find_bags(tmp_path / "copy", ["s01", "s00"])) == before
    bag = load_bags(files)["s01"].read().numpy()
    bag[2, 3] += 1
    write_bag(files["s01"], bag, load_bags(files)["s01"].coords, {})
    assert digest_bags(files) != before
