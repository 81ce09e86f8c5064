"""Networks that are loaded are built without initial weights: nothing drawn, nothing copied,
buffers as they were.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from patch_encoder.models.encoder_weights import skip_initialisation
from patch_encoder.models.encoders import build_encoder
from wsi_common.checkpoint import load_weights
from wsi_common.errors import UserError

OPTIONS = {
    "vit_tiny_patch16_224": {"depth": 1},
    "vit_small_patch16_dinov3": {"depth": 1},  # rotary positions: buffers that no file holds
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1)},  # relative positions and masks
    "resnet18": {},  # running statistics: buffers that the file holds
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_a_network_without_initial_weights_is_the_same_once_loaded(name: str) -> None:
    reference = timm.create_model(name, num_classes=0, **OPTIONS[name]).eval()
    with skip_initialisation():
        network = timm.create_model(name, num_classes=0, **OPTIONS[name]).eval()
    assert all(parameter.is_meta for parameter in network.parameters())
    assert not any(buffer.is_meta for buffer in network.buffers())
    state = reference.state_dict()
    load_weights(network, state, "x.pt")
    assert [type(p) for p in network.parameters()] == [type(p) for p in reference.parameters()]
    assert all(
        network.state_dict()[key].data_ptr() == value.data_ptr() for key, value in state.items()
    ), "taken, not copied"
    for (key, found), (_, expected) in zip(
        network.named_buffers(), reference.named_buffers(), strict=True
    ):
        assert torch.equal(found, expected), key
    pixels = torch.rand(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(network(pixels), reference(pixels))


def test_the_network_s_own_dtype_stays_and_so_does_what_is_said_of_wrong_files() -> None:
    with skip_initialisation():
        layer = nn.Linear(3, 2)
    half = {
        "weight": torch.ones(3, 2, dtype=torch.float16).T,
        "bias": torch.ones(2, dtype=torch.float16),
    }
    load_weights(layer, half, "x.pt")
    assert (
        layer.weight.dtype == torch.float32
        and layer.weight.is_contiguous()
        and layer.weight.requires_grad
    )
    with skip_initialisation():
        layer = nn.Linear(3, 2)
    with pytest.raises(UserError, match="1 missing"):
        load_weights(layer, {"weight": half["weight"]}, "x.pt")
    assert not nn.Linear(3, 2).weight.is_meta, "only inside"
    with pytest.raises(RuntimeError), skip_initialisation():
        raise RuntimeError
    assert not nn.Linear(3, 2).weight.is_meta, "an error does not leave it on"


def test_an_encoder_from_a_file_draws_no_weights_and_survives_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "w.safetensors"
    save_file(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), file)
    drawn = []
    normal = torch.Tensor.normal_

    def noted(tensor: torch.Tensor, *args: float, **options: object) -> torch.Tensor:
        drawn.append(not tensor.is_meta and tensor.numel() > 1e5)
        return normal(tensor, *args, **options)

    monkeypatch.setattr(torch.Tensor, "normal_", noted)
    module = build_encoder("timm:vit_tiny_patch16_224", str(file)).model
    assert not any(drawn) and not any(tensor.is_meta for tensor in module.state_dict().values())
    before = module(torch.zeros(1, 3, 224, 224, dtype=torch.uint8))
    file.write_bytes(b"another file")  # in place: a mapping of it would be gone
    assert torch.equal(module(torch.zeros(1, 3, 224, 224, dtype=torch.uint8)), before)
