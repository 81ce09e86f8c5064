"""Arms of finished runs: their metrics, differences, costs, two speeds, pictures, page."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection_kd.evaluate_resolution import Config, main
from detection_kd.evaluation.grading_metrics import METRICS, grade_metrics
from detection_kd.grading.arms import ArmName, _name_arm, group_arms, read_runs
from detection_kd.grading.colour_baseline import name_colour
from detection_kd.grading.network_cost import count_gflop, count_loss_bytes, measure_costs
from detection_kd.grading.two_speed import mix_speeds
from detection_kd.losses.resolution_losses import ResolutionTerms
from detection_kd.models.low_resolution import GradingKeys, GradingNetwork, PatchScale
from tests.detection_kd.grading_runs import GRADES, train, write_graded_set
from wsi_common.config import load_config
from wsi_common.errors import UserError

CPU = torch.device("cpu")
TEACHER = ArmName(1, "full", "small", "ce")
PLAIN = ArmName(2, "native", "small -1 strides", "ce")
KD = ArmName(2, "native", "small -1 strides", "kd 1 + at_plus 2")
ENLARGED = ArmName(2, "enlarged", "small", "ce")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Teachers and students of two seeds, and an enlarged student of one."""
    folder = tmp_path_factory.mktemp("runs")
    inputs = write_graded_set(folder / "set")
    for seed in (1, 2):
        own = folder / "runs" / f"seed{seed}"
        settings = ("epochs=2", f"seed={seed}")
        train(inputs, own / "teacher", f"seed={seed}", "epochs=5")
        student = (*settings, "ratio=2", "network.removed_strides=1")
        train(inputs, own / "ce", *student)
        teacher = f"teacher_checkpoint={own}/teacher/checkpoint_best.pt"
        train(inputs, own / "kd", *student, teacher, "terms.kd=1", "terms.at_plus=2")
    train(
        inputs,
        folder / "runs" / "enlarged",
        "epochs=1",
        "seed=1",
        "ratio=2",
        "network.enlarged=true",
    )
    return folder / "runs"


@pytest.fixture(scope="module")
def output(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison of these."""
    folder = tmp_path_factory.mktemp("comparison")
    assert evaluate(runs, folder) == 0
    return folder


def evaluate(runs: Path, output: Path, *settings: str) -> int:
    given = [f"runs={runs}", f"output={output}", "resamples=200", "rounds=1", "batch_size=2"]
    return main(load_config(Config, [*given, "device=cpu", "precision=fp32", *settings]))


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open() as stream:
        return list(csv.DictReader(stream))


def name_arm(row: dict[str, str]) -> ArmName:
    return ArmName(int(row["ratio"]), row["form"], row["trunk"], row["terms"])


def test_runs_that_differ_in_their_seed_are_one_arm(runs: Path) -> None:
    arms = group_arms(read_runs(runs))
    assert {arm: len(own) for arm, own in arms.items()} == {
        TEACHER: 2,
        PLAIN: 2,
        KD: 2,
        ENLARGED: 1,
    }
    assert [run.graded.seed for run in arms[KD]] == [1, 2]
    for own in arms.values():
        for run in own:
            assert (run.probabilities.argmax(1) == run.graded.predicted).all()


def test_the_table_has_means_of_runs_and_costs(runs: Path, output: Path) -> None:
    rows = {name_arm(row): row for row in read_rows(output / "arms.csv")}
    arms = group_arms(read_runs(runs))
    assert rows.keys() == arms.keys() | {name_colour(1), name_colour(2)}
    for arm, own in arms.items():
        for metric in METRICS:
            mean = np.mean([grade_metrics(run.graded)[metric][0] for run in own])
            assert float(rows[arm][metric]) == pytest.approx(mean)
        assert float(rows[arm]["per_second"]) > 0
    flops = {arm: float(rows[arm]["gflop"]) for arm in arms}
    assert flops[ENLARGED] == flops[TEACHER] and flops[PLAIN] == flops[KD]
    # one network, measured once: no arm is faster by what it learned from
    assert rows[PLAIN]["per_second"] == rows[KD]["per_second"]


def test_colour_alone_stands_beside_the_networks(output: Path) -> None:
    """The rendered dots are larger and darker with the grade, which their histogram tells."""
    rows = {name_arm(row): row for row in read_rows(output / "arms.csv")}
    for ratio in (1, 2):
        row = rows[name_colour(ratio)]
        assert float(row["kappa_quadratic"]) > 0.8
        assert row["runs"] == "2" and row["gflop"] == row["per_second"] == ""
    assert "33 colour numbers" in (output / "resolution.html").read_text()


def test_differences_are_between_runs_of_the_same_seed(runs: Path, output: Path) -> None:
    """And the share of the gap to the teachers that they learned from."""
    rows = read_rows(output / "differences.csv")
    assert {name_arm(row) for row in rows} == {KD} and [row["metric"] for row in rows] == [*METRICS]
    arms = group_arms(read_runs(runs))
    values = {
        arm: [grade_metrics(run.graded)["accuracy"][0] for run in arms[arm]]
        for arm in (TEACHER, PLAIN, KD)
    }
    row = rows[0]
    assert row["pairs"] == "2"
    gaps = np.subtract(values[KD], values[PLAIN])
    assert float(row["difference"]) == pytest.approx(gaps.mean())
    half = 12.7062 * gaps.std(ddof=1) / np.sqrt(2)  # Student's t with one degree of freedom
    assert float(row["seeds_ci_high"]) == pytest.approx(gaps.mean() + half, rel=1e-4, abs=1e-9)
    way = np.mean(values[TEACHER]) - np.mean(values[PLAIN])
    if way > 0:
        assert float(row["gap_closed"]) == pytest.approx(gaps.mean() / way)
    else:
        assert row["gap_closed"] == ""


def test_two_speeds_mix_a_student_with_its_own_teacher(runs: Path, output: Path) -> None:
    rows = read_rows(output / "two_speed.csv")
    assert {name_arm(row) for row in rows} == {KD}
    arms = group_arms(read_runs(runs))
    for row in rows:
        kappas = []
        for run, teacher in zip(arms[KD], arms[TEACHER], strict=True):
            mixed = mix_speeds(run.probabilities, teacher.probabilities, float(row["share"]))
            graded = run.graded
            right = type(graded)(
                graded.seed, graded.fold, graded.cases, graded.targets, mixed.argmax(1), 3
            )
            kappas.append(grade_metrics(right)["kappa_quadratic"][0])
        assert float(row["kappa_quadratic"]) == pytest.approx(np.mean(kappas))
    assert float(rows[-1]["share"]) == 1 and float(rows[-1]["of_teacher"]) == pytest.approx(1)


def test_pictures_and_a_page_that_stands_alone(output: Path) -> None:
    for name in ("resolution.png", "attention.png"):
        with Image.open(output / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    html = (output / "resolution.html").read_text()
    assert html.count("data:image/png") == 2 and "at_plus 2" in html and 'src="http' not in html
    for grade in GRADES:
        assert grade in html


def test_nothing_is_read_but_the_runs_where_nobody_asks_for_patches(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("detection_kd.grading.colour_baseline.read_graded_split", None)
    assert evaluate(runs, tmp_path, "attention=0", "colour=false") == 0
    assert not (tmp_path / "attention.png").exists()
    assert "33 colour" not in (tmp_path / "resolution.html").read_text()


def test_arms_without_a_teacher_at_hand_have_no_gap(runs: Path, tmp_path: Path) -> None:
    for name in ("ce", "kd"):
        shutil.copytree(runs / "seed1" / name, tmp_path / "runs" / name)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "two_speed.csv").write_text("of an earlier comparison")
    assert evaluate(tmp_path / "runs", tmp_path / "out") == 0
    row = read_rows(tmp_path / "out" / "differences.csv")[0]
    assert row["gap_closed"] == "" and row["seeds_ci_low"] == ""
    assert not (tmp_path / "out" / "two_speed.csv").exists()


def test_runs_that_cannot_be_compared_are_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected finished runs of train_resolution_kd below it"):
        read_runs(tmp_path)
    for name in ("one", "two"):
        shutil.copytree(runs / "seed1" / "ce", tmp_path / name)
    with pytest.raises(UserError, match="expected one run per arm, seed and fold, found .*one and"):
        read_runs(tmp_path)


def copy_run(source: Path, target: Path, changes: dict[str, object]) -> None:
    """A copy of a run of another seed, with these settings."""
    shutil.copytree(source, target)
    for name, part in (("run.json", "config"), ("results.json", None)):
        values = json.loads((target / name).read_text())
        own = values[part] if part else values
        own |= {"seed": 7} | (changes if part else {})
        (target / name).write_text(json.dumps(values))


def test_runs_of_other_settings_are_no_arm(runs: Path, tmp_path: Path) -> None:
    """Their mean would be nobody's; another seed alone is one."""
    shutil.copytree(runs / "seed1" / "ce", tmp_path / "one")
    copy_run(runs / "seed1" / "ce", tmp_path / "two", {"precision": "bf16"})
    (own,) = group_arms(read_runs(tmp_path)).values()
    assert [run.graded.seed for run in own] == [1, 7]
    shutil.rmtree(tmp_path / "two")
    copy_run(runs / "seed1" / "ce", tmp_path / "two", {"lr": 0.5})
    with pytest.raises(UserError, match=r"two: expected the settings of .*one, .* lr 0.002 -> 0.5"):
        read_runs(tmp_path)


def test_runs_of_one_fold_have_the_same_test_patches(runs: Path, tmp_path: Path) -> None:
    """Else the draws of cases of one would be applied to the other."""
    shutil.copytree(runs / "seed1" / "ce", tmp_path / "one")
    copy_run(runs / "seed1" / "ce", tmp_path / "two", {})
    lines = (tmp_path / "two" / "predictions.csv").read_text().splitlines()
    (tmp_path / "two" / "predictions.csv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    with pytest.raises(UserError, match=r"two: expected the test patches of .*one, .*same fold"):
        read_runs(tmp_path)


def test_an_arm_is_named_by_how_its_terms_are_computed() -> None:
    described = {
        "network": {"trunk": "small", "removed_strides": 0, "enlarged": False},
        "scale": {"ratio": 4},
        "terms": {"kd": 1.0, "at_plus": 10.0},
        "training": {
            "terms": asdict(ResolutionTerms(kd=1.0, at_plus=10.0)),
            "data": {"ungraded": ""},
        },
    }
    assert _name_arm(described).terms == "kd 1 + at_plus 10"
    described["training"]["terms"] |= {"temperature": 2.0, "level": -2, "one_sided": True}
    assert (
        _name_arm(described).terms == "kd 1 + at_plus 10, temperature 2, one_sided True, level -2"
    )
    described["training"]["data"]["ungraded"] = "further"
    assert _name_arm(described).terms.endswith("level -2, ungraded patches")
    described["terms"] = {}
    assert _name_arm(described).terms == "ce"


def test_costs_of_native_and_enlarged_networks() -> None:
    """A native VGG16 has exactly ratio^2 times fewer operations and keeps that much less."""
    networks = {}
    for enlarged in (True, False):
        keys = GradingKeys("small", "random", enlarged=enlarged, norm="layer")
        networks[str(enlarged)] = GradingNetwork(keys, GRADES, PatchScale(128, 4))
    assert count_gflop(networks["True"]) == 16 * count_gflop(networks["False"])
    pixels = torch.rand(2, 3, 32, 32)
    kept = {name: count_loss_bytes(network, pixels) for name, network in networks.items()}
    assert kept["False"] <= kept["True"] / 8
    costs = measure_costs(networks, 2, 1, CPU, "fp32")
    assert costs["False"].kept_mib == pytest.approx(kept["False"] / 2 / 2**20)
    assert costs["False"].per_second > costs["True"].per_second
