"""D2VFM's switches from the command line: each trains and can be reloaded, resumes, and is the same
on two processes.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from detection_kd.models.backbone import load_backbone
from detection_kd.models.student import load_student, load_student_encoder
from tests.detection_kd.d2vfm_runs import DIM, train
from wsi_common.checkpoint import load_tensors

STILL = ("augment=false", "scales=[1.0]", "cache=true")
EVERYTHING = [
    "stages=[0,1]",
    "pooling=gem",
    "adapter=ln",
    "unfreeze=1",
    "unfreeze_lr=0.5",
    "ema=0.9",
    "loss=smooth_l1",
]
EVERYTHING += ["extra.distance=3", "extra.angle=5", "extra.contrastive=2", "loss_weight=0.5"]


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_everything_at_once_leaves_results_and_a_student_that_rebuilds_itself(
    pairs_root: Path, backbone_path: Path, tmp_path: Path
) -> None:
    assert train(pairs_root, backbone_path, tmp_path / "run", *EVERYTHING, "epochs=1") == 0
    student, config = load_student(tmp_path / "run" / "checkpoint_best.pt")
    assert (student.stages, student.pooling.kind, student.adapter.kind) == ((0, 1), "gem", "ln")
    assert config["unfreeze"] == 1 and not any(
        p.requires_grad for p in student.backbone.parameters()
    )
    backbone = load_backbone(backbone_path)[0].state_dict()
    own = student.backbone.state_dict()
    changed = {
        name.split(".")[0] for name, value in own.items() if not torch.equal(value, backbone[name])
    }
    assert changed == {"layer3"}
    assert all(torch.equal(own[name], backbone[name]) for name in own if "bn" in name)
    encoder = load_student_encoder(tmp_path / "run" / "checkpoint_best.pt", "student")
    assert encoder.provenance["encoder"] == "d2vfm ln stage 0+1 gem scale 1"
    assert encoder.model(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape == (2, DIM)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    terms = {"loss", "loss_smooth_l1", "loss_distance", "loss_angle", "loss_contrastive"}
    assert (
        terms | {"epoch", "cosine", "r2", "r2_median", "knn_1", "cka", "trained_parameters"}
        <= results.keys()
    )
    weighted = (
        0.5 * results["loss_smooth_l1"] + 3 * results["loss_distance"] + 5 * results["loss_angle"]
    )
    assert results["loss"] == pytest.approx(weighted + 2 * results["loss_contrastive"], rel=1e-4)
    rows = (tmp_path / "run" / "r2_by_dimension.csv").read_text().splitlines()
    assert rows[0] == "dimension,r2,teacher_std" and len(rows) == DIM + 1


def test_the_moving_average_is_what_is_validated_and_kept(
    pairs_root: Path, backbone_path: Path, tmp_path: Path
) -> None:
    assert train(pairs_root, backbone_path, tmp_path / "cache_plain", *STILL, "epochs=1") == 0
    assert (
        train(pairs_root, backbone_path, tmp_path / "cache_ema", *STILL, "epochs=1", "ema=0.9") == 0
    )
    plain, averaged = (
        load_tensors(tmp_path / name / "checkpoint_last.pt", "it")
        for name in ("cache_plain", "cache_ema")
    )
    assert all(
        torch.equal(plain["model"][name], averaged["model"][name]) for name in plain["model"]
    ), "same training"
    best = load_tensors(tmp_path / "cache_ema" / "checkpoint_best.pt", "it")
    kept = {name.removeprefix("module."): value for name, value in averaged["average"].items()}
    assert all(torch.equal(kept[name], value) for name, value in best["model"].items())
    assert not torch.equal(
        best["model"]["adapter.out.weight"], averaged["model"]["adapter.out.weight"]
    )
    losses = [
        [line["loss"] for line in lines(tmp_path / name)] for name in ("cache_plain", "cache_ema")
    ]
    assert losses[0] == losses[1]
    cosines = [
        [line["cosine"] for line in lines(tmp_path / name)] for name in ("cache_plain", "cache_ema")
    ]
    assert cosines[0] != cosines[1]
    frozen = load_backbone(backbone_path)[0].state_dict()
    names = [name for name in best["model"] if name.startswith("backbone.")]
    assert names and all(
        torch.equal(best["model"][name], frozen[name.removeprefix("backbone.")]) for name in names
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["unfreeze=1", *STILL], "expected one of them"),
        (["unfreeze=5"], "expected 0 to 4 stages"),
        (["unfreeze_lr=0"], "a factor above 0"),
        (["stages=[1,0]"], "ascending"),
        (["stages=[1,1]"], "ascending"),
        (["stages=[3]"], "expected 0, 1 or 2"),
        (["ema=1"], "expected a decay"),
        (["loss_weight=0"], "at least one term"),
        (["pooling=max"], "expected one of mean, gem, attention"),
        (["labels={root}/labels.csv"], "expected an existing path"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(
    settings: list[str],
    said: str,
    pairs_root: Path,
    backbone_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(pairs_root, backbone_path, tmp_path / "r", *settings) == 2
    message = capsys.readouterr().err
    assert said in message and message.count("\n") == 1
    assert not (tmp_path / "r" / "checkpoint_last.pt").exists()
