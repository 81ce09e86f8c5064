"""Attention by class and by head, and its scores before the softmax, of every model that has any."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from mil.heatmaps.attention_maps import check_maps, find_attention_maps, name_maps
from mil.models import MODELS, build
from patch_encoder.bags.bag import make_bag
from tests.mil.conftest import write_cohort
from tests.mil.ensembles.new_cohorts import predict_with, train_run, write_new_cohort
from tests.mil.models.small_options import SMALL
from wsi_common.errors import UserError

BAG = make_bag(
    torch.randn(11, 6, generator=torch.Generator().manual_seed(0)),
    torch.tensor([(i % 4, i // 4) for i in range(11)]) * 16,
)
NONE = ("mean", "max", *(f"minet_{kind}" for kind in ("instance", "embedding", "deep", "residual")))
MEANS = ("abmil", "multihead_abmil", "dsmil", "mhim_abmil", "mhim_dsmil", "ilra", "deform_mil")


def make(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return build(name, 6, 3, standardize=True, **SMALL.get(name, {})).eval()


@pytest.mark.parametrize("name", [name for name in MODELS if name not in NONE])
def test_maps_are_those_that_the_attention_is_made_of(name: str):
    model = make(name)
    found = find_attention_maps(model, BAG)
    assert found.weights.shape[1] == len(BAG)
    if found.scores is None:
        assert "transmil" in name
    else:
        assert found.scores.shape == found.weights.shape
        inside = found.scores.masked_fill(found.weights == 0, -torch.inf)
        torch.testing.assert_close(inside.softmax(1), found.weights)
    with torch.inference_mode():
        output = model(BAG.features, BAG.coords)
    if name in MEANS or found.kind == "pooling":
        torch.testing.assert_close(found.weights.mean(0), output.attention, rtol=1e-4, atol=1e-6)
    if name == "clam_mb":
        called = int(output.logits.argmax())
        torch.testing.assert_close(found.weights[called], output.attention)
    if found.kind == "class":
        assert name_maps(found, ["a", "b", "c"]) == ["a", "b", "c"]
    else:
        assert name_maps(found, ["a", "b", "c"])[0] == f"{found.kind}0"


@pytest.mark.parametrize("name", NONE)
def test_models_of_a_fixed_rule_have_none(name: str):
    with pytest.raises(UserError, match="expected a model with attention maps to write"):
        check_maps(make(name))


def test_prediction_writes_them_on_request(tmp_path: Path):
    cohort, new = write_cohort(tmp_path / "old", slides=16), tmp_path / "new"
    write_new_cohort(new, slides=3)
    run = train_run(cohort, tmp_path / "run", "model=clam_mb")
    assert predict_with(run, new / "bags", tmp_path / "out", "attention_maps=true") == 0
    files = sorted((tmp_path / "out/attention").iterdir())
    assert [path.stem for path in files] == ["new_s00", "new_s01", "new_s02"]
    with h5py.File(files[0]) as file:
        group = file["run"]
        assert list(group.attrs["names"]) == ["neg", "pos"] and group.attrs["kind"] == "class"
        assert group["weights"].shape == group["scores"].shape == (2, 12)
        np.testing.assert_allclose(np.sum(group["weights"], axis=1), 1, rtol=1e-5)
        assert file["coords"].shape == (12, 2)
    times = [path.stat().st_mtime_ns for path in files]
    assert predict_with(run, new / "bags", tmp_path / "out", "attention_maps=true") == 0
    assert [path.stat().st_mtime_ns for path in files] == times
    plain = train_run(cohort, tmp_path / "plain")
    with pytest.raises(UserError, match="MeanMIL: expected a model with attention maps"):
        predict_with(plain, new / "bags", tmp_path / "out2", "attention_maps=true")
