"""Denoising queries and groups of queries: who sees whom, how far boxes move, and nothing of it at
inference.
"""

from __future__ import annotations

import pytest
import torch

from detection_kd.losses.boxes import cxcywh_to_xyxy
from detection_kd.models.backbone import Backbone
from detection_kd.models.deformable_detr import DeformableDETR
from detection_kd.models.deformable_transformer import Architecture, apart
from detection_kd.models.denoising import make_noised_targets, shift_boxes

SIZES = {
    "hidden_dim": 32,
    "heads": 2,
    "feedforward_dim": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "queries": 4,
    "dropout": 0.0,
}
TWO_STAGE = {"box_refine": True, "two_stage": True, "mixed_selection": True}
LABELS = [torch.tensor([2, 0, 1]), torch.tensor([1]), torch.zeros(0, dtype=torch.int64)]
BOXES = [torch.tensor([[0.3, 0.3, 0.2, 0.1], [0.6, 0.5, 0.1, 0.3], [0.5, 0.7, 0.3, 0.3]]),
torch.tensor([[0.4, 0.4, 0.2, 0.2]]),
         torch.zeros(0, 4)]  # fmt: skip


def detector(**changes: object) -> DeformableDETR:
    torch.manual_seed(0)
    model = DeformableDETR(Backbone("resnet18", "group"), 3, Architecture(**(SIZES | changes)))
    for head in model.bbox_embed:  # published initial values hide whole terms behind zeros
        torch.nn.init.normal_(head.layers[2].weight, std=0.1)
    return model


def pixels(count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, 3, 64, 64), torch.zeros(count, 64, 64, dtype=torch.bool)


def test_slots_are_groups_of_positives_then_negatives() -> None:
    noised = make_noised_targets(LABELS, BOXES, 3, 7, label_noise=0.0, box_noise=0.0)
    assert (noised.groups, noised.group_size) == (2, 6) and noised.labels.shape == (3, 12)
    for start in (0, 3, 6, 9):  # without noise every copy is the annotation itself
        assert noised.labels[0, start : start + 3].tolist() == [2, 0, 1]
        torch.testing.assert_close(noised.boxes[0, start : start + 3], BOXES[0])
    assert noised.counted.tolist() == [[True] * 12, [True, False, False] * 4, [False] * 12]
    queries, targets = noised.matches[0]
    assert queries.tolist() == [0, 1, 2, 6, 7, 8] and targets.tolist() == [0, 1, 2] * 2
    assert [match.tolist() for match in noised.matches[1]] == [[0, 6], [0, 0]]
    assert [len(match) for match in noised.matches[2]] == [0, 0]


def test_positives_move_less_than_half_their_size_and_negatives_more() -> None:
    torch.manual_seed(0)
    boxes = torch.tensor([0.5, 0.5, 0.2, 0.1]).expand(1, 4000, 4)
    negative = (torch.arange(4000) % 2).float()
    moved = (
        cxcywh_to_xyxy(shift_boxes(boxes, negative, 1.0)) - cxcywh_to_xyxy(boxes)
    ).abs() / torch.tensor([0.1, 0.05, 0.1, 0.05])
    positives, negatives = moved[0, ::2], moved[0, 1::2]
    assert positives.max() <= 1 + 1e-5 and positives.mean() == pytest.approx(0.5, abs=0.03)
    # corners of a negative may change places, which leaves a corner as near as 0 to the old one,
    # and none farther than 3
    assert negatives.max() <= 3 and negatives.mean() > 1
    assert (shift_boxes(boxes, negative, 0.4) - boxes).abs().max() < (
        shift_boxes(boxes, negative, 1.0) - boxes
    ).abs().max()
    corners = cxcywh_to_xyxy(
        shift_boxes(torch.tensor([0.05, 0.95, 0.4, 0.4]).expand(1, 4000, 4), negative, 1.0)
    )
    assert (
        corners.min() >= -1e-6
        and corners.max() <= 1 + 1e-6
        and (corners[..., 2:] >= corners[..., :2] - 1e-6).all()
    )


def test_labels_are_drawn_anew_with_half_the_label_noise() -> None:
    torch.manual_seed(0)
    labels, boxes = [torch.zeros(500, dtype=torch.int64)], [torch.rand(500, 4)]
    changed = (
        (make_noised_targets(labels, boxes, 1000, 2000, label_noise=0.5).labels != 0).float().mean()
    )
    assert changed == pytest.approx(0.25, abs=0.03)


def test_a_batch_without_boxes_still_reaches_the_label_embedding() -> None:
    model = detector(**TWO_STAGE, denoising=5).train()
    empty = ([torch.zeros(0, dtype=torch.int64)] * 2, [torch.zeros(0, 4)] * 2)
    found = model(*pixels(2), empty)
    assert found.denoised is not None and not found.denoised[2].counted.any()
    found.denoised[0].sum().backward()
    assert model.label_embed is not None and model.label_embed.weight.grad is not None


def test_blocks_do_not_see_each_other() -> None:
    mask = apart([2, 1], torch.device("cpu"))
    assert mask is not None and mask.tolist() == [
        [False, False, True],
        [False, False, True],
        [True, True, False],
    ]
    assert apart([5], torch.device("cpu")) is None


def test_noised_annotations_leave_the_queries_alone() -> None:
    model = detector(**TWO_STAGE, denoising=5, groups=2).train()
    first = model(*pixels(), (LABELS, BOXES))
    second = model(*pixels(), (LABELS, [box * 0.9 for box in BOXES]))
    assert first.denoised is not None and second.denoised is not None
    torch.testing.assert_close(first.logits, second.logits)
    torch.testing.assert_close(first.boxes, second.boxes)
    assert not torch.equal(first.denoised[1], second.denoised[1])


@pytest.mark.parametrize(
    "changes", [{"groups": 3}, {"groups": 3, **TWO_STAGE}], ids=["learned", "mixed"]
)
def test_every_group_is_what_it_would_be_alone(changes: dict[str, object]) -> None:
    model = detector(**changes).train()
    together = model(*pixels())
    assert together.groups == 3 and together.logits.shape[2] == 12
    weights = model.query_embed.weight.detach().clone()
    model.eval()
    for group in range(3):
        with torch.no_grad():
            model.query_embed.weight[:4] = weights[4 * group : 4 * group + 4]
            alone = model(*pixels())
        assert alone.groups == 1 and alone.logits.shape[2] == 4
        torch.testing.assert_close(
            together.boxes[:, :, 4 * group : 4 * group + 4], alone.boxes, atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(
            together.logits[:, :, 4 * group : 4 * group + 4], alone.logits, atol=1e-5, rtol=1e-5
        )


def test_mixed_selection_places_learned_contents_at_the_proposals() -> None:
    model = detector(**TWO_STAGE).eval()
    assert model.query_embed is not None and model.query_embed.weight.shape == (4, 32)
    with torch.no_grad():
        before = model(*pixels())
        model.query_embed.weight.add_(1.0)
        after = model(*pixels())
    assert torch.equal(before.proposal_logits, after.proposal_logits) and not torch.equal(
        before.boxes, after.boxes
    )
    found = detector(**TWO_STAGE, denoising=4, groups=2).train()
    outputs = found(*pixels(), (LABELS, BOXES))
    parts = [
        outputs.logits,
        outputs.boxes,
        outputs.proposal_logits,
        outputs.proposal_boxes,
        *outputs.denoised[:2],
    ]
    sum((part * torch.randn_like(part)).sum() for part in parts).backward()
    assert [name for name, parameter in found.named_parameters() if parameter.grad is None] == []
