"""The list of encoders and the check of one: what is printed, what is counted, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from patch_encoder import list_encoders
from patch_encoder.models.encoder_table import ENCODERS
from patch_encoder.models.encoders import build_encoder
from patch_encoder.slide_encoders.table import SLIDE_ENCODERS
from wsi_common.cli import run


def printed(capsys: pytest.CaptureFixture[str], *keys: str) -> str:
    assert run(list_encoders.main, list_encoders.Config, list(keys)) == 0
    return capsys.readouterr().out


def test_every_encoder_has_one_line_with_what_a_user_needs(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = printed(capsys, "kind=tile").splitlines()
    assert lines[0].split() == list(list_encoders.COLUMNS)
    assert [line.split()[0] for line in lines[1 : len(ENCODERS) + 1]] == list(ENCODERS)
    uni = next(line for line in lines if line.startswith("uni "))
    assert uni.split() == [
        "uni",
        "1024",
        "224",
        "0.5",
        "256",
        "fp16",
        "timm",
        "CC-BY-NC-ND-4.0",
        "yes",
        "MahmoodLab/UNI",
    ]
    assert "timm:<model>" in lines[-1]


def test_every_slide_encoder_has_one_line_with_its_tile_encoder_and_licence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = printed(capsys, "kind=slide").splitlines()
    assert [line.split()[0] for line in lines[3:]] == list(SLIDE_ENCODERS)
    titan = next(line for line in lines if line.startswith("titan "))
    assert titan.split() == [
        *("titan", "768", "conch_v1_5", "0.5", "512", "yes", "yes"),
        *("CC-BY-NC-ND-4.0", "yes", "MahmoodLab/TITAN"),
    ]
    for name, row in SLIDE_ENCODERS.items():
        assert set(row.tile_encoders) <= ENCODERS.keys(), name
        widths = {ENCODERS[tiles].width for tiles in row.tile_encoders}
        assert widths <= {row.in_dim}, name
    both = printed(capsys)
    assert "timm:<model>" in both and lines[3] in both


def test_json_holds_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(printed(capsys, "json=true", "kind=tile"))
    assert {row["name"]: row["dim"] for row in rows} == {
        name: row.width for name, row in ENCODERS.items()
    }
    virchow = next(row for row in rows if row["name"] == "virchow2")
    assert (virchow["pool"], virchow["gated"], virchow["mpp"]) == ("cls_mean", True, 0.5)
    assert [row["name"] for row in json.loads(printed(capsys, "json=true", "match=hibou"))] == [
        "hibou_b",
        "hibou_l",
    ]


def test_no_match_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(list_encoders.main, list_encoders.Config, ["match=resnet1000"]) == 2
    assert "expected part of an encoder's name" in capsys.readouterr().err


def test_the_check_loads_the_weights_and_says_what_they_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = build_encoder("timm:test_vit", "random")
    torch.save({"model": random.model.network.state_dict()}, tmp_path / "w.pth")
    keys = [
        "encoder=timm:test_vit",
        f"weights={tmp_path}/w.pth",
        "device=cpu",
        "precision=fp32",
        "batch_size=2",
        "rounds=1",
    ]
    result = json.loads(printed(capsys, "json=true", *keys))
    assert result["weights_sha256"] == random.provenance["weights_sha256"]
    assert result["parameters"] == sum(parameter.numel() for parameter in random.model.parameters())
    assert (result["dim"], result["device"], result["precision"], result["tile"]) == (
        64,
        "cpu",
        "fp32",
        256,
    )
    assert result["ms_a_tile"] > 0
    assert result["transform_ms_a_tile"] > 0
    assert "ms_a_tile: " in printed(capsys, *keys)


def test_operations_are_those_of_the_formula() -> None:
    from timm.models.vision_transformer import VisionTransformer

    encoder = build_encoder("timm:test_vit", "random")
    width, depth, tokens = 64, 6, 101
    vit = encoder.model.network
    assert isinstance(vit, VisionTransformer)
    assert (vit.embed_dim, len(vit.blocks)) == (width, depth)
    hidden = vit.blocks[0].mlp.fc1.out_features
    a_block = tokens * (4 * width**2 + 2 * width * hidden) + 2 * tokens**2 * width
    expected = 2 * (depth * a_block + 100 * width * 3 * 16**2) / 1e9
    batch, _ = list_encoders.make_random_batch(encoder, 2, 160)
    assert list_encoders.count_gflops(encoder, batch) == pytest.approx(expected, rel=1e-6)
    assert list_encoders.count_gflops(build_encoder("mean_colour"), torch.zeros(1, 3)) is None


def test_features_that_overflow_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = build_encoder("timm:test_vit", "random")
    with torch.no_grad():
        broken.model.network.norm.weight.fill_(float("inf"))  # type: ignore[union-attr]
    monkeypatch.setattr(list_encoders, "build_encoder", lambda *arguments: broken)
    assert (
        run(
            list_encoders.main,
            list_encoders.Config,
            ["encoder=timm:test_vit", "device=cpu", "rounds=1", "batch_size=1"],
        )
        == 2
    )
    assert "not finite; try precision=fp32" in capsys.readouterr().err


def test_a_classical_descriptor_is_timed_in_its_transform(
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = json.loads(
        printed(
            capsys, "json=true", "encoder=stain_texture", "device=cpu", "batch_size=1", "rounds=1"
        )
    )
    assert (result["dim"], result["parameters"], result["gflops_a_tile"]) == (151, 0, None)
    assert result["transform_ms_a_tile"] > result["ms_a_tile"]
