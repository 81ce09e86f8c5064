"""Several slides of a patient: as one bag on a plane that no two slides share, or as pooled
slides; and a patient with one slide is that slide.
"""

from __future__ import annotations

import csv
import json
import shutil
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

import mil
from mil import heatmap, report
from mil.datasets.bags import Sample
from mil.datasets.case_bags import GAP, join_bags
from mil.evaluation.pooling import pool_rows
from mil.evaluation.runs import read_finished
from mil.models import build
from mil.models.deform_mil import DeformMIL
from mil.tasks.classification import Classification
from mil.tasks.multilabel import Multilabel
from mil.tasks.ordinal import Ordinal
from mil.tasks.regression import Regression
from mil.training.engine import examine, load_trained_model
from mil.training.streaming import stream
from patch_encoder.bags.bag import make_bag, open_bag, slide_grid
from patch_encoder.bags.writer import write_bag
from tests.mil.conftest import geometry, write_cohort
from tests.mil.ensembles.new_cohorts import (
    predict_with,
    read_csv,
    read_results,
    train_benchmark,
    train_run,
    write_csv_rows,
    write_new_cohort,
)
from wsi_common.config import load_config
from wsi_common.errors import UserError
from wsi_common.metrics.classification import youden_threshold

CPU = torch.device("cpu")


def slide(tiles: int, side: int = 16, seed: int = 0, far: int = 0):
    """Tiles in rows of four, `side` px apart, from (far, far) on."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.tensor([(i % 4, i // 4) for i in range(tiles)]) * side + far
    attributes = geometry("s", 4, 4) | {"patch_size_level0": side}
    return make_bag(torch.randn(tiles, 6, generator=generator), corners, attributes)


def test_joined_slides_lie_apart_on_one_grid():
    bags = [slide(8), slide(12, side=32, far=5000), slide(4, far=7)]
    joined = join_bags("case", bags)
    assert joined.shape == (24, 6) and slide_grid(joined).step == 16
    cells = joined.coords / 16
    parts = cells.split([8, 12, 4])
    for bag, part in zip(bags, parts, strict=True):  # each slide keeps its own neighbours
        side = slide_grid(bag).step
        assert torch.equal(part - part[0], (bag.coords - bag.coords[0]) / side)
    for before, after in pairwise(parts):
        assert after[:, 0].min() - before[:, 0].max() > GAP
        assert after[:, 0].min() % GAP == 0
    assert torch.equal(joined.read(), torch.cat([bag.features for bag in bags]))
    index = torch.tensor([23, 0, 9, 9])
    assert torch.equal(joined.rows(index), joined.read()[index])
    assert torch.equal(torch.cat(list(joined.blocks(5))), joined.read())
    model = build("abmil", 6, 2).eval()  # a large case is streamed through its slides
    with torch.inference_mode():
        whole = model(joined.read())
    torch.testing.assert_close(stream(model, joined, CPU, 5).logits, whole.logits)


def test_one_slide_stays_what_it_is_and_widths_must_agree():
    bag = slide(8)
    assert join_bags("case", [bag]) is bag
    assert join_bags("case", [bag, make_bag(torch.zeros(3, 6))]).coords is None
    with pytest.raises(UserError, match="case c: expected 6 features per tile in all"):
        join_bags("c", [bag, make_bag(torch.zeros(3, 5))])


def test_a_spatial_model_sees_no_tile_of_another_slide():
    """Every tile's token is that of its slide alone; pooled levels included."""
    torch.manual_seed(0)
    model = DeformMIL(6, 2, width=16, heads=2, depth=1, levels=3, points=2).eval()
    bags = [slide(12, seed=1), slide(8, seed=2, far=300)]
    tokens: list[torch.Tensor] = []
    model.decoder.register_forward_pre_hook(lambda _, args: tokens.append(args[0].detach()))
    for bag in (*bags, join_bags("case", bags)):
        with torch.inference_mode():
            model(bag.read(), bag.coords, grid=slide_grid(bag))
    # the first slide keeps its place on the plane, and so each number of its tiles' tokens
    torch.testing.assert_close(tokens[2][:12], tokens[0], rtol=1e-4, atol=1e-5)


def test_bags_of_a_case_stay_on_disk(tmp_path: Path):
    for name, tiles in (("a", 5), ("b", 7)):
        corners = np.array([(i, 0) for i in range(tiles)]) * 16
        features = np.random.default_rng(tiles).normal(size=(tiles, 6)).astype(np.float32)
        write_bag(tmp_path / f"{name}.h5", features, corners, geometry(name, tiles, 1))
    bags = [open_bag(tmp_path / f"{name}.h5") for name in "ab"]
    joined = join_bags("case", bags)
    assert joined.features is None and all(part.features is None for part in joined.parts)
    loaded = joined.load()
    assert torch.equal(loaded.read(), joined.read()) and joined.digest() == loaded.digest()
    assert joined.digest() != join_bags("case", bags[::-1]).digest()


@pytest.fixture(scope="module")
def cohorts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`single`: a patient per slide; `several`: two slides of the first patients."""
    root = tmp_path_factory.mktemp("cohorts")
    single, several = write_cohort(root / "single"), root / "several"
    write_cohort(several, pictures=True)
    rows = read_csv(single / "labels.csv")
    for row in rows:
        row["case_id"] = row["slide_id"].replace("s", "case")
    write_csv_rows(single / "labels.csv", rows)
    train_run(several, root / "by_slide")
    return root


@pytest.mark.parametrize("unit", ["case", "case_mean", "case_max"])
def test_a_case_of_one_slide_is_that_slide(cohorts: Path, tmp_path: Path, unit: str):
    """Weights, predictions and metrics to the last digit, under the case's name."""
    plain = train_run(cohorts / "single", tmp_path / "plain")
    by_case = train_run(cohorts / "single", tmp_path / "case", f"unit={unit}")
    first, second = (
        torch.load(run / "checkpoint_best.pt", weights_only=True)["model"]
        for run in (plain, by_case)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    # a cut on single slides is chosen in float32 while training, that of pooled ones afterwards
    results = [read_results(run) for run in (plain, by_case)]
    cuts = [own.pop("threshold") for own in results]
    assert results[0] == results[1] and cuts[0] == pytest.approx(cuts[1], abs=1e-6)
    rows, cases = read_csv(plain / "predictions.csv"), read_csv(by_case / "predictions.csv")
    for row in rows:
        row["slide_id"] = row["case_id"]
    assert rows == cases


def test_pooled_slides_are_the_mean_or_the_highest_of_each_patient(cohorts: Path, tmp_path: Path):
    slides = read_csv(cohorts / "by_slide/predictions.csv")
    for unit, pool in (("case_mean", np.mean), ("case_max", np.max)):
        run = train_run(cohorts / "several", tmp_path / unit, f"unit={unit}")
        expected: dict[str, list[float]] = {}
        for row in slides:
            expected.setdefault(row["case_id"], []).append(float(row["prob_pos"]))
        assert max(map(len, expected.values())) == 2
        found = read_csv(run / "predictions.csv")
        assert {row["slide_id"] for row in found} == set(expected)
        for row in found:
            assert float(row["prob_pos"]) == pytest.approx(pool(expected[row["case_id"]]))
        val = [row for row in found if row["split"] == "val"]
        positive = np.array([row["label"] == "pos" for row in val])
        cut = youden_threshold(positive, np.array([float(row["prob_pos"]) for row in val]))
        assert read_results(run)["threshold"] == pytest.approx(cut)
        for row in found:
            assert row["predicted"] == ("pos" if float(row["prob_pos"]) >= cut else "neg")
        # slides that were trained on alone are pooled afterwards to the same
        task = Classification(("neg", "pos"))
        after, before = (
            read_finished(cohorts / "by_slide", "", task, unit),
            read_finished(run, "", task),
        )
        assert after.slides == before.slides and after.test.threshold == pytest.approx(cut)
        np.testing.assert_allclose(after.test.probabilities, before.test.probabilities)
        later = mil.load_classifier(cohorts / "by_slide", device="cpu", unit=unit)
        assert later.unit == unit and later.carried["threshold"] == pytest.approx(cut)
        with pytest.raises(UserError, match="expected predictions of slides, found of cases"):
            read_finished(run, "", task, unit)
        with pytest.raises(UserError, match=f"unit=case: expected {unit}, since the models were"):
            mil.load_classifier(run, device="cpu", unit="case")
        kept = read_csv(run / "slide_predictions.csv")
        assert {(r["slide_id"], r["prob_pos"]) for r in kept} == {
            (r["slide_id"], r["prob_pos"]) for r in slides
        }


def test_a_case_is_trained_on_and_predicted_as_one_bag(cohorts: Path, tmp_path: Path):
    run = train_run(cohorts / "several", tmp_path / "run", "unit=case", "model=abmil")
    model = load_trained_model(run / "checkpoint_best.pt", CPU)[0]
    records = read_csv(cohorts / "several/labels.csv")
    for row in read_csv(run / "predictions.csv"):
        names = [r["slide_id"] for r in records if r["case_id"] == row["case_id"]]
        files = [cohorts / "several/bags/h5_files" / f"{name}.h5" for name in names]
        features = torch.cat([open_bag(file).read() for file in files])
        with torch.inference_mode():
            p = float(model(features).logits.softmax(0)[1])
        assert float(row["prob_pos"]) == pytest.approx(p, abs=1e-6)
    # a row per slide beside it, with what is said of the case
    by_slide = read_csv(run / "slide_predictions.csv")
    assert len(by_slide) > len(read_csv(run / "predictions.csv"))


def test_slides_of_a_case_with_different_labels_are_refused(cohorts: Path, tmp_path: Path):
    rows = read_csv(cohorts / "several/labels.csv")
    twin = next(r for r in rows[1:] if r["case_id"] == rows[0]["case_id"])
    twin["label"] = "pos"
    labels = write_csv_rows(tmp_path / "labels.csv", rows)
    message = "unit=case_mean: case case00: expected one label for its slides, found neg on slide "
    message += f"s00 and pos on slide {twin['slide_id']}; correct labels.csv or set unit=slide"
    given = (f"labels={labels}", f"features={cohorts}/several/bags")
    with pytest.raises(UserError, match=message):
        train_run(cohorts / "several", tmp_path / "run", *given, "unit=case_mean")
    cells = {"case_id": "c", "prob_neg": "0.5", "prob_pos": "0.5"}
    two = [cells | {"slide_id": s, "label": label} for s, label in (("a", "neg"), ("b", "pos"))]
    with pytest.raises(UserError, match="case c: expected one label .* neg on slide a and pos on"):
        pool_rows("table.csv", Classification(("neg", "pos")), two, "case_max")


def test_a_benchmark_by_case_judges_patients(cohorts: Path, tmp_path: Path):
    output = train_benchmark(cohorts / "several", tmp_path / "bench", "unit=case", "models=[abmil]")
    summary = json.loads((output / "summary.json").read_text())
    assert summary["unit"] == "case" and summary["protocol"]["slides"] == 24
    rows = read_csv(output / "predictions.csv")
    assert len(rows) == summary["protocol"]["patients"] == len({r["slide_id"] for r in rows})
    # heatmaps are of slides
    pages = tmp_path / "pages"
    keys = [f"run={output}", f"output={pages}", "workers=0", "device=cpu", "drawing.max_side=64"]
    keys += ["only=[s00,s02]", "drawing.geojson=false", "attention_maps=true"]
    assert heatmap.main(load_config(heatmap.Config, keys)) == 0
    drawn = {path.stem for path in (pages / "records").iterdir()}
    assert drawn == {"s00", "s02"}  # two slides of one patient
    check_attention_of_the_case(cohorts / "several", output, pages, "case00")
    with (output / "splits/splits_0.csv").open() as stream:  # of slides, for any unit
        ids = {cell for row in csv.DictReader(stream) for cell in row.values() if cell}
    assert ids == {f"s{i:02d}" for i in range(24)}
    # a patient without one of the bags is listed, the others are drawn
    copy_of_bags = tmp_path / "bags"
    shutil.copytree(cohorts / "several/bags", copy_of_bags)
    (copy_of_bags / "h5_files/s02.h5").unlink()
    keys = [f"run={output}", f"output={tmp_path / 'fewer'}", "workers=0", "drawing.max_side=64"]
    keys += ["only=[s00,s01]", f"features={copy_of_bags}", "device=cpu"]
    assert heatmap.main(load_config(heatmap.Config, keys)) == 1
    failed = read_csv(tmp_path / "fewer/failures.csv")
    assert [row["slide"] for row in failed] == ["s00"]
    assert "all 2 slides of its case" in failed[0]["error"] and "slide s02" in failed[0]["error"]


@pytest.mark.parametrize("unit", ["case", "case_max"])
def test_the_report_shows_a_slide_of_each_example_patient(
    cohorts: Path, tmp_path: Path, unit: str, monkeypatch: pytest.MonkeyPatch
):
    """Of one bag the slide with the most attention, of pooled slides the one that was pooled."""
    cohort = cohorts / "several"
    output = train_benchmark(cohort, tmp_path / "bench", f"unit={unit}", "models=[abmil]")
    shown = []
    make = report.make_example
    monkeypatch.setattr(
        report, "make_example", lambda *args: shown.append((args, make(*args))) or shown[-1][1]
    )
    keys = [f"benchmark={output}", f"output={tmp_path / 'report'}", f"slides={cohort}/slides"]
    keys += ["example_slides=99"]
    assert report.main(load_config(report.Config, keys)) == 0
    page = (tmp_path / "report/report.html").read_text()
    twins = [(args, found) for args, found in shown if found.choice.slide_id == "case01"]
    assert len(twins) == 1  # a patient with the slides s01 and s03
    (_, checkpoint, files, *_), found = twins[0]
    by_slide = read_csv(checkpoint.parent / "slide_predictions.csv")
    if unit == "case":
        assert [one.slide_id for one in files] == ["s01", "s03"] and found.together == 2
        assert found.share > 0.5
        assert f"slide {found.slide_id}, which has {100 * found.share:.1f} % of the" in page
    else:
        own = {r["slide_id"]: float(r["prob_pos"]) for r in by_slide if r["case_id"] == "case01"}
        assert found.slide_id == max(own, key=own.get) and len(own) == 2
        assert f"slide {found.slide_id}, of 2 slides the one whose own prediction" in page


def check_attention_of_the_case(cohort: Path, bench: Path, pages: Path, case: str):
    """What is drawn of each slide is its part of the attention over the joined bag."""
    rows = [r for r in read_csv(cohort / "labels.csv") if r["case_id"] == case]
    features = [open_bag(cohort / f"bags/h5_files/{r['slide_id']}.h5").read() for r in rows]
    judged = next(r for r in read_csv(bench / "predictions.csv") if r["case_id"] == case)
    run = bench / "runs" / judged["feature_set"] / judged["model"]
    run /= f"seed{judged['seed']}_fold{judged['fold']}"
    model = load_trained_model(run / "checkpoint_best.pt", CPU)[0]
    with torch.inference_mode():
        parts = model(torch.cat(features)).attention.split([len(part) for part in features])
    assert len(parts) > 1
    for row, part in zip(rows, parts, strict=True):
        name = row["slide_id"]
        record = json.loads((pages / f"records/{name}.json").read_text())
        assert record["together"] == len(parts)
        assert record["share"] == pytest.approx(float(part.sum()), abs=1e-6)
        found = [float(tile["attention"]) for tile in read_csv(pages / f"scores/{name}.csv")]
        np.testing.assert_allclose(found, part.numpy(), atol=1e-6)
        with h5py.File(pages / f"attention/{name}.h5") as file:
            weights = file[run.name]["weights"][:]
        np.testing.assert_allclose(weights.mean(0), part.numpy(), atol=1e-6)
        text = (pages / f"slides/{name}.html").read_text()
        assert (
            f"{100 * record['share']:.1f} % of the attention over its {len(parts)} slides" in text
        )


@pytest.mark.parametrize("unit", ["case", "case_max"])
def test_new_cases_are_predicted_as_the_training_groups_them(
    cohorts: Path, tmp_path: Path, unit: str
):
    run = train_run(cohorts / "several", tmp_path / "run", f"unit={unit}")
    new = write_new_cohort(tmp_path / "new", slides=12)
    labels = new / "labels.csv"
    with pytest.raises(UserError, match=r"the model predicts cases .*add labels="):
        predict_with(run, new / "bags", tmp_path / "out")
    assert predict_with(run, new / "bags", tmp_path / "out", f"labels={labels}") == 0
    rows = read_csv(tmp_path / "out/predictions.csv")
    records = read_csv(labels)
    assert [row["slide_id"] for row in rows] == list(dict.fromkeys(r["case_id"] for r in records))
    both = next(row for row in rows if "|" in row["slides"])
    classifier_rows = both["slides"].split("|")
    classifier = mil.load_classifier(run, device="cpu")
    parts = [open_bag(new / "bags/h5_files" / f"{name}.h5") for name in classifier_rows]
    alone = [classifier.predict_bag(bag.read()).predictions["pos"] for bag in parts]
    joined = classifier.predict_bag(torch.cat([bag.read() for bag in parts]))
    expected = joined.predictions["pos"] if unit == "case" else max(alone)
    assert float(both["prob_pos"]) == pytest.approx(expected, abs=1e-6)
    records[0]["label"] = "pos" if records[0]["label"] == "neg" else "neg"
    write_csv_rows(labels, records)
    with pytest.raises(UserError, match="expected one label for its slides"):
        predict_with(run, new / "bags", tmp_path / "out", f"labels={labels}")


def test_the_slides_of_a_new_case_share_its_attention(cohorts: Path, tmp_path: Path):
    run = train_run(cohorts / "several", tmp_path / "run", "unit=case", "model=abmil")
    new, out = write_new_cohort(tmp_path / "new", slides=12), tmp_path / "out"
    keys = [f"labels={new}/labels.csv", "attention_maps=true", "draw_heatmaps=true", "workers=0"]
    assert predict_with(run, new / "bags", out, *keys, "drawing.max_side=64") == 0
    rows = read_csv(out / "predictions.csv")
    assert any("|" in row["slides"] for row in rows)
    for row in rows:
        shares = []
        for name in row["slides"].split("|"):
            with h5py.File(out / f"attention/{name}.h5") as file:
                weights = file[run.name]["weights"][0]
            scores = read_csv(out / f"heatmaps/scores/{name}.csv")
            found = [float(tile["attention"]) for tile in scores]
            np.testing.assert_allclose(found, weights, atol=1e-6)
            shares.append(weights.sum())
        assert sum(shares) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("task", "values", "expected"),
    [
        (Classification(("n", "p")), [[0.8, 0.2], [0.3, 0.7]], [0.3, 0.7]),
        (Classification(("a", "b", "c")), [[0.8, 0.1, 0.1], [0.2, 0.6, 0.2]], [0.5, 0.375, 0.125]),
        (Multilabel(("a", "b")), [[0.8, 0.2], [0.3, 0.7]], [0.8, 0.7]),
        (Ordinal(("1", "2", "3")), [[0.1, 0.8, 0.1], [0.5, 0.0, 0.5]], [0.1, 0.8, 0.1]),
        (Ordinal(("1", "2", "3")), [[0.1, 0.8, 0.1], [0.3, 0.0, 0.7]], [0.3, 0.0, 0.7]),
        (Regression(), [[3.0], [5.0]], [5.0]),
    ],
)
def test_the_slide_that_shows_most_by_kind_of_task(task, values, expected):
    found = task.pool_slides(np.array(values), "max")
    np.testing.assert_allclose(found, expected)
    np.testing.assert_allclose(task.pool_slides(np.array(values), "mean"), np.mean(values, axis=0))


def test_attention_of_a_case_covers_all_of_its_slides():
    torch.manual_seed(0)
    bags = [slide(8, seed=1), slide(4, seed=2)]
    output = examine(build("abmil", 6, 2), Sample("case", join_bags("case", bags), 0), CPU)
    assert output.attention.shape == (12,) and float(output.attention.sum()) == pytest.approx(1)
