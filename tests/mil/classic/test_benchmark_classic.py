"""The classical MIL sets: readers, folds, the benchmark's tables and its bar; a short run on the
real Musk1.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy.io import savemat
from sklearn.linear_model import LogisticRegression

import mil.classic.sets as classic_sets
from mil.benchmark_classic import METHODS, Config, main, make_jobs
from mil.classic.recipes import NETWORKS, RATES, choose_recipe, pool_bags, predict_simple
from mil.classic.sets import (
    COUNTS,
    FILES,
    ClassicSet,
    check_folds,
    load_set,
    make_folds,
    read_data,
    read_jld,
)
from mil.classic.table import (
    PUBLISHED,
    SETS,
    ClassicRow,
    compute_accuracy,
    judge_methods,
    make_markdown,
)
from tests.helpers import kill_when
from wsi_common.cli import run as run_script
from wsi_common.config import load_config
from wsi_common.errors import UserError

SMALL = (20, 10, 50, 4)  # bags, positive, instances, features


def small_set() -> ClassicSet:
    """20 bags of 2 or 3 instances; a positive bag has one with a high first feature."""
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(2 + i % 2, 4)).astype(np.float32) for i in range(20)]
    for bag in bags[1::2]:
        bag[0, 0] += 6
    return ClassicSet("musk1", tuple(bags), np.arange(20) % 2)


def write_jld(path: Path, classic: ClassicSet, train: np.ndarray) -> None:
    """As Julia's JLD writes it: references, (D, n) arrays, bits in 64-bit words."""
    with h5py.File(path, "w") as file:
        kind = np.dtype([("chunks_", h5py.ref_dtype), ("len_", "<i8")])

        def bits(mask: np.ndarray) -> np.ndarray:
            packed = np.zeros(8 * -(-len(mask) // 64), np.uint8)
            packed[: -(-len(mask) // 8)] = np.packbits(mask, bitorder="little")
            chunks = file.create_dataset(f"_refs/{len(file['_refs'])}", data=packed.view("<u8"))
            return np.array((chunks.ref, len(mask)), kind)

        def refs(name: str, values: list[np.ndarray]) -> h5py.Dataset:
            stored = [
                file.create_dataset(f"_refs/{name}{i}", data=value)
                for i, value in enumerate(values)
            ]
            return file.create_dataset(
                name, data=np.array([s.ref for s in stored], dtype=h5py.ref_dtype)
            )

        file.create_group("_refs")
        refs("X", [bag.T for bag in classic.bags])
        file["y"] = bits(classic.targets.astype(bool))
        repeats = [
            refs(f"_refs/repeat{r}", [bits(mask) for mask in masks])
            for r, masks in enumerate(train)
        ]
        file["folds"] = np.array([repeat.ref for repeat in repeats], dtype=h5py.ref_dtype)


def write_data(path: Path, classic: ClassicSet) -> None:
    rows = [
        [f"bag{b}", f"{b}_{i}", *map(repr, map(float, row)), f"{target}."]
        for b, (bag, target) in enumerate(zip(classic.bags, classic.targets, strict=True))
        for i, row in enumerate(bag)
    ]
    path.write_text("".join(",".join(row) + "\n" for row in rows))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a small 'Musk1' in two forms and a small 'Musk2' in MATLAB's."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("musk1", "musk2"):
        monkeypatch.setitem(classic_sets.COUNTS, name, SMALL)
    classic = small_set()
    write_jld(folder / "Musk1.jld", classic, ~make_folds(classic, 2, 5, 0))
    write_data(folder / "musk1.data", classic)
    bag = np.concatenate([np.full(len(b), i + 1) for i, b in enumerate(classic.bags)])
    savemat(folder / "musk2_X.mat", {"X": np.concatenate(classic.bags)})
    savemat(folder / "musk2_Bag2.mat", {"Bag2": bag[:, None].astype(np.uint8)})
    savemat(folder / "musk2_BagI.mat", {"bagI": classic.targets[:, None].astype(np.uint8)})
    return folder


def test_every_form_gives_the_same_bags(data: Path):
    classic, masks = small_set(), make_folds(small_set(), 2, 5, 0)
    first = load_set(data, "musk1")
    for found in (first, read_data(data / "musk1.data", "musk1"), load_set(data, "musk2")):
        assert all(np.array_equal(a, b) for a, b in zip(found.bags, classic.bags, strict=True))
        assert (
            found.targets.tolist() == classic.targets.tolist()
            and found.digest() == classic.digest()
        )
    assert first.folds is not None and np.array_equal(
        first.folds, masks
    )  # the file has the training masks


def test_folds_of_the_file_are_taken_and_others_drawn(data: Path):
    first = load_set(data, "musk1")
    assert np.array_equal(make_folds(first, 2, 5, 77), make_folds(small_set(), 2, 5, 0))
    drawn = make_folds(first, 3, 5, 77)  # the file has two repeats
    check_folds(drawn, "drawn")
    assert drawn.shape == (3, 5, 20) and not np.array_equal(drawn[0], drawn[1])
    assert (drawn & (first.targets == 1)).sum(2).tolist() == [[2] * 5] * 3  # stratified
    twice = drawn.copy()
    twice[1, 0] |= twice[1, 1]
    with pytest.raises(UserError, match="every bag in one test fold of a repeat, found bag"):
        check_folds(twice, "x")


def test_copies_and_counts_are_checked(data: Path):
    changed = small_set()
    changed.bags[3][0, 0] += 1
    write_data(data / "musk1.data", changed)
    with pytest.raises(UserError, match="musk1.data: expected the bags of Musk1.jld, found others"):
        load_set(data, "musk1")
    write_data(data / "musk1.data", ClassicSet("musk1", changed.bags[:-1], changed.targets[:-1]))
    with pytest.raises(UserError, match=r"features \(20, 10, 50, 4\), found \(19, 9, 47, 4\)"):
        load_set(data, "musk1")
    with pytest.raises(UserError, match="expected one of Fox.jld"):
        load_set(data, "fox")
    (data / "musk1.data").write_text("a,b,1,x\n")
    with pytest.raises(UserError, match="expected lines 'bag,instance"):
        read_data(data / "musk1.data", "musk1")
    (data / "Musk1.jld").write_bytes(b"no HDF5")
    with pytest.raises(UserError, match=r"expected a .jld of MIL bags"):
        read_jld(data / "Musk1.jld", "musk1")


def test_simple_rows_never_see_a_test_bag():
    classic = small_set()
    vectors, test = pool_bags(classic.bags), make_folds(classic, 1, 5, 0)[0, 2]
    assert vectors.shape == (20, 12)
    assert np.array_equal(
        vectors[3], np.r_[classic.bags[3].mean(0), classic.bags[3].max(0), classic.bags[3].min(0)]
    )
    mean, std = vectors[~test].mean(0), vectors[~test].std(0)
    model = LogisticRegression(C=0.05, max_iter=2000).fit(
        (vectors[~test] - mean) / std, classic.targets[~test]
    )
    expected = model.predict((vectors[test] - mean) / std)
    flipped = np.where(test, 1 - classic.targets, classic.targets)
    assert predict_simple("logistic", vectors, flipped, test).tolist() == expected.tolist()
    assert set(predict_simple("rbf_svm", vectors, classic.targets, test)) <= {0, 1}


def read_table(output: Path) -> list[dict[str, str]]:
    with (output / "table.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def config_of(data: Path, output: Path, *more: str) -> Config:
    base = [
        f"folder={data}",
        f"output={output}",
        "sets=[musk1]",
        "methods=[rbf_svm,abmil]",
        "repeats=2",
        "folds=5",
        "epochs=2",
    ]
    return load_config(Config, [*base, *more])


def test_tables_are_those_of_the_repeats_and_survive_interruption(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(config_of(data, tmp_path / "a")) == 0
    printed, runs = capsys.readouterr().out, tmp_path / "a" / "runs" / "musk1"
    rows = {row["method"]: row for row in read_table(tmp_path / "a")}
    for method in ("rbf_svm", "abmil"):
        repeats = [json.loads((runs / method / f"repeat_{r}.json").read_text()) for r in range(2)]
        means = []
        for repeat in repeats:
            right = np.array(repeat["predicted"]) == small_set().targets
            means.append(
                np.mean([right[np.array(repeat["fold"]) == fold].mean() for fold in range(5)])
            )
            assert repeat["accuracy"] == pytest.approx(means[-1])
        assert float(rows[method]["accuracy_mean"]) == pytest.approx(np.mean(means), abs=1e-4)
        assert float(rows[method]["accuracy_std"]) == pytest.approx(np.std(means, ddof=1), abs=1e-4)
    assert (rows["abmil"]["published"], rows["rbf_svm"]["published"], rows["abmil"]["repeats"]) == (
        "0.892",
        "",
        "2",
    )
    assert "bar: " in printed and printed.count("abmil on musk1") == 2
    # a kill between two repeats: what is missing is trained again, what is there is left alone
    (runs / "abmil" / "repeat_1.json").unlink()
    kept = (runs / "abmil" / "repeat_0.json").stat().st_mtime_ns
    assert main(config_of(data, tmp_path / "a")) == 0
    assert (runs / "abmil" / "repeat_0.json").stat().st_mtime_ns == kept
    assert read_table(tmp_path / "a") == list(rows.values())


def test_other_settings_are_refused_unless_overwritten(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    main(config_of(data, tmp_path / "a", "methods=[abmil]", "repeats=1", "epochs=1"))
    arguments = [
        f"folder={data}",
        f"output={tmp_path}/a",
        "sets=[musk1]",
        "methods=[abmil]",
        "repeats=1",
        "folds=5",
        "epochs=2",
    ]
    assert run_script(main, Config, arguments) == 2
    assert "epochs 1 -> 2" in capsys.readouterr().err
    assert run_script(main, Config, [*arguments, "overwrite=true"]) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("sets=[musk3]", "did you mean 'musk"),
        ("methods=[abml]", "did you mean 'abmil'"),
        ("methods=[]", "methods: unknown"),
        ("repeats=0", "repeats=0"),
        ("folds=1", "folds=1"),
        ("batch_size=0", "batch_size=0"),
        ("epochs=-1", "epochs=-1"),
    ],
)
def test_wrong_keys_are_one_line(tmp_path: Path, wrong: str, message: str):
    with pytest.raises(UserError, match=message):
        make_jobs(load_config(Config, [f"folder={tmp_path}", f"output={tmp_path}/a", wrong]))


@pytest.mark.parametrize("method", list(NETWORKS))
def test_every_network_trains_on_bags_of_one(data: Path, tmp_path: Path, method: str):
    main(
        config_of(
            data, tmp_path / "a", f"methods=[{method}]", "sets=[musk2]", "repeats=1", "epochs=1"
        )
    )
    assert (tmp_path / "a" / "runs" / "musk2" / method / "repeat_0.json").is_file()
    for name in RATES:
        recipe = choose_recipe(method, name, 16, 0)
        assert (recipe.epochs, recipe.batch_size) == (80 if method == "dsmil" else 50, 16)
    if method != "dsmil":  # an L2 penalty of l ||w||^2 decays the weights by 2 l
        assert (
            choose_recipe(method, "musk2", 1, 0).lr,
            choose_recipe(method, "musk2", 1, 0).weight_decay,
        ) == (5e-4, 0.06)


def test_the_bar():
    rows = [
        ClassicRow("rbf_svm", "fox", (0.60, 0.62)),
        ClassicRow("logistic", "fox", (0.70, 0.72)),
        ClassicRow("abmil", "fox", (0.64, 0.66)),
    ]
    rows.append(ClassicRow("dtfd", "fox", (0.66, 0.74)))
    verdicts = judge_methods(rows)
    assert [met for met, _ in verdicts] == [
        False,
        False,
        True,
    ]  # below logistic; 0.650 against 0.615; one std below
    assert "logistic 0.710" in verdicts[0][1] and "not within 0.03" in verdicts[1][1]
    assert "| abmil | 0.650 +- 0.014 (0.615) | - |" in make_markdown(rows, ["fox", "musk1"])
    assert all(len(values) == len(SETS) for values in PUBLISHED.values()) and set(PUBLISHED) < set(
        METHODS
    )
    masks = np.array([[True, True, False], [False, False, True]])
    assert compute_accuracy(np.array([True, False, True]), masks) == pytest.approx(0.75)


@pytest.mark.process
def test_a_killed_run_goes_on(real_data: Path, tmp_path: Path):
    """The real Musk1, two repeats' worth of ABMIL far above chance, after a kill."""
    arguments = [
        f"folder={real_data / 'mil_classic'}",
        "sets=[musk1]",
        "methods=[logistic,abmil]",
        "repeats=1",
        "epochs=8",
    ]
    first = tmp_path / "a" / "runs" / "musk1" / "logistic" / "repeat_0.json"
    kill_when(first.is_file, "mil.benchmark_classic", [*arguments, f"output={tmp_path}/a"])
    written = first.stat().st_mtime_ns
    assert main(load_config(Config, [*arguments, f"output={tmp_path}/a"])) == 0
    assert first.stat().st_mtime_ns == written
    rows = {row["method"]: float(row["accuracy_mean"]) for row in read_table(tmp_path / "a")}
    assert rows["abmil"] > 0.75 and rows["logistic"] > 0.8


def test_real_sets_have_their_known_counts_and_folds(real_data: Path):
    folder = real_data / "mil_classic"
    for name in COUNTS:
        assert any((folder / file).is_file() for file in FILES[name])
        classic = load_set(folder, name)
        assert classic.counts() == COUNTS[name]
        assert (classic.folds is None) == (name == "musk2")
        masks = make_folds(classic, 5, 10, 2024)
        check_folds(masks, name)
        assert (
            masks.shape[:2] == (5, 10) and (masks.sum(2) <= 21).all() and (masks.sum(2) >= 9).all()
        )
