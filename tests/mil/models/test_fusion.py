"""Late fusion with covariates: every model with a slide vector, none without; and what it is worth
beside tiles and covariates alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mil
from mil.datasets.bags import Sample
from mil.models import MODELS, build
from mil.models.batch import forward_bags
from mil.models.fusion import ALONE, SLIDE_VECTOR, Fused
from mil.training.prediction import predict
from mil.training.streaming import can_stream, stream
from patch_encoder.bags.bag import make_bag, open_bag
from tests.mil.conftest import write_cohort
from tests.mil.ensembles.new_cohorts import (
    predict_with,
    read_csv,
    train_benchmark,
    train_run,
    write_csv_rows,
    write_new_cohort,
)
from tests.mil.models.small_options import SMALL
from wsi_common.errors import UserError

CPU = torch.device("cpu")
X = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
PLACES = torch.tensor([(i % 3, i // 3) for i in range(9)]) * 16
C = torch.tensor([0.5, -1.0, 2.0])


def make(name: str, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(name, 6, 2, covariates=3, **SMALL.get(name, {}), **more).eval()


@pytest.mark.parametrize("name", [*SLIDE_VECTOR, ALONE])
def test_covariates_add_to_the_logits_and_leave_attention_alone(name: str):
    model = make(name, standardize=True)
    assert isinstance(model, Fused)
    with torch.inference_mode():
        fused, bare = model(X, PLACES, covariates=C), model.model(X, PLACES)
        part = model.branch(C)
    torch.testing.assert_close(fused.logits, bare.logits + part)
    assert torch.equal(fused.attention, bare.attention) and not torch.equal(part, part * 0)
    with torch.inference_mode():
        together = forward_bags(model, [X, X[:4]], [PLACES, PLACES[:4]], C)
    torch.testing.assert_close(together.logits[0], fused.logits, rtol=1e-4, atol=1e-5)
    sample = Sample("s", make_bag(X, PLACES), 0, covariates=C)
    torch.testing.assert_close(predict(model, [sample], CPU)[0], fused.logits)
    if can_stream(model):
        streamed = stream(model, sample.bag, CPU, covariates=C)
        torch.testing.assert_close(streamed.logits, fused.logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"expected 3 encoded numbers .* found none"):
        model(X, PLACES)


@pytest.mark.parametrize("name", [name for name in SLIDE_VECTOR if name != "mean"])
def test_the_slides_stream_is_fused_and_no_other(name: str):
    model = make(name).train()
    torch.manual_seed(1)
    fused = model(X, PLACES, target=1, covariates=C)
    if fused.streams:
        assert fused.streams[0][0].shape == fused.logits.shape
        torch.testing.assert_close(fused.streams[0][0], fused.logits)
    sum(
        weight * logits.sum() for logits, weight in fused.streams or ((fused.logits, 1),)
    ).backward()
    assert all(p.grad is not None for p in model.branch.parameters())


@pytest.mark.parametrize("name", sorted(set(MODELS) - set(SLIDE_VECTOR)))
def test_models_without_a_slide_vector_are_refused(name: str):
    with pytest.raises(UserError, match=f"model {name} has no slide vector to fuse"):
        make(name)


def write_clinic(cohort: Path) -> Path:
    """A table in which a marker tells the label and age says nothing."""
    rows = read_csv(cohort / "labels.csv")
    cells = [
        {"slide_id": r["slide_id"], "age": str(50 + i % 7), "marker": str(int(r["label"] == "pos"))}
        for i, r in enumerate(rows)
    ]
    cells[0]["age"] = ""
    return write_csv_rows(cohort / "clinic.csv", cells)


def test_a_benchmark_shows_tiles_covariates_and_both(tmp_path: Path):
    """Tiles are noise here, the marker is the label: rows with covariates know it."""
    cohort = write_cohort(tmp_path / "cohort", signal=0.0)
    table = write_clinic(cohort)
    more = (f"covariates={table}", "models=[mean,max]", "training.epochs=40", "training.lr=3e-2")
    output = train_benchmark(cohort, tmp_path / "bench", *more)
    rows = {row["model"]: float(row["auc_mean"]) for row in read_csv(output / "summary.csv")}
    assert set(rows) == {"mean", "max", "covariates", "mean+covariates"}
    assert rows["covariates"] == 1.0 and rows["mean+covariates"] > 0.9 > rows["mean"]


def test_a_trained_fusion_predicts_new_slides_from_their_table(tmp_path: Path):
    cohort, new = write_cohort(tmp_path / "cohort", slides=16), tmp_path / "new"
    write_new_cohort(new, slides=4)
    given = f"covariates={write_clinic(cohort)}"
    run = train_run(cohort, tmp_path / "run", given, "model=abmil")
    assert {row["slide_id"] for row in read_csv(run / "covariates.csv")} == {
        row["slide_id"] for row in read_csv(cohort / "labels.csv")
    }
    table = write_clinic(new)
    with pytest.raises(UserError, match=r"expected the table of age, marker, .* found none"):
        predict_with(run, new / "bags", tmp_path / "out")
    assert predict_with(run, new / "bags", tmp_path / "out", f"covariates={table}") == 0
    classifier = mil.load_classifier(run, device="cpu")
    for row, cells in zip(read_csv(tmp_path / "out/predictions.csv"), read_csv(table), strict=True):
        bag = open_bag(new / "bags/h5_files" / f"{row['slide_id']}.h5")
        found = classifier.predict_bag(bag.read(), bag.coords, cells)
        assert float(row["prob_pos"]) == found.predictions["pos"]
        other = cells | {"marker": str(1 - int(cells["marker"]))}
        assert (
            classifier.predict_bag(bag.read(), bag.coords, other).predictions != found.predictions
        )
    with pytest.raises(UserError, match="expected the covariates age, marker"):
        classifier.predict_bag(bag.read())
    plain = train_run(cohort, tmp_path / "plain")
    with pytest.raises(UserError, match="covariates: expected none, as the classifier was trained"):
        predict_with(plain, new / "bags", tmp_path / "out2", f"covariates={table}")
    with pytest.raises(UserError, match="model covariates: expected a table of covariates"):
        train_run(cohort, tmp_path / "x", "model=covariates")
