"""Encoders from a hub: the real loading code on a cache folder that lies there, and what is said
where it does not.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from patch_encoder.models import encoder_table
from patch_encoder.models.backbones import initialise
from patch_encoder.models.encoder_table import HALF, EncoderRow
from patch_encoder.models.encoders import build_encoder
from patch_encoder.models.transforms import Fit
from wsi_common.errors import UserError

VISION = {"layers": 2, "width": 64, "patch_size": 16, "head_width": 32, "image_size": 32}
CLIP = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
"intermediate_size": 64, "image_size": 32,
        "patch_size": 16, "projection_dim": 16}  # fmt: skip
ROWS = {
    "tiny_timm": EncoderRow("timm", "test_vit", "org/tiny-timm", 64, Fit(160, 160)),
    "tiny_open_clip": EncoderRow(
        "open_clip", "none", "org/tiny-clip", 16, Fit(32, 32), options={"vision_cfg": VISION}
    ),
    "tiny_transformers": EncoderRow(
        "transformers",
        "CLIPVisionModelWithProjection",
        "org/tiny-plip",
        16,
        Fit(32, 32),
        options=CLIP,
    ),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, offline."""
    from huggingface_hub import constants

    for name, row in ROWS.items():
        monkeypatch.setitem(encoder_table.ENCODERS, name, row)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def snapshot(cache: Path, repository: str) -> Path:
    """The snapshot folder of a repository, as a download leaves it."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(revision)
    (root / "snapshots" / revision).mkdir(parents=True)
    return root / "snapshots" / revision


def drawn(row: EncoderRow) -> nn.Module:
    torch.manual_seed(1)
    module = initialise(row).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def publish(folder: Path, row: EncoderRow, module: nn.Module) -> None:
    """Write the network as its library publishes it: with the text tower and configuration files
    beside it.
    """
    state = {key: value.contiguous() for key, value in module.state_dict().items()}
    text = {"text_model.embeddings.position_ids": torch.arange(4), "logit_scale": torch.ones(())}
    if row.library == "timm":
        safetensors.torch.save_file(state, folder / "model.safetensors")
    elif row.library == "open_clip":
        whole = {f"visual.{key}": value for key, value in state.items()} | {
            "transformer.resblocks.0.weight": torch.ones(2)
        }
        torch.save(whole | {"logit_scale": torch.ones(())}, folder / "open_clip_pytorch_model.bin")
        settings = {"model_cfg": {"embed_dim": 16, "vision_cfg": VISION}}
        (folder / "open_clip_config.json").write_text(json.dumps(settings))
    else:
        named = {key.removeprefix("model."): value for key, value in state.items()}
        torch.save(named | text, folder / "pytorch_model.bin")


def features(network: nn.Module, row: EncoderRow) -> Tensor:
    size = row.fit.size or 0
    with torch.no_grad():
        return network(torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", list(ROWS))
def test_weights_come_from_the_cache(name: str, hub: Path) -> None:
    row = ROWS[name]
    module = drawn(row)
    publish(snapshot(hub, row.weights), row, module)
    encoder = build_encoder(name)
    assert torch.allclose(features(encoder.model.network, row), features(module, row), atol=1e-5)
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())


@pytest.mark.parametrize("name", list(ROWS))
def test_without_network_one_line_names_the_file_and_its_place(name: str, hub: Path) -> None:
    with pytest.raises(UserError) as caught:
        build_encoder(name)
    message = str(caught.value)
    assert f"fetch '{ROWS[name].weights}' (file " in message
    assert "weights=..." in message
    assert str(hub) in message
    assert "licence" not in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["uni", "gigapath", "conch", "h_optimus_1", "musk"])
def test_gated_models_say_what_has_to_be_accepted(name: str, hub: Path) -> None:
    row = encoder_table.ENCODERS[name]
    with pytest.raises(
        UserError,
        match=rf"fetch '{row.weights}'.*accept its licence on its hub page and log in first",
    ):
        build_encoder(name)


def test_a_refusal_is_told_from_a_missing_file(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    asked: list[str] = []

    def refuse(repository: str, file: str) -> str:
        asked.append(file)
        error = GatedRepoError.__new__(GatedRepoError)
        Exception.__init__(error, "Access to model org/tiny-timm is restricted.")
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(UserError, match="accept its licence"):
        build_encoder("tiny_timm")
    assert asked == ["model.safetensors"], "no second name is tried after a refusal"


def test_weights_on_no_hub_are_asked_for(hub: Path) -> None:
    with pytest.raises(
        UserError, match="encoder 'brow': its weights are on no hub; give the file as weights="
    ):
        build_encoder("brow")


def test_a_wider_tower_than_the_table_says_is_refused(hub: Path) -> None:
    row = ROWS["tiny_open_clip"]
    folder = snapshot(hub, row.weights)
    publish(folder, row, drawn(row))
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 32, "vision_cfg": VISION}})
    )
    with pytest.raises(UserError, match="expected embed_dim 16 for 'tiny_open_clip', found 32"):
        build_encoder("tiny_open_clip")


@pytest.mark.parametrize("where", ["hub", "folder", "weights"])
def test_any_transformers_model_by_repository_or_folder(
    where: str, hub: Path, tmp_path: Path
) -> None:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=32,
        patch_size=16,
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    folder = snapshot(hub, "org/own") if where == "hub" else tmp_path / "own"
    model.save_pretrained(folder)
    processor = {
        "size": {"height": 32, "width": 32},
        "resample": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    name, weights = {
        "hub": ("hf:org/own", ""),
        "folder": (f"hf:{folder}", str(folder)),
        "weights": ("hf:x/y", str(folder)),
    }[where]
    encoder = build_encoder(name, weights)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(
            encoder.model.network(pixels), model(pixels).last_hidden_state[:, 0], atol=1e-6
        )
    assert repr(encoder.transform) == "resize(32, bilinear)"
    assert f"mean/std {HALF}" in encoder.provenance["transform"]
    assert encoder.dim == 32


def test_code_of_a_repository_is_never_run(hub: Path) -> None:
    folder = snapshot(hub, "org/own")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own_kind", "auto_map": {"AutoModel": "own.Own"}})
    )
    (folder / "own.py").write_text("raise SystemExit('executed')")
    with pytest.raises(UserError, match="model_type 'own_kind' is no model of transformers"):
        build_encoder("hf:org/own")


@pytest.mark.process
def test_the_environment_variables_of_the_hub_are_obeyed(tmp_path: Path, root: Path) -> None:
    row = EncoderRow("timm", "test_vit", "timm/test_vit.r160_in1k", 64, Fit(160, 160))
    publish(snapshot(tmp_path / "hub", row.weights), row, drawn(row))
    code = (
        "from patch_encoder.models.encoders import build_encoder\n"
        "print(build_encoder('timm:test_vit.r160_in1k').provenance['weights_sha256'])\n"
        "build_encoder('uni')"
    )
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("HF_HUB_CACHE", None)
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert len(done.stdout.strip()) == 64, done.stderr
    assert "UserError: encoder 'uni': its weights could not be had from the hub" in done.stderr
    assert str(tmp_path / "hub") in done.stderr
