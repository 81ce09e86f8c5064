"""The detector against transformers' Deformable DETR with the same random weights, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

from detection_kd.models.backbone import Backbone
from detection_kd.models.checkpoint_import import convert_huggingface
from detection_kd.models.deformable_detr import DeformableDETR
from detection_kd.models.deformable_transformer import Architecture

CASES = {
    "plain": {},
    "box refinement": {"box_refine": True},
    "two-stage": {"box_refine": True, "two_stage": True},
    "one level": {"levels": 1},
}


def oracle(a: Architecture) -> DeformableDetrForObjectDetection:
    stages = ["stage4"] if a.levels == 1 else ["stage2", "stage3", "stage4"]
    widths = [64, 128, 256, 512]
    resnet = ResNetConfig(
        embedding_size=64,
        hidden_sizes=widths,
        depths=[1] * 4,
        layer_type="basic",
        out_features=stages,
    )
    config = DeformableDetrConfig(
        backbone_config=resnet,
        num_labels=3,
        d_model=a.hidden_dim,
        encoder_layers=a.encoder_layers,
        decoder_layers=a.decoder_layers,
        encoder_ffn_dim=a.feedforward_dim,
        decoder_ffn_dim=a.feedforward_dim,
        encoder_attention_heads=a.heads,
        decoder_attention_heads=a.heads,
        num_feature_levels=a.levels,
        num_queries=a.queries,
        two_stage=a.two_stage,
        two_stage_num_proposals=a.queries,
        with_box_refine=a.box_refine,
    )
    model = DeformableDetrForObjectDetection(config)
    for parameter in model.parameters():  # published initial values hide whole terms behind zeros
        nn.init.normal_(parameter, std=0.1)
    return model.double().eval()


class Shared(nn.Module):
    """The oracle's backbone in place of ours: ResNet itself is torchvision's."""

    def __init__(self, model: DeformableDetrForObjectDetection) -> None:
        super().__init__()
        self.trunk = model.model.backbone.model
        self.channels = (
            tuple(self.trunk.channels) if len(self.trunk.channels) == 3 else (128, 256, 512)
        )

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return list(self.trunk(images).feature_maps)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("case", CASES)
def test_outputs_equal_transformers(case: str, padded: bool) -> None:
    torch.manual_seed(0)
    a = Architecture(64, 4, 48, 2, 2, queries=7, **({"levels": 4} | CASES[case]))
    theirs = oracle(a)
    ours = DeformableDETR(Backbone("resnet18", "batch"), 3, a).double().eval()
    missing, unexpected = ours.load_state_dict(
        convert_huggingface(theirs.state_dict()), strict=False
    )
    assert not unexpected and all(name.startswith("backbone.") for name in missing)
    ours.backbone = Shared(theirs)
    images = torch.randn(2, 3, 128, 192, dtype=torch.float64)
    padding = torch.zeros(2, 128, 192, dtype=torch.bool)
    if padded:
        padding[0, 100:] = True
        padding[1, :, 130:] = True
    with torch.no_grad():
        found = ours(images, padding)
        expected = theirs(images, pixel_mask=(~padding).long())
    torch.testing.assert_close(found.logits[-1], expected.logits, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.boxes[-1], expected.pred_boxes, atol=1e-6, rtol=0)
    if a.two_stage:
        torch.testing.assert_close(
            found.proposal_logits, expected.enc_outputs_class, atol=1e-6, rtol=0
        )
        torch.testing.assert_close(
            found.proposal_boxes, expected.enc_outputs_coord_logits.sigmoid(), atol=1e-6, rtol=0
        )
    else:
        pyramid = ours.transformer.pyramid(ours.project(ours.backbone(images)), padding)
        memory = ours.transformer.encoder(pyramid)
        torch.testing.assert_close(memory, expected.encoder_last_hidden_state, atol=1e-6, rtol=0)
