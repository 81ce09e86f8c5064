"""Encoder weights from files in every published form and from a hub's cache: what fits loads, what
does not is named.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from patch_encoder.models import encoder_table
from patch_encoder.models.backbones import initialise
from patch_encoder.models.encoder_table import EncoderRow
from patch_encoder.models.encoders import build_encoder
from patch_encoder.models.transforms import Fit
from wsi_common.errors import UserError

VISION = {"layers": 2, "width": 64, "patch_size": 16, "head_width": 32, "image_size": 32}
VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
SMALL = {
    "tiny_timm": EncoderRow("timm", "test_vit", "org/tiny-timm", 64, Fit(160, 160), gated=True),
    "tiny_open_clip": EncoderRow(
        "open_clip", "none", "org/tiny-clip", 16, Fit(32, 32), options={"vision_cfg": VISION}
    ),
    "tiny_transformers": EncoderRow(
        "transformers", "ViTModel", "org/tiny-vit", 32, Fit(32, 32), options=VIT
    ),
    "tiny_resnet": EncoderRow(
        "timm", "test_resnet", "org/tiny-resnet", 0, Fit(160, 160), options={"layer": 2}
    ),
}
State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, row in SMALL.items():
        monkeypatch.setitem(encoder_table.ENCODERS, name, row)


def network(name: str, seed: int = 0) -> nn.Module:
    """A small network whose every weight is drawn, those that start at zero or one too."""
    torch.manual_seed(seed)
    module = initialise(SMALL[name]).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.2)
    return module


def output(name: str, weights: str | Path) -> Tensor:
    """Features of one fixed tile with these weights."""
    encoder = build_encoder(name, str(weights))
    pixels = torch.randint(0, 255, (2, 3, SMALL[name].fit.size or 32, SMALL[name].fit.size or 32),
    dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(5))  # fmt: skip
    with torch.no_grad():
        return encoder.model(pixels)


def expected(name: str, module: nn.Module) -> Tensor:
    """The same from the network itself."""
    row, generator = SMALL[name], torch.Generator().manual_seed(5)
    size = row.fit.size or 32
    pixels = torch.randint(0, 255, (2, 3, size, size), dtype=torch.uint8, generator=generator)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) * 255 for values in row.statistics)
    with torch.no_grad():
        return module((pixels - mean) / std)


def prefixed(state: State, prefix: str) -> State:
    return {f"{prefix}{key}": value for key, value in state.items()}


HEAD = {"mlp.0.weight": torch.ones(2, 2), "last_layer.weight_g": torch.ones(2, 1)}
CONTAINERS: dict[str, Callable[[State], dict[str, object]]] = {
    "flat": lambda state: dict(state),
    "model": lambda state: {"model": state, "epoch": 3},
    "DDP state_dict": lambda state: {"state_dict": prefixed(state, "module."),
    "optimizer": {"lr": 1.0}},
    "compiled DDP": lambda state: prefixed(state, "module._orig_mod."),
    "DINO": lambda state: {
        "student": prefixed({key: value * 0 for key, value in state.items()}, "module.backbone."),
        "teacher": prefixed(state, "backbone.") | prefixed(HEAD, "head."),
        "epoch": 7,
    },
    "DINOv2": lambda state: {
        "teacher": prefixed(state, "backbone.") | prefixed(HEAD, "dino_head.") | prefixed(HEAD,
        "ibot_head."),
    },
    "whole CLIP": lambda state: (
        prefixed(state, "visual.trunk.") | {"logit_scale": torch.ones(()),
        "text.ln.weight": torch.ones(2)}
    ),
    "classifier": lambda state: state | {"head.weight": torch.ones(5, 64),
    "head.bias": torch.ones(5)},
    "MAE": lambda state: {"model": state | {"mask_token": torch.ones(1, 1, 8),
    "decoder_embed.weight": torch.ones(8, 64)}},
}  # fmt: skip


@pytest.mark.parametrize("form", list(CONTAINERS))
def test_timm_weights_in_every_form(form: str, tmp_path: Path) -> None:
    module = network("tiny_timm")
    torch.save(CONTAINERS[form](module.state_dict()), tmp_path / "checkpoint.pth")
    assert torch.allclose(
        output("tiny_timm", tmp_path / "checkpoint.pth"), expected("tiny_timm", module), atol=1e-5
    )


def test_the_student_of_a_checkpoint_can_be_asked_for(tmp_path: Path) -> None:
    teacher, student = network("tiny_timm", 1), network("tiny_timm", 2)
    content = {
        "teacher": prefixed(teacher.state_dict(), "backbone."),
        "student": prefixed(student.state_dict(), "module.backbone.")
        | prefixed(HEAD, "module.head."),
    }
    torch.save(content, tmp_path / "c.pth")
    for choice, module in (("", teacher), ("#teacher", teacher), ("#student", student)):
        assert torch.allclose(
            output("tiny_timm", f"{tmp_path}/c.pth{choice}"),
            expected("tiny_timm", module),
            atol=1e-5,
        )
    with pytest.raises(UserError, match=r"expected the key 'ema', found \['student', 'teacher'\]"):
        build_encoder("tiny_timm", f"{tmp_path}/c.pth#ema")


@pytest.mark.parametrize("layout", ["safetensors", "folder", "folder of the hub", "shards"])
def test_files_and_folders(layout: str, tmp_path: Path) -> None:
    module = network("tiny_timm")
    state = {key: value.contiguous() for key, value in module.state_dict().items()}
    target = tmp_path
    if layout == "safetensors":
        target = tmp_path / "any-name.safetensors"
        safetensors.torch.save_file(state, target)
    elif layout == "folder":
        torch.save(state, tmp_path / "anything.pth")
    elif layout == "folder of the hub":
        safetensors.torch.save_file(state, tmp_path / "model.safetensors")
        torch.save({"wrong": torch.ones(1)}, tmp_path / "training_args.bin")
    else:
        keys = sorted(state)
        target = tmp_path / "model.safetensors.index.json"
        parts = {"model-1.safetensors": keys[::2], "model-2.safetensors": keys[1::2]}
        for name, part in parts.items():
            safetensors.torch.save_file({key: state[key] for key in part}, tmp_path / name)
        target.write_text(
            json.dumps({"weight_map": {key: name for name, part in parts.items() for key in part}})
        )
    assert torch.allclose(output("tiny_timm", target), expected("tiny_timm", module), atol=1e-5)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../elsewhere.safetensors"}}))
    with pytest.raises(UserError, match="expected an index"):
        build_encoder("tiny_timm", str(index))


@pytest.mark.parametrize("name", ["tiny_timm", "tiny_open_clip", "tiny_transformers"])
def test_missing_unexpected_and_reshaped_keys_are_named(name: str, tmp_path: Path) -> None:
    module = network(name)
    state = {key.removeprefix("model."): value for key, value in module.state_dict().items()}
    first = next(key for key, value in state.items() if value.ndim == 1)
    for label, changed in {
        rf"1 missing \['{first}'\]": {key: value for key, value in state.items() if key != first},
        r"1 unexpected \['extra.weight'\]": state | {"extra.weight": torch.ones(3)},
        "1 of another shape": state | {first: torch.ones(7)},
    }.items():
        torch.save(changed, tmp_path / "w.pth")
        with pytest.raises(UserError, match=label) as caught:
            build_encoder(name, str(tmp_path / "w.pth"))
        assert "\n" not in str(caught.value)


def test_a_deeper_network_is_not_cut_down_silently(tmp_path: Path) -> None:
    state = network("tiny_open_clip").state_dict()
    deeper = prefixed(state, "visual.") | prefixed(
        {
            key.replace("resblocks.1", "resblocks.2"): value
            for key, value in state.items()
            if "resblocks.1" in key
        },
        "visual.",
    )
    text = {
        "transformer.resblocks.0.ln_1.weight": torch.ones(3),
        "positional_embedding": torch.ones(4, 4),
    }
    torch.save(prefixed(state, "visual.") | text, tmp_path / "whole.pt")
    assert torch.allclose(
        output("tiny_open_clip", tmp_path / "whole.pt"),
        expected("tiny_open_clip", network("tiny_open_clip")),
        atol=1e-5,
    )
    torch.save(deeper | text, tmp_path / "deeper.pt")
    with pytest.raises(UserError, match=r"12 unexpected \['transformer.resblocks.2"):
        build_encoder("tiny_open_clip", str(tmp_path / "deeper.pt"))


def test_what_is_left_out_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = network("tiny_timm").state_dict()
    torch.save(
        {"teacher": prefixed(state, "backbone.") | prefixed(HEAD, "head.")}, tmp_path / "c.pth"
    )
    with caplog.at_level(logging.INFO):
        build_encoder("tiny_timm", str(tmp_path / "c.pth"))
    assert "2 keys beside the encoder left out: head.last_layer, head.mlp" in caplog.text


def test_a_truncated_resnet_takes_the_whole_file(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    whole = timm.create_model("test_resnet", num_classes=5).eval()
    torch.save(whole.state_dict(), tmp_path / "w.pth")
    truncated = build_encoder("tiny_resnet", str(tmp_path / "w.pth")).model.network
    assert torch.equal(truncated.trunk.layer2[0].conv1.weight, whole.layer2[0].conv1.weight)  # type: ignore[union-attr,index]
    torch.save(
        {key: value for key, value in whole.state_dict().items() if "layer1" not in key},
        tmp_path / "w.pth",
    )
    with pytest.raises(UserError, match=r"missing \['layer1"):
        build_encoder("tiny_resnet", str(tmp_path / "w.pth"))


def test_unreadable_and_empty_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected one weights file in the folder, found \[\]"):
        build_encoder("tiny_timm", str(tmp_path))
    for name in ("a.pt", "b.pt"):
        torch.save({}, tmp_path / name)
    with pytest.raises(UserError, match=r"found \['a.pt', 'b.pt'\]; name the file"):
        build_encoder("tiny_timm", str(tmp_path))
    torch.save({"epoch": 3, "note": "x"}, tmp_path / "a.pt")
    with pytest.raises(
        UserError, match="expected a state dict of tensors, or one under teacher, student"
    ):
        build_encoder("tiny_timm", str(tmp_path / "a.pt"))


def test_positions_of_another_size_are_resampled_as_timm_does(tmp_path: Path) -> None:
    from timm.layers import resample_abs_pos_embed

    state = network("tiny_timm").state_dict()
    torch.manual_seed(3)
    wide = torch.randn(1, 1 + 14 * 14, 64)
    torch.save({**state, "pos_embed": wide}, tmp_path / "w.pth")
    loaded = build_encoder("tiny_timm", str(tmp_path / "w.pth")).model.network.pos_embed
    assert torch.allclose(
        loaded, resample_abs_pos_embed(wide, [10, 10], num_prefix_tokens=1), atol=1e-6
    )  # type: ignore[arg-type]
