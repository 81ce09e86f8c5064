"""D2VFM: adapters as published, what is frozen stays frozen, resume and two processes change
nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from detection_kd import extract_student, train_d2vfm
from detection_kd.datasets.distillation import (
    DistillationTiles,
    Pair,
    digest_pairs,
    read_pairs,
    split_by_patient,
)
from detection_kd.datasets.packed_pairs import Pack
from detection_kd.evaluation.feature_agreement import feature_agreement
from detection_kd.losses.feature_losses import cosine_loss, mae_loss, mse_loss
from detection_kd.models.adapter import ADAPTERS, Adapter
from detection_kd.models.backbone import Backbone
from detection_kd.models.student import Student, load_student, load_student_encoder
from patch_encoder import tile_slides
from patch_encoder.bags.bag import read_bag
from patch_encoder.slides import open_slide
from tests.detection_kd.d2vfm_runs import DIM, train
from tests.helpers import make_cohort
from wsi_common.cli import run
from wsi_common.errors import UserError


def by_hand(kind: str, adapter: Adapter, x: torch.Tensor) -> torch.Tensor:
    """The published formulas, written out with matrices."""

    def linear(layer: nn.Linear, v: torch.Tensor) -> torch.Tensor:
        return v @ layer.weight.T + layer.bias

    s = torch.relu
    if kind == "p":
        return linear(adapter.out, s(x))
    if kind == "ln":
        spread = (x.var(dim=1, correction=0, keepdim=True) + 1e-5).sqrt()
        normed = (
            x - x.mean(dim=1, keepdim=True)
        ) / spread * adapter.norm.weight + adapter.norm.bias
        y = linear(adapter.down, normed)
        return linear(adapter.out, y * (1 + torch.erf(y / 2**0.5)) / 2)
    hidden = linear(adapter.down, s(x))
    if kind == "m":
        return linear(adapter.out, s(hidden))
    if kind == "ma":
        return linear(adapter.out, s(linear(adapter.shortcut, x) + hidden))
    y = linear(adapter.up, s(hidden))
    return linear(adapter.out, s(y) if kind == "mp" else s(x + y))


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_compute_the_published_formulas(kind: str) -> None:
    torch.manual_seed(0)
    adapter = Adapter(kind, 32, DIM)
    assert all((layer.bias == 0).all() for layer in adapter.children())
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(5, 32)
    assert torch.allclose(adapter(x), by_hand(kind, adapter, x), atol=1e-5)
    adapter(x).sum().backward()
    assert all(
        parameter.grad is not None and parameter.grad.abs().sum() > 0
        for parameter in adapter.parameters()
    )


def test_losses_by_hand() -> None:
    student, teacher = (
        torch.tensor([[1.0, 2.0], [0.0, 1.0]]),
        torch.tensor([[0.0, 4.0], [0.0, 2.0]]),
    )
    assert mse_loss(student, teacher).item() == pytest.approx((1 + 4 + 0 + 1) / 2)
    assert mae_loss(student, teacher).item() == pytest.approx((1 + 2 + 0 + 1) / 2)
    assert cosine_loss(student, teacher).item() == pytest.approx(
        (1 - 8 / (5**0.5 * 4) + 0) / 2, abs=1e-6
    )


def test_agreement_by_hand() -> None:
    teacher = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    assert feature_agreement(teacher, teacher) == {
        "cosine": pytest.approx(1.0),
        "r2": pytest.approx(1.0),
    }
    mean = teacher.mean(dim=0).expand(2, 2)
    assert feature_agreement(mean, teacher)["r2"] == pytest.approx(0.0)
    assert feature_agreement(-teacher, teacher)["cosine"] == pytest.approx(-1.0)


def test_frozen_parts_stay_bit_identical_under_training() -> None:
    torch.manual_seed(0)
    student = Student(Backbone("resnet18", "batch"), stages=1, adapter="mpa", dim=DIM)
    student.train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1
    )
    mse_loss(student(torch.randn(4, 3, 64, 64)), torch.randn(4, DIM)).backward()
    optimizer.step()
    changed = {
        name for name, value in student.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {
        name for name, _ in student.named_parameters() if name.startswith("adapter.")
    }


def test_student_stops_at_its_stage_and_keeps_no_later_stage() -> None:
    backbone = Backbone("resnet18", "frozen").eval()
    x = torch.randn(2, 3, 64, 64)
    pooled = [maps.mean(dim=(2, 3)) for maps in backbone(x)]
    for stage in (2, 1, 0):
        student = Student(backbone, stage, "p", DIM).eval()
        assert torch.allclose(student.pooled(x), pooled[stage], atol=1e-6)
        kept = {
            name.split(".")[1] for name in student.state_dict() if name.startswith("backbone.layer")
        }
        assert kept == {"layer1", "layer2", "layer3", "layer4"} - {
            f"layer{stage}" for stage in range(stage + 3, 5)
        }


def test_input_scale_shrinks_the_tile_first() -> None:
    backbone = Backbone("resnet18", "frozen").eval()
    x = torch.randn(2, 3, 64, 64)
    small = nn.functional.interpolate(x, size=(32, 32), mode="bilinear", antialias=True)
    expected = Student(backbone, 0, "p", DIM).pooled(small)
    assert torch.allclose(
        Student(backbone, 0, "p", DIM, input_scale=0.5).pooled(x), expected, atol=1e-6
    )


def test_pairs_are_read_split_by_patient_and_augmented_repeatably(pairs_root: Path) -> None:
    pairs = read_pairs(pairs_root)
    assert len(pairs) == 24
    train_pairs, val_pairs = split_by_patient(pairs, {}, 0.25, seed=0)
    assert (len(train_pairs), len(val_pairs)) == (18, 6)
    assert not {p.slide_id for p in train_pairs} & {p.slide_id for p in val_pairs}
    slides = sorted({p.slide_id for p in pairs})
    # two slides of one patient, who is called as a slide of somebody else is
    patients = {slides[0]: slides[2], slides[1]: slides[2]}
    for seed in range(6):
        parts = split_by_patient(pairs, patients, 0.34, seed)
        sides = [{p.slide_id for p in part} for part in parts]
        assert sum(map(len, sides)) == len(slides) and len(sides[1]) in (1, 2)
        assert any({slides[0], slides[1]} <= side for side in sides)
    tiles = DistillationTiles(pairs, augment=True, seed=3)
    first = [tiles[i][0] for i in range(24)]
    assert all(torch.equal(a, tiles[i][0]) for i, a in enumerate(first))
    tiles.epoch = 1
    assert not all(torch.equal(a, tiles[i][0]) for i, a in enumerate(first))
    plain = DistillationTiles(pairs, augment=False, seed=3)
    for i in range(24):
        assert torch.equal(
            first[i].flatten(1).sort().values, plain[i][0].flatten(1).sort().values
        ), "turned, not changed"


@pytest.mark.parametrize(
    "fault",
    [
        "no image",
        "no feature",
        "nan feature",
        "wide feature",
        "text feature",
        "no list",
        "broken tile",
    ],
)
def test_bad_pairs_are_reported_at_once(pairs_root: Path, fault: str) -> None:
    feature = pairs_root / "wsi_root" / "S1" / "2_0.pt"
    if fault == "no image":
        feature.with_suffix(".jpg").unlink()
    elif fault == "no feature":
        feature.unlink()
    elif fault == "nan feature":
        torch.save(torch.full((DIM,), float("nan")), feature)
    elif fault == "wide feature":
        torch.save(torch.zeros(DIM + 1), feature)
    elif fault == "text feature":
        feature.write_text("feature")
    elif fault == "no list":
        (pairs_root / "ann_root" / "ann.json").write_text("{}")
    else:
        feature.with_suffix(".jpg").write_bytes(b"broken")
    with pytest.raises(UserError) as error:
        pairs = read_pairs(pairs_root)
        DistillationTiles(pairs, augment=False, seed=0)[8]
    assert "S1/2_0" in str(error.value) or fault in {"no list", "wide feature"}
    assert "\n" not in str(error.value)


def test_learning_rate_drops_once_and_the_logged_one_is_the_one_in_use(
    pairs_root: Path, backbone_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[float] = []
    step = torch.optim.AdamW.step

    def watched(optimizer: torch.optim.AdamW, *args: object) -> object:
        used.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    keys = ["epochs=4", "lr_drop=1", "lr=1e-3", "augment=false", "scales=[1.0]", "cache=true"]
    assert train(pairs_root, backbone_path, tmp_path / "run", *keys) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line)["lr"] for line in lines]
    assert logged == pytest.approx([1e-3, 1e-4, 1e-4, 1e-4])
    steps = len(used) // 4
    assert [used[epoch * steps : (epoch + 1) * steps] for epoch in range(4)] == [
        [rate] * steps for rate in logged
    ]


def test_cached_features_train_the_same_student(
    pairs_root: Path, backbone_path: Path, tmp_path: Path
) -> None:
    still = ["augment=false", "scales=[1.0]"]
    assert train(pairs_root, backbone_path, tmp_path / "tiles", *still) == 0
    assert train(pairs_root, backbone_path, tmp_path / "cached", *still, "cache=true") == 0
    tiles, cached = (
        load_student(tmp_path / name / "checkpoint_best.pt")[0].state_dict()
        for name in ("tiles", "cached")
    )
    assert tiles.keys() == cached.keys()
    assert all(torch.allclose(tiles[name], cached[name], rtol=1e-3, atol=1e-4) for name in tiles)
    assert train(pairs_root, backbone_path, tmp_path / "r", "cache=true") == 2
    assert (
        train(pairs_root, backbone_path, tmp_path / "r", *still, "cache=true", "cached_turns=5")
        == 2
    )
    assert (
        train(
            pairs_root,
            backbone_path,
            tmp_path / "turned",
            *still,
            "cache=true",
            "cached_turns=4",
            "epochs=1",
        )
        == 0
    )


def test_views_are_quarter_turns(pairs_root: Path) -> None:
    pairs = read_pairs(pairs_root)
    plain, turned = (
        DistillationTiles(pairs, augment=False, seed=0, turns=turns)[7] for turns in (0, 1)
    )
    assert torch.equal(turned[0], torch.rot90(plain[0], 1, (1, 2)))
    assert torch.equal(turned[1], plain[1])


def test_wrong_inputs_are_refused(
    pairs_root: Path, backbone_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "linear.pt")
    assert train(pairs_root, tmp_path / "linear.pt", tmp_path / "r") == 2
    assert "linear.pt" in capsys.readouterr().err
    assert train(pairs_root, backbone_path, tmp_path / "r", "needle=3") == 2
    assert "expected 0, 1 or 2" in capsys.readouterr().err
    assert train(pairs_root, backbone_path, tmp_path / "r", "adapter=mpb") == 2
    with pytest.raises(UserError, match="expected a D2VFM checkpoint"):
        load_student(backbone_path)


def test_the_teacher_of_a_packed_set_is_the_encoder_of_its_features() -> None:
    def name(given: str, provenance: dict[str, Any]) -> str:
        pack = object.__new__(Pack)
        pack.provenance, pack._descriptor = provenance, None
        keys = train_d2vfm.Config(dataset="set.h5", backbone="b.pt", output="run", teacher=given)
        return train_d2vfm.name_teacher(keys, [Pair("S", Path("t.jpg"), torch.zeros(1), pack)])

    made = {"teacher": {"encoder": "gigapath"}}
    assert name("", made) == name("gigapath", made) == "gigapath"
    assert name("clip", {}) == "clip"
    with pytest.raises(UserError, match="teacher=clip: expected gigapath, of which the features"):
        name("clip", made)


def test_student_is_one_more_encoder(tiny_student: Path, tmp_path: Path) -> None:
    """Tiles -> coordinates -> student bags: the same numbers as the model on the same pixels."""
    pairs_root, checkpoint = tiny_student / "pairs", tiny_student / "run" / "checkpoint_best.pt"
    cohort = make_cohort(tmp_path / "cohort", 2)
    tiling = [
        f"slides={cohort}/slides",
        f"output={tmp_path}/tiles",
        "tile_size=64",
        "tissue.min_area=50",
        "workers=1",
    ]
    assert run(tile_slides.main, tile_slides.Config, tiling) == 0
    extraction = [
        f"slides={cohort}/slides",
        f"coords={tmp_path}/tiles",
        f"student={checkpoint}",
        f"output={tmp_path}/features",
    ]
    extraction += ["workers=0", "precision=fp32", "device=cpu", "batch_size=5"]
    assert run(extract_student.main, extract_student.Config, extraction) == 0
    bag = read_bag(tmp_path / "features" / "student" / "h5_files" / "S001.h5")
    assert bag.features.shape[1] == DIM
    assert bag.attributes["encoder"] == "d2vfm mpa stage 1 scale 1"
    encoder = load_student_encoder(checkpoint, "student")
    assert bag.coords is not None
    with open_slide(cohort / "slides" / "S001.tiff") as slide, torch.no_grad():
        x, y = bag.coords[3]
        pixels = torch.from_numpy(slide.read(int(x), int(y), 64).copy()).permute(2, 0, 1)[None]
        expected = encoder.model(pixels)[0].numpy()
    assert np.allclose(bag.features[3], expected, atol=1e-4)
    assert len({digest_pairs(read_pairs(pairs_root)), bag.attributes["weights_sha256"]}) == 2
